"""The figures of reports, and what they share: axes, error bars, and a file that is written whole.

`leaks_and_utility` draws a point for each model; `over_guidance` a line for each model, space and
mask.

Run it: python eval.py sweep --help
"""

from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np

from cfgsafe.files import write_bytes

MARKERS = "osDv^<>PX*"
# key of a row in results.json -> label of its axis
PANELS = {
    "leaked_per_100": "leaks per 100 answers",
    "utility": "utility, %",
    "broken_words": "broken words, %",
}


def leaks_and_utility(path: Path, rows: list[dict], names: list[str]) -> None:
    """Draw leaks per 100 answers against utility, one point for each row; `names` are the legend.

    Rows without both figures are left out; if none has them, there is no file.
    """
    x, y = "leaked_per_100", "utility"
    names = [name for name, row in zip(names, rows, strict=True) if x in row and y in row]
    rows = [row for row in rows if x in row and y in row]
    if not rows:
        return
    fig, axes = subplots(figsize=(8, 5))
    points = []
    for number, row in enumerate(rows):
        spreads = {"xerr": spread(row, x), "yerr": spread(row, y)}
        drawn = axes.errorbar(row[x], row[y], **spreads, **marker(number))
        points.append(drawn.lines[0])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    limit_utility(axes, rows)
    axes.set_xlabel("personal items leaked per 100 answers (symmetric log)")
    axes.set_ylabel("utility, %")
    axes.grid(alpha=0.3)
    axes.legend(points, names, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
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
            panel.errorbar(x, y, yerr=spreads, **marker(number), **style)
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


def marker(number: int) -> dict:
    """Shape, colour and caps of the error bars of the number-th model; ten differ."""
    return {"fmt": MARKERS[number % 10], "color": f"C{number % 10}", "capsize": 3}


def limit_utility(axes, rows: list[dict]) -> None:
    """Show at least ten points, or noise would look like a trend; leave room for markers at 100 %."""
    low = max(-2, min(90, *(row["utility_ci"][0] - 2 for row in rows)))
    axes.set_ylim(low, 100 + 0.05 * (100 - low))


def spread(row: dict, key: str) -> list[list[float]]:
    """How far the interval reaches from the value, in matplotlib's form: [[below], [above]]."""
    low, high = row[f"{key}_ci"]
    return [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]


def save_figure(fig, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    fig.savefig(content, format="png", dpi=140, bbox_inches="tight")
    plt.close(fig)
    write_bytes(path, content.getvalue())
