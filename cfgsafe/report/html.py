"""A run as one HTML file that can be sent on: table, figures, checks, and what each model answered, with the leaks marked.

Source: the report.md of the demo. Deviations: nothing is loaded from elsewhere (inline CSS, figures as data URIs, no script), and
personal data are masked, "M████" for "Maria", unless --show-pii is given. Masked are a prompt's gold items and what the NER finds in its
conversation or in any model's answer to it, wherever they stand; what neither knows stays legible, so read before you publish.

Run it: python eval.py report --run runs/demo
"""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl, write_text
from cfgsafe.measure import leak
from cfgsafe.pii.matching import places
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results

MASK = "████"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 78rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
.box { overflow-x: auto; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { background: #f6f6f6; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { color: #666; display: block; }
img { max-width: min(46rem, 100%); height: auto; }
.legend, footer { color: #555; font-size: .85rem; }
footer { margin-top: 2.5rem; }
.holds b { color: #0a6b2d; }
.fails b { color: #b00020; }
.chat { background: #f6f6f6; border-radius: 6px; padding: .6rem .9rem; overflow-wrap: anywhere; }
.chat p { margin: .2rem 0; white-space: pre-wrap; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); gap: .6rem; margin-top: .6rem; }
.answer { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .8rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.answer b, .chat b { display: block; font-size: .8rem; color: #555; }
mark { padding: 0 .15em; border-radius: 3px; }
mark.echoed { background: #ffd9a8; }
mark.recalled { background: #ffb3b3; }
mark.ner { background: #d6e4ff; }
"""


@dataclass
class Options:
    """Write a run's results as one self-contained HTML file."""

    run: str
    """Folder of a demo run or a sweep."""
    out: str | None = None
    """HTML file; by default report.html in the run's folder."""
    show_pii: bool = False
    """Show personal data as they are. Without it they are masked, invented people's as well."""
    note: str = ""
    """A line of your own below the title."""
    ner: str | None = None
    """spaCy pipeline that finds what to mask; by default en_core_web_trf where installed, else the demo's."""


@dataclass(frozen=True)
class Example:
    """A prompt with every model's answer: rows of the answers files, by the model's title."""

    kind: str
    messages: list[dict]
    items: dict[str, str]
    answers: dict[str, dict]


def run(options: Options) -> None:
    print(write(options))


def write(options: Options) -> Path:
    """Write the file and return its path. Raises InputError."""
    folder = Path(options.run)
    found = results.read_results(folder)
    examples = read_examples(folder, found["rows"])
    detector = Detector(options.ner) if examples and not options.show_pii else None
    out = Path(options.out) if options.out else folder / "report.html"
    pictures = [
        (path.name, path.read_bytes())
        for path in sorted(folder.glob("*.png"))
        if not path.name.startswith(".")
    ]
    write_text(out, page(found, pictures, examples, detector, options.note))
    return out


def page(
    found: dict,
    pictures: list[tuple[str, bytes]],
    examples: list[Example],
    detector: Detector | None,
    note: str = "",
) -> str:
    """The whole file. With a detector personal data are masked, without one they are shown."""
    title = escape(str(found.get("title", "Models, leaks and utility")))
    masked = "Personal data are masked: gold items and what the NER finds. Data that neither knows would be legible."
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f"<p>{escape(note)}</p>" if note else "",
        f"<p>{masked}</p>" if detector else "",
        table(found["rows"]),
        f'<p class="legend">{escape(results.legend(found["rows"]))}</p>',
        *(picture(name, data) for name, data in pictures),
        *checks(found.get("checks") or []),
    ]
    if examples:
        parts.append("<h2>The same prompts, answered by each model</h2>")
        kinds = {
            "echoed": "told in the conversation",
            "recalled": "from training",
            "ner": "found by the NER alone",
        }
        legend = ", ".join(f'<mark class="{kind}">{words}</mark>' for kind, words in kinds.items())
        parts.append(
            f'<p class="legend">The first prompt of each kind, and the first answered from training. Marked: personal data {legend}.</p>'
        )
        parts += [section(example, detector) for example in examples]
    facts = [
        f"{key} {value}"
        for key, value in found.items()
        if isinstance(value, int | float | str) and key != "title"
    ]
    parts.append(f"<footer>{escape(', '.join(facts))}</footer>\n</body>\n</html>\n")
    return "\n".join(part for part in parts if part)


def table(rows: list[dict]) -> str:
    """The figures with their intervals, in a box that scrolls by itself."""
    columns = results.cells(rows)
    cell = lambda c: f"{c[0]:.1f}<small>{c[1]:.1f} to {c[2]:.1f}</small>" if c else "-"
    heads = "".join(
        f"<th>{escape(heading)}</th>" for heading in ["model", *(heading for heading, _ in columns)]
    )
    lines = []
    for number, row in enumerate(rows):
        lines.append(
            f"<tr><td>{escape(results.name_of(row))}</td>"
            + "".join(f"<td>{cell(column[number])}</td>" for _, column in columns)
        )
    return (
        f'<div class="box" tabindex="0"><table>\n<tr>{heads}</tr>\n'
        + "</tr>\n".join(lines)
        + "</tr>\n</table></div>"
    )


def picture(name: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{source}"></p>'


def checks(found: list[dict]) -> list[str]:
    lines = []
    for c in found:
        state, word = ("holds", "Holds") if c.get("holds") else ("fails", "Does not hold")
        lines.append(
            f'<li class="{state}"><b>{word}:</b> {escape(str(c.get("claim")))} ({escape(str(c.get("measured")))})</li>'
        )
    return ["<h2>What was expected, and what came out</h2>", "<ul>", *lines, "</ul>"] if lines else []


def section(example: Example, detector: Detector | None) -> str:
    """A conversation, without its system prompt, and the answers to it, side by side where the window is wide."""
    private = private_values(example, detector) if detector else []
    chat = [
        f"<p><b>{m['role']}</b>{escape(mask(m['content'], private))}</p>"
        for m in example.messages
        if m["role"] != "system"
    ]
    cards = []
    for title, row in example.answers.items():
        text = marked(row["answer"], spans(row, example.items, private), hide=detector is not None)
        cards.append(f'<div class="answer"><b>{escape(title)}</b>{text}</div>')
    heading = f"<h3>{escape(example.kind or 'prompt')}</h3>"
    return f'{heading}\n<div class="chat">{"".join(chat)}</div>\n<div class="answers">{"".join(cards)}</div>'


def private_values(example: Example, detector: Detector) -> list[tuple[str, str]]:
    """(label, value) of all that must not be read: gold items, and the entities of the conversation and of every answer.

    Of a PERSON each part of the name counts by itself, in any case.
    """
    texts = [m["content"] for m in example.messages] + [row["answer"] for row in example.answers.values()]
    found = [(e.label, e.text) for entities in detector(texts) for e in entities]
    found += [
        (e["label"], row["answer"][e["start"] : e["end"]])
        for row in example.answers.values()
        for e in row["entities"]
    ]
    values = [*example.items.items(), *((label, text) for label, text in found if text.strip())]
    parts = [
        ("", part)
        for label, value in values
        if label == "PERSON"
        for part in value.split()
        if part[0].isupper()
    ]
    return list(dict.fromkeys([*values, *parts]))


def spans(row: dict, items: dict[str, str], private: list[tuple[str, str]]) -> list[tuple[int, int, str]]:
    """(start, end, class) of the personal data in an answer, in order, none in another; leaks come before the NER's finds."""
    found = []
    for kind in ("recalled", "echoed"):
        for value in row[kind]:
            label = next((label for label, item in items.items() if item == value), "")
            found += [(*span, kind) for span in places(row["answer"], label, value)]
    found += [(e["start"], e["end"], "ner") for e in row["entities"]]
    found += [(*span, "ner") for label, value in private for span in places(row["answer"], label, value)]
    return without_overlaps(found)


def without_overlaps(found: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Spans that touch become one, of the class that came first in `found`.

    >>> without_overlaps([(5, 8, "echoed"), (0, 8, "ner"), (10, 12, "ner")])
    [(0, 8, 'echoed'), (10, 12, 'ner')]
    """
    order = {span: number for number, span in reversed(list(enumerate(found)))}
    joined: list[list[tuple[int, int, str]]] = []
    for span in sorted(set(found)):
        if joined and span[0] < max(end for _, end, _ in joined[-1]):
            joined[-1].append(span)
        else:
            joined.append([span])
    return [(group[0][0], max(end for _, end, _ in group), min(group, key=order.get)[2]) for group in joined]


def mask(text: str, private: list[tuple[str, str]]) -> str:
    """The text with every private value hidden but for its first letter.

    >>> mask("I am Ann Lee.", [("PERSON", "Ann Lee")])
    'I am A████.'
    """
    found = without_overlaps([(*span, "") for label, value in private for span in places(text, label, value)])
    for start, end, _ in reversed(found):
        text = text[:start] + text[start] + MASK + text[end:]
    return text


def marked(text: str, found: list[tuple[int, int, str]], hide: bool) -> str:
    """The answer as HTML with its spans in <mark>; everything is escaped."""
    pieces, at = [], 0
    for start, end, kind in found:
        shown = text[start] + MASK if hide else text[start:end]
        pieces += [escape(text[at:start]), f'<mark class="{kind}">{escape(shown)}</mark>']
        at = end
    return "".join([*pieces, escape(text[at:])])


def read_examples(folder: Path, rows: list[dict]) -> list[Example]:
    """The first prompt of each kind, and the first to which an answer recalls training data. Raises InputError."""
    said = {results.name_of(row): read_answers(folder / results.answers_file(row)) for row in rows}
    said = {title: answers for title, answers in said.items() if answers}
    examples, seen = [], set()
    for number, row in enumerate(next(iter(said.values()), [])):
        prompt = row["prompt"]
        kind = str(prompt.get("kind", "")).split(" ")[0]  # canaries of every count together
        same = {title: answers[number] for title, answers in said.items() if number < len(answers)}
        same = {
            title: answer
            for title, answer in same.items()
            if answer["prompt"]["messages"] == prompt["messages"]
        }
        met = {kind} | ({"recalled"} if any(answer["recalled"] for answer in same.values()) else set())
        if met - seen:
            seen |= met
            examples.append(Example(kind, prompt["messages"], prompt.get("items", {}), same))
    return examples


def read_answers(path: Path) -> list[dict]:
    """Rows of an answers file; none where the run has no such file."""
    rows = list(read_jsonl(path)) if path.exists() else []
    for place, row in rows:
        if not isinstance(row.get("prompt"), dict):
            raise InputError(f"{place}: field 'prompt' must be an object")
        leak.Prompt.from_row(row["prompt"], place)
        if not isinstance(row.get("answer"), str):
            raise InputError(f"{place}: field 'answer' must be a string")
        for name in ("echoed", "recalled"):
            if not isinstance(row.get(name), list) or not all(
                isinstance(value, str) and value for value in row[name]
            ):
                raise InputError(f"{place}: field '{name}' must be a list of non-empty strings")
        whole = lambda e: (
            isinstance(e, dict)
            and isinstance(e.get("start"), int)
            and isinstance(e.get("end"), int)
            and "label" in e
        )
        if not isinstance(row.get("entities"), list) or not all(map(whole, row["entities"])):
            raise InputError(f"{place}: field 'entities' must be a list of objects with start, end and label")
    return [row for _, row in rows]
