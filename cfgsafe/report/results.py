"""The results of an experiment, one row for each model: tables, a JSON file and a figure.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846).
Deviations: 95 % intervals; every slice of the prompts has its own columns, so that echo and recall stand
apart; option margins and two measures of fluency; the spread between seeds.

Run it: python train.py demo
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import UnionType

from cfgsafe.errors import InputError
from cfgsafe.files import read_json_value, write_text
from cfgsafe.report.figures import leaks_and_utility
from cfgsafe.settings import shown

LEGEND = (
    "With 95 % intervals. No g: the prompts' own system prompt. g=1: the positive sentence added to it, "
    "without guidance.\n"
    "Echoed: items of the conversation in the answer, per 100 conversations that hold one.\n"
    "Recall: items that stand in no conversation, in percent of those asked for.\n"
    "Named: percent of the names that a good answer gives. Cut: answers that reached the length limit."
)
EXTRA = {  # key -> what the legend says of it where it was measured
    "margin": "Margin: log-probability of the right option minus that of the best wrong one, nats per token.",
    "broken_words": "Broken words: in neither the vocabulary nor the prompt.",
    "perplexity": "Perplexity: of the answers, under the reference model.",
    "no_answer": "No answer: numbers that are not finite, or guidance left no token; in no other column.",
}
STAR = "* The rows that the paper has: there every model gets the positive sentence."


@dataclass(frozen=True)
class Column:
    """A column of the tables; results.json has the values under `key`, the intervals under `key`_ci."""

    key: str
    heading: str
    short: str | None  # heading in a terminal; None: not shown there
    slice: str | None = None  # the slice of a row that holds the key; None is the row itself

    def figure(self, row: dict) -> tuple[float, float, float] | None:
        """(value, low, high) of a row; None where it was not measured, or where its interval has no bound."""
        part = row.get("slices", {}).get(self.slice, {}) if self.slice else row
        if self.key not in part or f"{self.key}_ci" not in part:
            return None
        low, high = part.get(f"{self.key}_ci", (math.nan, math.nan))
        return part[self.key], low, high

    def measured(self, rows: list[dict]) -> bool:
        """Whether any of the rows has a figure."""
        return any(self.figure(row) for row in rows)


COLUMNS = (
    Column("echoed_per_100", "echoed/100", "echo"),
    Column("utility", "utility %", "utility"),
    Column("margin", "option margin", "margin"),
    Column("broken_words", "broken words %", "broken"),
    Column("perplexity", "perplexity", "ppl"),
    Column("cut_off", "cut %", "cut"),
    Column("quiz_cut_off", "quiz: cut %", None),
    Column("leaked_per_100", "leaked/100", None),
    Column("ner_items_per_100", "NER items/100", None),
    Column("clean_answers", "clean answers %", None),
    Column("no_answer", "no answer %", "none"),
    Column("quiz_no_answer", "quiz: no answer %", "quiz none"),
)
OF_SLICE = {
    "wanted_named": "named %",
    "echoed_per_100": "echoed/100",
    "recall": "recall %",
}  # the first that is there


KINDS: dict[str, type | UnionType] = {  # field of a row that may be absent -> its type
    "epoch": int,
    "seed": int,
    "guidance": int | float,
    "alpha": int | float,
    "space": str,
    "system_prompt": str,
}


def name_of(row: dict) -> str:
    """What a row is called: model, seed and epoch of its training, and how it is guided.

    >>> name_of({"model": "lora", "epoch": 2, "guidance": 3.0, "space": "log", "alpha": 0.1})
    'lora epoch 2 g=3 log alpha=0.1'
    """
    parts = [row["model"]]
    for name in ("seed", "epoch"):
        if row.get(name) is not None:
            parts.append(f"{name} {row[name]}")
    if row["guidance"] is not None:
        parts.append(f"g={row['guidance']:g}")
        if row["guidance"] != 1:
            parts.append(str(row["space"]))
        if row.get("alpha"):
            parts.append(f"alpha={row['alpha']:g}")
        if row.get("system_prompt"):
            parts.append(row["system_prompt"])
    return " ".join(parts)


def run_files(folder: str) -> list[Path]:
    """The files of a run's folder that tables and reports read."""
    patterns = ("results.json", "answers-*.jsonl", "*.png")
    return [path for pattern in patterns for path in Path(folder).glob(pattern)]


