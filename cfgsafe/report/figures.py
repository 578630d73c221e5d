"""The figures of reports, and what they share: axes, error bars, and a file that is written whole.

`leaks_and_utility` draws a point for each model; `over_guidance` a line for each model, space and
mask.

Run it: python eval.py sweep --help
"""

from collections.abc import Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from cfgsafe.files import write_bytes

MARKERS = "osDv^<>PX*"
# key of a row in results.json -> label of its axis
PANELS = {
    "leaked_per_100": "leaks per 100 answers",
    "utility": "utility, %",
    "broken_words": "broken words, %",
}


class Figures(Protocol):
    """A column of `results.COLUMNS`: what it is called, and (value, low, high) of a row."""

    @property
    def heading(self) -> str: ...

    def figure(self, row: dict) -> tuple[float, float, float] | None: ...


def leaks_and_utility(path: Path, rows: list[dict], names: list[str], columns: Sequence[Figures]) -> None:
    """Draw the figure of each column against utility, one point for each row; `names` are the legend.

    The shape of a point says which model it is, its colour how the model is guided.
    Rows without a column's figure are left out of its panel.
    """
    fig, panels = subplots(ncols=len(columns), figsize=(3 + 5 * len(columns), 5), sharey=True, squeeze=False)
    models = list(dict.fromkeys(row["model"] for row in rows))
    settings = list(dict.fromkeys((row["guidance"], row.get("space")) for row in rows))
    points: dict[str, object] = {}
    for axes, column in zip(panels[0], columns, strict=True):
        for row, name in zip(rows, names, strict=True):
            figure = column.figure(row)
            if figure:
                colour = settings.index((row["guidance"], row.get("space")))
                style = marker(models.index(row["model"]), colour)
                spreads = {"xerr": reach(*figure), "yerr": spread(row, "utility")}
                points[name] = axes.errorbar(figure[0], row["utility"], **spreads, **style).lines[0]
        axes.set_xlabel(column.heading)
        if "%" not in column.heading:
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=-0.2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(f"{column.heading} (symmetric log)")
        limit_utility(axes, rows)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("utility, %")
    legend = {"fontsize": 7, "loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    panels[0][-1].legend(points.values(), points.keys(), **legend)
    save_figure(fig, path)


def over_guidance(path: Path, rows: list[dict]) -> None:
    """Draw leaks, utility and broken words over g, a line for each curve; without curves, no file.

    Only figures that each row has are drawn.
    """
    lines = curves(rows)
    drawn = list(chain.from_iterable(lines.values()))
    keys = [key for key in PANELS if all(key in row for row in drawn)]
    if not lines or not keys:
        return
    fig, axes = subplots(nrows=len(keys), figsize=(7.5, 3 * len(keys)), sharex=True, squeeze=False)
    axes = axes[:, 0]
    for panel, key in zip(axes, keys, strict=True):
        for number, (label, line) in enumerate(lines.items()):
            # Curves stand a little apart, or the intervals at one g would hide each other.
            shift = 1 + 0.012 * (number - (len(lines) - 1) / 2)
            x = [row["guidance"] * shift for row in line]
            y = [row[key] for row in line]
            spreads = np.hstack([spread(row, key) for row in line])
            dashes = "--" if "alpha" in label else "-"
            style = {"markersize": 5, "linewidth": 1.2, "linestyle": dashes, "label": label}
            panel.errorbar(x, y, yerr=spreads, **marker(number, number), **style)
        panel.set_ylabel(PANELS[key])
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=-0.05 * panel.get_ylim()[1])  # room for markers at 0
    if "utility" in keys:
        limit_utility(axes[keys.index("utility")], drawn)
    ticks = sorted({row["guidance"] for row in drawn})
    if min(ticks) > 0:
        axes[-1].set_xscale("log")
    axes[-1].set_xticks(ticks, [f"{g:g}" for g in ticks])
    axes[-1].set_xticks([], minor=True)
    axes[-1].set_xlabel("guidance coefficient g")
    axes[0].legend(fontsize=8, loc="upper right")
    save_figure(fig, path)


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Label -> rows in order of g, for each model, epoch, space and alpha; the row of g = 1 is first."""
    starts = [row for row in rows if row["guidance"] == 1]
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["guidance"] in (None, 1):
            continue
        label = row["model"]
        if row["epoch"]:
            label += f" epoch {row['epoch']}"
        label += f", {row['space']}"
        if row.get("alpha"):
            label += f", alpha {row['alpha']:g}"
        if label not in found:
            model = (row["model"], row["epoch"])
            found[label] = [start for start in starts if (start["model"], start["epoch"]) == model]
        found[label].append(row)
    if not found:
        return {row["model"]: [row] for row in starts}
    return {label: sorted(line, key=lambda row: row["guidance"]) for label, line in found.items()}


def subplots(**options):
    """A figure and its axes, drawn without a display; `options` are those of `pyplot.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(**options)


def marker(shape: int, colour: int) -> dict:
    """Shape, colour and caps of error bars; ten of each differ."""
    return {"fmt": MARKERS[shape % 10], "color": f"C{colour % 10}", "capsize": 3, "elinewidth": 1}


def limit_utility(axes, rows: list[dict]) -> None:
    """Show the range of the values and a little more, at least ten points, or noise would look like a trend.

    Intervals may reach beyond; markers at 100 % are drawn whole.
    """
    values = [row["utility"] for row in rows]
    low, high = min(values) - 2, max(values) + 2
    missing = max(0.0, 10 - (high - low)) / 2
    top = min(102.0, high + missing)
    bottom = max(-2.0, min(low - missing, top - 10))
    axes.set_ylim(bottom, max(top, bottom + 10))


def spread(row: dict, key: str) -> list[list[float]]:
    """How far the row's interval reaches from its value, in matplotlib's form: [[below], [above]]."""
    return reach(row[key], *row[f"{key}_ci"])


def reach(value: float, low: float, high: float) -> list[list[float]]:
    """[[below], [above]] of an interval; 0 where it has no bound."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def save_figure(fig, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    fig.savefig(content, format="png", dpi=140, bbox_inches="tight")
    plt.close(fig)
    write_bytes(path, content.getvalue())
