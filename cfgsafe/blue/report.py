"""The report of an experiment: one row a model as a terminal and Markdown table, a JSON file and a figure.

Source: the columns of Smirnov's Tables 1 and 2 (arXiv 2412.06846), with intervals, the easy and the hard slice apart, and two measures of
fluency.

Run it: python train.py demo
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.errors import write_text

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


@dataclass(frozen=True)
class Check:
    """A claim about the rows, what was measured, and whether it holds."""

    claim: str
    measured: str
    holds: bool


def name_of(row: dict) -> str:
    name = row["model"] + (f" epoch {row['epoch']}" if row.get("epoch") else "")
    if row["guidance"] is None:
        return name
    return f"{name} g={row['guidance']:g}" + (f" {row['space']}" if row["guidance"] != 1 else "")


def table(rows: list[dict]) -> str:
    """A Markdown table: value [low, high] a cell; the last two columns split the leaks by slice."""
    cell = lambda row, key: f"{row[key]:.1f} [{row[f'{key}_ci'][0]:.1f}, {row[f'{key}_ci'][1]:.1f}]"
    lines = [["model", *COLUMNS.values(), "easy: leaked/100", "hard: leaked/100"]]
    for row in rows:
        lines.append(
            [name_of(row), *(cell(row, key) for key in COLUMNS), *(cell(row[part], "leaked_per_100") for part in ("easy", "hard"))]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])


def terminal_table(rows: list[dict]) -> str:
    """The same figures without intervals, narrow enough for a terminal."""
    heads = ["model", "NER", "leaked", "easy", "hard", "echoed", "recalled", "clean %", "utility %", "broken %", "ppl"]
    lines = [heads]
    for row in rows:
        values = [
            row["ner_items_per_100"],
            row["leaked_per_100"],
            row["easy"]["leaked_per_100"],
            row["hard"]["leaked_per_100"],
            row["echoed_per_100"],
        ]
        values += [row["recalled_per_100"], row["clean_answers"], row["utility"], row["broken_words"], row["perplexity"]]
        lines.append([name_of(row), *(f"{value:.1f}" for value in values)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def write(out: Path, title: str, rows: list[dict], checks: list[Check], examples: list[str], **facts) -> None:
    """results.json, report.md and leaks-utility.png in `out`."""
    write_text(out / "results.json", json.dumps({"rows": rows, "checks": [vars(c) for c in checks], **facts}, indent=1) + "\n")
    figure(out / "leaks-utility.png", rows)
    lines = [f"# {title}", "", table(rows), ""]
    lines += [
        "Per 100 answers, with 95 % bootstrap intervals over prompts. *leaked*: gold items of the person in the answer; *echoed* from the"
    ]
    lines += [
        "conversation, *recalled* from training. *broken words*: in neither the corpus nor the prompt. *perplexity*: under the base model.",
        "",
    ]
    lines += ["![leaks against utility](leaks-utility.png)", "", "## What was expected, and what came out", ""]
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
        style = {"fmt": "osDv^<>PX*"[number % 10], "color": f"C{number % 10}", "capsize": 3, "label": name_of(row)}
        x, y = "leaked_per_100", "utility"
        axes.errorbar(row[x], row[y], xerr=_spread(row, x), yerr=_spread(row, y), **style)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(min(90, *(row["utility_ci"][0] - 2 for row in rows)), 101)  # no narrower than ten points, or noise looks like a trend
    axes.set_xlabel("personal items leaked per 100 answers (symmetric log)")
    axes.set_ylabel("utility, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    fig.savefig(temporary, dpi=140, bbox_inches="tight")
    plt.close(fig)
    temporary.replace(path)


def _spread(row: dict, key: str) -> list[list[float]]:
    """How far the interval reaches below and above the value, as matplotlib wants it."""
    low, high = row[f"{key}_ci"]
    return [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]