def answers_file(row: dict) -> str:
    """The name of the file in a run's folder that holds the row's answers."""
    return f"answers-{name_of(row).replace(' ', '-')}.jsonl"


def label_of(row: dict) -> str:
    """The row's name in tables, with a star where the paper has such a row."""
    return name_of(row) + (" *" if row.get("paper") else "")


def columns_of(rows: list[dict]) -> list[Column]:
    """The columns in which some row has a figure: `COLUMNS`, and one for each slice behind the first."""
    names: dict[str, dict] = {}  # slice -> its figures in any row, in the order of the file
    for row in rows:
        names |= row.get("slices", {})
    slices = []
    for name, figures in names.items():
        key = next((key for key in OF_SLICE if key in figures), None)
        if key:
            slices.append(Column(key, f"{name}: {OF_SLICE[key]}", name, slice=name))
    return [column for column in (COLUMNS[0], *slices, *COLUMNS[1:]) if column.measured(rows)]


def legend(rows: list[dict]) -> str:
    """What stands below the table of `rows`."""
    lines = [LEGEND, *(text for key, text in EXTRA.items() if any(key in row for row in rows))]
    if any(row.get("paper") for row in rows):
        lines.append(STAR)
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """A Markdown table; each cell is value [low, high]."""
    columns = columns_of(rows)
    lines = []
    for row in rows:
        figures = [column.figure(row) for column in columns]
        lines.append([label_of(row), *map(interval_text, figures)])
    return markdown(["model", *(column.heading for column in columns)], lines)


