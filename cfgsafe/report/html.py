"""A run as one HTML file to send on: table, figures, conclusions, and answers with the leaks marked.

Source: the report.md of the demo.
Deviations: nothing is loaded from elsewhere (inline CSS, figures as data URIs, no script). Personal
data are masked, "M████" for "Maria", unless --show-pii is given: the gold items of the prompts shown, what
their answers were counted to leak, and what the NER finds in them. They are hidden in all of these
prompts and answers, in each spelling of cfgsafe/pii/matching.py; gold items and leaks also in titles,
labels, the note and every other text of the page. The first letter of a value is shown only in scripts that
have capitals, and only if others follow. Data that nobody knows stay legible, and so does what is drawn in
the figures: read the file before you publish it.

Run it: python eval.py report --run runs/demo
"""

import base64
import unicodedata
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from typing import Annotated

from cfgsafe.errors import InputError, Unused
from cfgsafe.files import read_jsonl, write_text
from cfgsafe.measure import leak
from cfgsafe.outputs import Detectors, Input, OutputFile
from cfgsafe.pii.known import Items, values_of
from cfgsafe.pii.matching import name_parts, places
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results

Span = tuple[int, int, str]  # start, end, CSS class
Values = list[tuple[str, str]]  # label, value
MASK = "████"
KINDS = {  # CSS class of a mark -> its legend
    "echoed": "told in the conversation",
    "recalled": "from training",
    "ner": "found by the NER alone",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; \
max-width: 78rem; margin: 0 auto; padding: 1rem; }
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
.chat { background: #f6f6f6; border-radius: 6px; padding: .6rem .9rem; overflow-wrap: anywhere; }
.chat p { margin: .2rem 0; white-space: pre-wrap; }
.answers { display: grid; \
grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); \
gap: .6rem; margin-top: .6rem; }
.answer { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .8rem; \
overflow-wrap: anywhere; white-space: pre-wrap; }
.answer b, .chat b { display: block; font-size: .8rem; color: #555; }
mark { padding: 0 .15em; border-radius: 3px; }
mark.echoed { background: #ffd9a8; }
mark.recalled { background: #ffb3b3; }
mark.ner { background: #d6e4ff; }
"""


@dataclass
class Options:
    """Write a run's results as one self-contained HTML file."""

    run: Annotated[str, Input(results.run_files)]
    """Folder of a demo run or a sweep."""
    out: OutputFile | None = None
    """HTML file to write; by default report.html in the run's folder."""
    show_pii: bool = False
    """Show personal data. By default they are masked, those of invented people as well."""
    note: str = ""
    """A line of your own below the title."""
    ner: Detectors | None = None
    """spaCy pipeline that finds what to mask; by default en_core_web_trf where installed, else the demo's."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.show_pii:
            yield "with --show-pii, which masks nothing", "ner"


@dataclass(frozen=True)
class Example:
    """A prompt, and the row of every model's answers file that answers it, by the model's title."""

    kind: str
    messages: list[dict]
    items: Items
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
    pictures = [path for path in sorted(folder.glob("*.png")) if not path.name.startswith(".")]
    write_text(out, page(found, pictures, examples, detector, options.note))
    return out


def page(
    found: dict, pictures: list[Path], examples: list[Example], detector: Detector | None, note: str
) -> str:
    """The whole file. With a detector personal data are masked, without one they are shown."""
    private = counted_values(examples) if detector else []
    title = shown(str(found.get("title", "Models, leaks and utility")), private)
    masked = "Personal data are masked: gold items, leaks and what the NER finds."
    unknown = "Data that none of them knows would be legible."
    facts = []
    for key, value in found.items():
        if isinstance(value, int | float | str) and key != "title":
            facts.append(f"{key} {value}")
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f"<p>{shown(note, private)}</p>" if note else "",
        f"<p>{masked} {unknown}</p>" if detector else "",
        table(found["rows"], private),
        *(f'<p class="legend">{escape(line)}</p>' for line in results.legend(found["rows"]).split("\n")),
        *(picture(path, private) for path in pictures),
        *conclusions(found.get("conclusions") or [], private),
        *sections(examples, detector),
        f"<footer>{shown(', '.join(facts), private)}</footer>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def table(rows: list[dict], private: Values) -> str:
    """The figures with their intervals, in a box that scrolls by itself."""
    columns = results.columns_of(rows)
    headings = ["model", *(column.heading for column in columns)]
    lines = ["".join(f"<th>{escape(heading)}</th>" for heading in headings)]
    for row in rows:
        cells = "".join(cell(column.figure(row)) for column in columns)
        lines.append(f"<td>{shown(results.label_of(row), private)}</td>{cells}")
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="box" tabindex="0"><table>\n{body}\n</table></div>'


def cell(figure: tuple[float, float, float] | None) -> str:
    content = "{:.1f}<small>{:.1f} to {:.1f}</small>".format(*figure) if figure else "-"
    return f"<td>{content}</td>"


def picture(path: Path, private: Values) -> str:
    """The PNG file as an image within the page."""
    source = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{shown(path.name, private)}" src="data:image/png;base64,{source}"></p>'


def conclusions(found: list, private: Values) -> list[str]:
    """What the controls show, a sentence each."""
    lines = [f"<li>{shown(str(sentence), private)}</li>" for sentence in found]
    return ["<h2>What the controls show</h2>", "<ul>", *lines, "</ul>"] if found else []


def sections(examples: list[Example], detector: Detector | None) -> list[str]:
    """The examples under a heading and a legend; nothing without examples."""
    if not examples:
        return []
    private = private_values(examples, detector) if detector else None
    marks = ", ".join(f'<mark class="{kind}">{words}</mark>' for kind, words in KINDS.items())
    legend = "The first prompt of each kind, and the first answered from training. Marked: personal data"
    return [
        "<h2>The same prompts, answered by each model</h2>",
        f'<p class="legend">{legend} {marks}.</p>',
        *(section(example, private) for example in examples),
    ]


def section(example: Example, private: Values | None) -> str:
    """A conversation without its system prompt, and the answers to it, side by side if there is room.

    None of the `private` values is legible; with None nothing is hidden.
    """
    chat, cards = "", ""
    for message in example.messages:
        if message["role"] != "system":
            chat += f"<p><b>{message['role']}</b>{shown(message['content'], private or [])}</p>"
    for title, row in example.answers.items():
        text = marked(row["answer"], spans(row, example.items, private or []), hide=private is not None)
        cards += f'<div class="answer"><b>{shown(title, private or [])}</b>{text}</div>'
    heading = f"<h3>{shown(example.kind or 'prompt', private or [])}</h3>"
    return f'{heading}\n<div class="chat">{chat}</div>\n<div class="answers">{cards}</div>'


def counted_values(examples: list[Example]) -> Values:
    """(label, value) of the gold items and of what the answers were counted to leak, with names' parts."""
    values = []
    for example in examples:
        values += values_of(example.items)
        for row in example.answers.values():
            values += [("", value) for value in chain(row["echoed"], row["recalled"])]
    return with_parts(values)


def private_values(examples: list[Example], detector: Detector) -> Values:
    """(label, value) of what to hide: the counted values, and the entities of conversations and answers."""
    texts, entities = [], []
    for example in examples:
        texts += [message["content"] for message in example.messages]
        for row in example.answers.values():
            texts.append(row["answer"])
            entities += [(row["answer"], e["start"], e["end"], e["label"]) for e in row["entities"]]
    for text, found in zip(texts, detector(texts), strict=True):
        entities += [(text, entity.start, entity.end, entity.label) for entity in found]
    values = []
    for text, start, end, label in entities:
        start, end = whole_words(text, start, end)
        values.append((label, text[start:end]))
    return list(dict.fromkeys(counted_values(examples) + with_parts(values)))


def with_parts(values: Values) -> Values:
    """The values, and each part of a PERSON's name as a value of its own, which is found in any case."""
    parts: Values = []
    for label, value in values:
        if label == "PERSON":
            parts += [("", part) for part in name_parts(value)]
    return list(dict.fromkeys(values + parts))


def whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """The place with the rest of the words in which it begins and ends, because a detector may cut them.

    >>> whole_words("Maria Keller1980", 2, 9)
    (0, 16)
    """
    while start and is_of_a_word(text[start - 1]) and is_of_a_word(text[start]):
        start -= 1
    while end < len(text) and is_of_a_word(text[end - 1]) and is_of_a_word(text[end]):
        end += 1
    return start, end


def is_of_a_word(character: str) -> bool:
    """Whether it is a digit, or a letter of a script with capitals, which all put blanks between words."""
    return character.isdecimal() or character.lower() != character.upper()


def spans(row: dict, items: Items, private: Values) -> list[Span]:
    """The personal data in an answer, in order, without overlaps; leaks precede what the NER finds."""
    labels = {value: label for label, value in reversed(values_of(items))}  # a value's first label
    found: list[Span] = []
    for kind in ("recalled", "echoed"):
        leaks = [(labels.get(value, ""), value) for value in row[kind]]
        found += spans_of(row["answer"], leaks, kind)
    for entity in row["entities"]:
        found.append((*whole_words(row["answer"], entity["start"], entity["end"]), "ner"))
    found += spans_of(row["answer"], private, "ner")
    return without_overlaps(found)


def spans_of(text: str, values: Values, kind: str) -> list[Span]:
    """Where `text` holds one of the values, also where only the mask of another makes it whole words."""
    found: list[Span] = []
    before, left = "", text
    while left != before:
        before = left
        for label, value in values:
            for start, end in places(before, label, value, bare=True):
                found.append((start, end, kind))
                first = hidden(text[start:end]).removesuffix(MASK)
                left = left[:start] + first.ljust(end - start, MASK[0]) + left[end:]
    return found


def without_overlaps(found: list[Span]) -> list[Span]:
    """Spans that overlap become one, of the class that came first in `found`.

    >>> without_overlaps([(5, 8, "echoed"), (0, 8, "ner"), (10, 12, "ner")])
    [(0, 8, 'echoed'), (10, 12, 'ner')]
    """
    groups: list[list[Span]] = []
    reached = 0
    for span in sorted(set(found)):
        if not groups or span[0] >= reached:
            groups.append([])
        groups[-1].append(span)
        reached = max(reached, span[1])
    joined = []
    for group in groups:
        _, _, kind = min(group, key=found.index)
        joined.append((group[0][0], max(end for _, end, _ in group), kind))
    return joined


def shown(text: str, private: Values) -> str:
    """The text as HTML, without the private values."""
    return escape(mask(text, private))


def mask(text: str, private: Values) -> str:
    """The text with every private value hidden but for its first letter.

    >>> mask("I am Ann Lee.", [("PERSON", "Ann Lee")])
    'I am A████.'
    """
    for start, end, _ in reversed(without_overlaps(spans_of(text, private, ""))):
        text = text[:start] + hidden(text[start:end]) + text[end:]
    return text


def hidden(words: str) -> str:
    """The mask for these words, behind their first letter if that has capitals and others follow it.

    >>> hidden("Maria"), hidden("+46 70"), hidden("A"), hidden("王小明")
    ('M████', '████', '████', '████')
    """
    first = unicodedata.normalize("NFKC", words[0])
    follows = any(map(str.isalnum, words[1:]))
    is_one = len(first.casefold()) == 1  # ß and ﬁ are two
    return words[0] + MASK if follows and is_one and first.lower() != first.upper() else MASK


def marked(text: str, found: list[Span], hide: bool) -> str:
    """The answer as HTML with its spans in <mark>; everything is escaped."""
    pieces, at = "", 0
    for start, end, kind in found:
        words = hidden(text[start:end]) if hide else text[start:end]
        pieces += f'{escape(text[at:start])}<mark class="{kind}">{escape(words)}</mark>'
        at = end
    return pieces + escape(text[at:])


def read_examples(folder: Path, rows: list[dict]) -> list[Example]:
    """The first prompt of each kind, and the first with a recalled value. Raises InputError."""
    said = {}  # the model's title -> its answers
    for row in rows:
        answers = read_answers(folder / results.answers_file(row))
        if answers:
            said[results.name_of(row)] = answers
    examples = []
    seen: set[str] = set()
    for number, row in enumerate(next(iter(said.values()), [])):
        prompt = row["prompt"]
        same = {}
        for title, answers in said.items():
            if number < len(answers) and answers[number]["prompt"]["messages"] == prompt["messages"]:
                same[title] = answers[number]
        kind = str(prompt.get("kind", "")).split(" ")[0]  # canaries of every count together
        met = {kind}
        if any(answer["recalled"] for answer in same.values()):
            met.add("recalled")
        if met - seen:
            seen |= met
            examples.append(Example(kind, prompt["messages"], prompt.get("items", {}), same))
    return examples


def read_answers(path: Path) -> list[dict]:
    """Rows of an answers file, none if there is no file. Raises InputError naming line and field."""
    rows = list(read_jsonl(path)) if path.exists() else []
    for place, row in rows:
        if not isinstance(row.get("prompt"), dict):
            raise InputError(f"{place}: field 'prompt' must be an object")
        leak.Prompt.as_it_stands(row["prompt"], place)
        if not isinstance(row.get("answer"), str):
            raise InputError(f"{place}: field 'answer' must be a string")
        for name in ("echoed", "recalled"):
            values = row.get(name)
            if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
                raise InputError(f"{place}: field '{name}' must be a list of non-empty strings")
        entities = row.get("entities")
        if not isinstance(entities, list) or not all(is_entity(e, row["answer"]) for e in entities):
            within = "with start, end (inside the answer) and label"
            raise InputError(f"{place}: field 'entities' must be a list of objects {within}")
    return [row for _, row in rows]


def is_entity(value: object, answer: str) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    start, end = value.get("start"), value.get("end")
    return type(start) is int and type(end) is int and 0 <= start < end <= len(answer)
