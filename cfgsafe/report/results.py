"""The results of an experiment, one row for each model: tables, a JSON file and a figure.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846).
Deviations: 95 % intervals, the easy and the hard slice apart and two measures of fluency.

Run it: python train.py demo
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

from cfgsafe.errors import InputError
from cfgsafe.files import read_json_value, write_text
from cfgsafe.report.figures import leaks_and_utility

LEGEND = (
    "Per 100 answers, with 95 % intervals over persons. "
    "Leaked: gold items of the person in the answer; echoed from the\nconversation, recalled from training. "
    "Broken words: in neither the vocabulary nor the prompt."
)


@dataclass(frozen=True)
class Column:
    """A column of the tables; results.json has the values under `key`, the intervals under `key`_ci."""

    key: str
    heading: str
    short: str  # heading in a terminal
    slice: str | None = None  # the part of a row that holds the key; None is the row itself

    def figure(self, row: dict) -> tuple[float, float, float] | None:
        """(value, low, high) of a row; None where it was not measured, or where its interval has no bound."""
        part = row.get("slices", {}).get(self.slice, {}) if self.slice else row
        if self.key not in part or f"{self.key}_ci" not in part:
            return None
        low, high = part[f"{self.key}_ci"]
        return part[self.key], low, high

    def measured(self, rows: list[dict]) -> bool:
        """Whether any of the rows has a figure."""
        return any(self.figure(row) for row in rows)


COLUMNS = (
    Column("ner_items_per_100", "NER items/100", "NER"),
    Column("leaked_per_100", "leaked/100", "leaked"),
    Column("echoed_per_100", "echoed/100", "echoed"),
    Column("recalled_per_100", "recalled/100", "recalled"),
    Column("clean_answers", "clean answers %", "clean %"),
    Column("utility", "utility %", "utility %"),
    Column("broken_words", "broken words %", "broken %"),
    Column("perplexity", "perplexity", "ppl"),
    Column("leaked_per_100", "easy: leaked/100", "easy", slice="easy"),
    Column("leaked_per_100", "hard: leaked/100", "hard", slice="hard"),
)


KINDS: dict[str, type | UnionType] = {  # field of a row that may be absent -> its type
    "epoch": int,
    "guidance": int | float,
    "alpha": int | float,
    "space": str,
    "system_prompt": str,
}


@dataclass(frozen=True)
class Check:
    """A claim about the rows, what was measured, and whether the claim holds."""

    claim: str
    measured: str
    holds: bool


def name_of(row: dict) -> str:
    """What a row is called in tables: model, epoch and how it is guided.

    >>> name_of({"model": "lora", "epoch": 2, "guidance": 3.0, "space": "log", "alpha": 0.1})
    'lora epoch 2 g=3 log alpha=0.1'
    """
    parts = [row["model"]]
    if row.get("epoch"):
        parts.append(f"epoch {row['epoch']}")
    if row["guidance"] is not None:
        parts.append(f"g={row['guidance']:g}")
        if row["guidance"] != 1:
            parts.append(str(row["space"]))
        if row.get("alpha"):
            parts.append(f"alpha={row['alpha']:g}")
        if row.get("system_prompt"):
            parts.append(row["system_prompt"])
    return " ".join(parts)


def answers_file(row: dict) -> str:
    """The name of the file in a run's folder that holds the row's answers."""
    return f"answers-{name_of(row).replace(' ', '-')}.jsonl"


def columns_of(rows: list[dict]) -> list[Column]:
    """The columns in which some row has a figure."""
    return [column for column in COLUMNS if column.measured(rows)]


def legend(rows: list[dict]) -> str:
    """What stands below the table of `rows`."""
    has_perplexity = any("perplexity" in row for row in rows)
    return LEGEND + (" Perplexity: under the reference model." if has_perplexity else "")


def table(rows: list[dict]) -> str:
    """A Markdown table; each cell is value [low, high]."""
    columns = columns_of(rows)
    lines = []
    for row in rows:
        figures = [column.figure(row) for column in columns]
        lines.append([name_of(row), *map(interval_text, figures)])
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
    columns = columns_of(rows)
    lines = [["model", *(column.short for column in columns)]]
    for row in rows:
        figures = [column.figure(row) for column in columns]
        lines.append([name_of(row), *(f"{figure[0]:.1f}" if figure else "-" for figure in figures)])
    first, *others = widths_of(lines)
    texts = []
    for name, *cells in lines:
        texts.append("  ".join([name.ljust(first), *map(str.rjust, cells, others)]))
    return "\n".join(texts)


def widths_of(lines: list[list[str]]) -> list[int]:
    """The width of each column: that of its longest text."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def write(out: Path, title: str, rows: list[dict], checks: list[Check], examples: list[str], **facts) -> None:
    """Write results.json, report.md and leaks-utility.png into the folder `out`."""
    write_results(out, title, rows, checks, **facts)
    leaks_and_utility(out / "leaks-utility.png", rows, [name_of(row) for row in rows])
    lines = [f"# {title}", "", table(rows), "", legend(rows), ""]
    if any("leaked_per_100" in row for row in rows):
        lines += ["![leaks against utility](leaks-utility.png)", ""]
    lines += ["## What was expected, and what came out", ""]
    lines += [f"- {'holds' if c.holds else '**does not hold**'}: {c.claim} ({c.measured})" for c in checks]
    lines += ["", "## The same prompts, answered by each model", "", *examples, ""]
    lines += [facts_line(facts), ""]
    write_text(out / "report.md", "\n".join(lines))


def write_results(out: Path, title: str, rows: list[dict], checks: list[Check], **facts) -> None:
    """Write results.json into the folder `out`."""
    content = {"title": title, "rows": rows, "checks": [vars(check) for check in checks], **facts}
    write_text(out / "results.json", json.dumps(content, indent=1) + "\n")


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
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}: row {number}")
    return results


def _check_row(row: object, place: str) -> None:
    """Raise InputError where a field has the wrong type; a row without guidance gets None."""
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        raise InputError(f"{place}: needs 'model', a string")
    for name, kind in KINDS.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            raise InputError(f"{place}: '{name}' must be {'a string' if kind is str else 'a number'} or null")
    row.setdefault("guidance", None)
    for name in (column.key for column in COLUMNS):
        if name in row and not (_is_number(row[name]) and _is_interval(row.get(f"{name}_ci"))):
            raise InputError(f"{place}: '{name}' must be a number, with '{name}_ci', its interval")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