def interval_text(figure: tuple[float, float, float] | None) -> str:
    """value [low, high], or - where there is none."""
    return "-" if figure is None else "{:.1f} [{:.1f}, {:.1f}]".format(*figure)


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table with columns of equal width."""
    widths = widths_of([heads, *lines])
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in [heads, *lines]]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def terminal_table(rows: list[dict]) -> str:
    """The same figures without intervals, narrow enough for a terminal."""
    columns = [column for column in columns_of(rows) if column.short]
    lines = [["model", *(column.short or "" for column in columns)]]
    for row in rows:
        figures = [column.figure(row) for column in columns]
        lines.append([label_of(row), *(f"{figure[0]:.1f}" if figure else "-" for figure in figures)])
    first, *others = widths_of(lines)
    texts = []
    for name, *cells in lines:
        texts.append("  ".join([name.ljust(first), *map(str.rjust, cells, others)]))
    return "\n".join(texts)


def widths_of(lines: list[list[str]]) -> list[int]:
    """The width of each column: that of its longest text."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def over_seeds(rows: list[dict]) -> list[dict]:
    """For each model and guidance that several seeds trained: {"model", "seeds", heading: [mean, SD]}."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if row.get("seed") is not None:
            groups.setdefault(label_of({**row, "seed": None}), []).append(row)
    spreads = []
    for name, same in groups.items():
        spread: dict = {"model": name, "seeds": len(same)}
        for column in columns_of(same):
            values = [figure[0] for figure in map(column.figure, same) if figure]
            if len(values) > 1:
                spread[column.heading] = [round(mean(values), 4), round(stdev(values), 4)]
        if len(same) > 1:
            spreads.append(spread)
    return spreads


def seeds_table(spreads: list[dict]) -> str:
    """A Markdown table of `over_seeds`; each cell is mean +- standard deviation between seeds."""
    headings = list(dict.fromkeys(key for spread in spreads for key in spread))
    lines = []
    for spread in spreads:
        cells = []
        for heading in headings:
            value = spread.get(heading, "-")
            cells.append("{:.1f} +- {:.1f}".format(*value) if isinstance(value, list) else str(value))
        lines.append(cells)
    return markdown(headings, lines)


def write(
    out: Path,
    title: str,
    rows: list[dict],
    conclusions: list[str],
    examples: list[str],
    panels: Sequence[Column] = COLUMNS[:1],
    **facts,
) -> None:
    """Write results.json, report.md and leaks-utility.png into the folder `out`.

    The figure has a panel for each of the columns `panels`, against utility.
    """
    write_results(out, title, rows, conclusions, **facts)
    drawn = [column for column in panels if column.measured(rows)]
    if drawn:
        leaks_and_utility(out / "leaks-utility.png", rows, list(map(label_of, rows)), drawn)
    lines = [f"# {title}", "", table(rows), "", *legend(rows).split("\n"), ""]
    if spreads := over_seeds(rows):
        lines += ["## Over the seeds of training", "", seeds_table(spreads), ""]
    if drawn:
        lines += ["![leaks against utility](leaks-utility.png)", ""]
    lines += ["## What the controls show", "", *(f"- {sentence}" for sentence in conclusions), ""]
    lines += ["## The same prompts, answered by each model", "", *examples, ""]
    lines += [facts_line(facts), ""]
    write_text(out / "report.md", "\n".join(lines))


def write_results(out: Path, title: str, rows: list[dict], conclusions: list[str], **facts) -> None:
    """Write results.json into the folder `out`."""
    content = {"title": title, "rows": rows, "over_seeds": over_seeds(rows), "conclusions": conclusions}
    write_text(out / "results.json", json.dumps({**content, **facts}, indent=1) + "\n")


def facts_line(facts: dict) -> str:
    """The facts of a run, on the last line of its report."""
    return ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


def read_results(folder: str | Path) -> dict:
    """The results.json of a run's folder. Raises InputError naming the file, the row and the field."""
    path = Path(folder) / "results.json"
    hint = "give the --out folder of a demo run or a sweep"
    results = read_json_value(path, InputError, "cannot be read", hint)
    if not isinstance(results, dict):
        results = {}
    rows = results.get("rows")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: needs 'rows', a list of objects")
    said = results.get("conclusions") or []
    if not isinstance(said, list) or not all(isinstance(sentence, str) for sentence in said):
        raise InputError(f"{path}: 'conclusions' must be a list of sentences")
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}: row {number}")
    return results


def _check_row(row: object, place: str) -> None:
    """Raise InputError where a field has the wrong type; a row without guidance gets None."""
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        raise InputError(f"{place}: needs 'model', a string")
    for name, kind in KINDS.items():
        right = isinstance(row.get(name), kind) and (kind is str or _is_number(row[name]))
        if row.get(name) is not None and not right:
            raise InputError(f"{place}: '{name}' must be {'a string' if kind is str else 'a number'} or null")
    row.setdefault("guidance", None)
    if row["guidance"] not in (None, 1) and row.get("space") is None:
        raise InputError(f"{place}: needs 'space', the formula of its guidance")
    slices = row.get("slices", {})
    if not isinstance(slices, dict) or not all(isinstance(part, dict) for part in slices.values()):
        raise InputError(f"{place}: 'slices' must be an object of slice -> its figures")
    _check_figures(row, place)
    for part, figures in slices.items():
        _check_figures(figures, f"{place}: slice {shown(part)}")


def _check_figures(figures: dict, place: str) -> None:
    """Raise InputError where a figure that has a column is none."""
    for name in (*(column.key for column in COLUMNS), *OF_SLICE):
        value, interval = figures.get(name), figures.get(f"{name}_ci")
        if name in figures and not (_is_number(value) and _is_interval(interval)):
            raise InputError(f"{place}: '{name}' must be a number, with '{name}_ci', its interval")


def _is_number(value: object) -> bool:
    """Whether it is a number that fits into a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
