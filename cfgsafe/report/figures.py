"""What the figures of reports have in common: axes, error bars, and a file that is written whole.

Run it: python eval.py sweep --help
"""

from io import BytesIO
from pathlib import Path

from cfgsafe.files import write_bytes


def limit_utility(axes, rows: list[dict]) -> None:
    """A utility axis no narrower than ten points, or noise would look like a trend; with room for markers at 100 %."""
    low = max(-2, min(90, *(row["utility_ci"][0] - 2 for row in rows)))
    axes.set_ylim(low, 100 + 0.05 * (100 - low))


def save_figure(fig, path: Path) -> None:
    """Write a matplotlib figure whole, as PNG, and close it."""
    import matplotlib.pyplot as plt

    content = BytesIO()
    fig.savefig(content, format="png", dpi=140, bbox_inches="tight")
    plt.close(fig)
    write_bytes(path, content.getvalue())


def spread(row: dict, key: str) -> list[list[float]]:
    """How far the interval reaches below and above the value, as matplotlib wants it."""
    low, high = row[f"{key}_ci"]
    return [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]
