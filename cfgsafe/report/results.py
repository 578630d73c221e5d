"""The report of an experiment: one row a model as a terminal and Markdown table, a JSON file and a figure.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846), with intervals, the easy and the hard slice apart, and two measures of
fluency.

Run it: python train.py demo
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.errors import InputError
from cfgsafe.files import write_text
from cfgsafe.report.figures import limit_utility, save_figure, spread

# column -> heading; the keys stand in results.json, each with its `_ci`
COLUMNS = {
    "ner_items_per_100": "NER items/100",
    "leaked_per_100": "leaked/100",
    "echoed_per_100": "echoed/100",
    "recalled_per_100": "recalled/100",
    "clean_answers": "clean answers %",
    "utility": "utility %",
    "broken_words": "broken words %",
    "perplexity": "perplexity",
}
# heading -> its short form in a terminal
SHORT = {
    "NER items/100": "NER",
    "leaked/100": "leaked",
    "echoed/100": "echoed",
    "recalled/100": "recalled",
    "clean answers %": "clean %",
    "utility %": "utility %",
    "broken words %": "broken %",
    "perplexity": "ppl",
    "easy: leaked/100": "easy",
    "hard: leaked/100": "hard",
}
LEGEND = (
    "Per 100 answers, with 95 % bootstrap intervals over prompts. Leaked: gold items of the person in the answer; echoed from the\n"
    "conversation, recalled from training. Broken words: in neither the vocabulary nor the prompt."
)


@dataclass(frozen=True)
class Check:
    """A claim about the rows, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool


def name_of(row: dict) -> str:
    """What a row is called in tables: model, epoch and how it is guided."""
    name = row["model"] + (f" epoch {row['epoch']}" if row.get("epoch") else "")
    if row["guidance"] is None:
        return name
    alpha = f" alpha={row['alpha']:g}" if row.get("alpha") else ""
    return f"{name} g={row['guidance']:g}" + (f" {row['space']}" if row["guidance"] != 1 else "") + alpha


def answers_file(row: dict) -> str:
    """The file of a run's folder that holds the row's answers."""
    return f"answers-{name_of(row).replace(' ', '-')}.jsonl"


def cells(rows: list[dict]) -> list[tuple[str, list[tuple[float, float, float] | None]]]:
    """(heading, (value, low, high) of each row) of each column that some row has; the last split the leaks by slice."""
    columns = [(heading, rows, key) for key, heading in COLUMNS.items()]
    columns += [
        (f"{part}: leaked/100", [row.get(part, {}) for row in rows], "leaked_per_100")
        for part in ("easy", "hard")
    ]
    known = [
        (heading, places, key) for heading, places, key in columns if any(key in place for place in places)
    ]
    return [
        (heading, [(p[key], *p[f"{key}_ci"]) if key in p else None for p in places])
        for heading, places, key in known
    ]


def legend(rows: list[dict]) -> str:
    """What stands below the table of `rows`."""
    return LEGEND + (
        " Perplexity: under the reference model." if any("perplexity" in row for row in rows) else ""
    )


def table(rows: list[dict]) -> str:
    """A Markdown table: value [low, high] a cell."""
    columns = cells(rows)
    text = lambda cell: f"{cell[0]:.1f} [{cell[1]:.1f}, {cell[2]:.1f}]" if cell else "-"
    lines = [
        [name_of(row), *(text(column[number]) for _, column in columns)] for number, row in enumerate(rows)
    ]
    return markdown(["model", *(heading for heading, _ in columns)], lines)


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    texts = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in [heads, *lines]
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])


def terminal_table(rows: list[dict]) -> str:
    """The same figures without intervals, narrow enough for a terminal."""
    columns = [(SHORT[heading], column) for heading, column in cells(rows)]
    lines = [["model", *(heading for heading, _ in columns)]]
    for number, row in enumerate(rows):
        lines.append(
            [name_of(row), *(f"{column[number][0]:.1f}" if column[number] else "-" for _, column in columns)]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if n == 0 else text.rjust(w)
            for n, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def write(out: Path, title: str, rows: list[dict], checks: list[Check], examples: list[str], **facts) -> None:
    """results.json, report.md and leaks-utility.png in `out`."""
    write_text(
        out / "results.json",
        json.dumps({"title": title, "rows": rows, "checks": [vars(c) for c in checks], **facts}, indent=1)
        + "\n",
    )
    figure(out / "leaks-utility.png", rows)
    lines = [f"# {title}", "", table(rows), "", legend(rows), ""]
    lines += [
        "![leaks against utility](leaks-utility.png)",
        "",
        "## What was expected, and what came out",
        "",
    ]
    lines += [f"- {'holds' if c.holds else '**does not hold**'}: {c.claim} ({c.measured})" for c in checks]
    lines += ["", "## The same prompts, answered by each model", "", *examples, ""]
    lines += [", ".join(f"{key} {value}" for key, value in facts.items()) + ".", ""]
    write_text(out / "report.md", "\n".join(lines))


def figure(path: Path, rows: list[dict]) -> None:
    """Leaks per 100 answers against utility, one point a model, with both intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(8, 5))
    for number, row in enumerate(rows):
        style = {
            "fmt": "osDv^<>PX*"[number % 10],
            "color": f"C{number % 10}",
            "capsize": 3,
            "label": name_of(row),
        }
        x, y = "leaked_per_100", "utility"
        axes.errorbar(row[x], row[y], xerr=spread(row, x), yerr=spread(row, y), **style)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    limit_utility(axes, rows)
    axes.set_xlabel("personal items leaked per 100 answers (symmetric log)")
    axes.set_ylabel("utility, %")
    axes.grid(alpha=0.3)
    points, names = axes.get_legend_handles_labels()
    axes.legend(
        [point for point, *_ in points], names, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    save_figure(fig, path)


def read_results(folder: str | Path) -> dict:
    """The results.json of a run's folder. Raises InputError naming the file, the row and the field."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the --out folder of a demo run or a sweep"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: needs 'rows', a list of objects")
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}: row {number}")
    return results


def _check_row(row: object, place: str) -> None:
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        raise InputError(f"{place}: needs 'model', a string")
    for name, kind in (("epoch", int), ("guidance", int | float), ("alpha", int | float), ("space", str)):
        if row.get(name) is not None and not isinstance(row[name], kind):
            raise InputError(f"{place}: '{name}' must be {'a string' if kind is str else 'a number'} or null")
    row.setdefault("guidance", None)
    for name in COLUMNS:
        interval = row.get(f"{name}_ci")
        if name in row and not (
            number(row[name])
            and isinstance(interval, list)
            and len(interval) == 2
            and all(map(number, interval))
        ):
            raise InputError(f"{place}: '{name}' must be a number, with '{name}_ci', its interval")
