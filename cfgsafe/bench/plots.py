"""The figures of the benchmarks, from the rows of their tables.

Run it: python -m cfgsafe.bench guidance --csv guidance.csv --plot     (draws guidance.csv.png)
"""

from pathlib import Path
from typing import Annotated

from cfgsafe.outputs import File
from cfgsafe.report.figures import marker, save_figure, subplots

TableFile = Annotated[str, File(also=("{name}.png",))]  # a CSV file, and its figure
READ = "read_gb_per_second"  # the rate of a large array


def beside(csv_file: str) -> Path:
    """The figure of a CSV file."""
    return Path(f"{csv_file}.png")


def guided_tokens(path: Path, rows: list[dict]) -> None:
    """Two panels for each method: time against pairs, and GB/s against the vocabulary.

    The first is of the largest vocabulary, the second of the most pairs; the bound is dashed.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shape = {"nrows": len(methods), "ncols": 2, "figsize": (11, 3.4 * len(methods))}
    fig, axes = subplots(squeeze=False, **shape)
    largest = max(row["vocabulary"] for row in rows)
    most = max(row["pairs"] for row in rows)
    for method, (left, right) in zip(methods, axes, strict=True):
        of_method = [row for row in rows if row["method"] == method]
        against_pairs = [row for row in of_method if row["vocabulary"] == largest]
        draw(left, against_pairs, "pairs", "p50", "bound")
        left.set(ylabel="us", title=f"{method}, {largest:,} words")
        against_words = [row for row in of_method if row["pairs"] == most]
        draw(right, against_words, "vocabulary", "gb_per_second", READ)
        right.set(ylabel="GB/s", title=f"{method}, {most} pairs")
    axes[0][1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.tight_layout()
    save_figure(fig, path)


def decoding(path: Path, rows: list[dict]) -> None:
    """Two panels: tokens a second, and GB/s of weights, against requests at a time."""
    fig, (left, right) = subplots(ncols=2, figsize=(12, 4.5))
    draw(left, rows, "requests", "tokens_per_second")
    left.set(ylabel="tokens/s after the first", title=f"{rows[0]['shape']}, {rows[0]['dtype']}")
    draw(right, rows, "requests", "gb_per_second", READ)
    right.set(ylabel="GB/s of weights")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(fig, path)


def draw(axes, rows: list[dict], x: str, y: str, bound: str | None = None) -> None:
    """Draw a line for each variant, on logarithmic axes, and a dashed one of the key `bound`."""
    for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        points = sorted((row[x], row[y]) for row in rows if row["variant"] == variant)
        style = {**marker(number, number), "linestyle": "-", "label": variant}
        axes.errorbar(*zip(*points, strict=True), **style)
    if bound:
        points = sorted({(row[x], row[bound]) for row in rows})
        axes.plot(*zip(*points, strict=True), color="black", linestyle="--", label="all read once")
    ticks = sorted({row[x] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel=x)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8, rotation=30)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
