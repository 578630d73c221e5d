"""What the benchmarks of a GPU should reach, and what the CSV files of a run say of it.

Sources: FlashInfer publishes its draws from ready probabilities on an H100, for 128 rows; ours are
of 128 pairs, guidance included. gpt-fast publishes its share of an A100's bandwidth by the data
sheet; ours is of the bandwidth that was measured. The other goals are our own.

Run it: python -m cfgsafe.bench gpu
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.bench.decode import CUDA_GRAPH, PROBABILITY_SPACE
from cfgsafe.bench.orpo import SHARED

COLUMNS = {"goal": "{goal}", "bound": "{bound}", "measured": "{measured}"}
COLUMNS |= {"verdict": "{verdict}", "of": "{source}"}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """A bound of a figure; the row that is farthest from it counts."""

    name: str
    source: str
    file: str  # the CSV file that has the figure
    where: dict[str, str]  # column -> its value in the rows that the goal is about
    column: str
    bound: float
    least: bool = False  # the bound is the least that the figure should be, not the most


def guided(file: str, name: str, variant: str) -> Goal:
    """A goal of guided decoding against our own unguided."""
    source, where = "a pair reads the weights once", {"variant": variant}
    return Goal(f"{name} / unguided", source, file, where, "of_unguided", 0.95, least=True)


def kernel(file: str, method: str, vocabulary: int, pairs: int) -> dict:
    """Where a figure of the kernel is."""
    sizes = {"vocabulary": str(vocabulary), "pairs": str(pairs)}
    return {"file": file, "where": {"variant": "kernel", "method": method, **sizes}}


GOALS = (
    guided("decode-8b", "8B, guided", CUDA_GRAPH),
    guided("decode-8b", "8B, guided in probability space", PROBABILITY_SPACE),
    guided("decode-1b", "1B, guided", CUDA_GRAPH),
    Goal(
        "8B, guided, 1 request: share of the read bandwidth",
        "gpt-fast, A100",
        "decode-8b",
        {"variant": CUDA_GRAPH, "requests": "1"},
        "share_of_read",
        0.69,
        least=True,
    ),
    Goal(
        "kernel, greedy, V 128,256, 32 pairs: one read / time",
        "the second read is of 16 MB in the cache",
        **kernel("guidance", "greedy", 128256, 32),
        column="share_of_read",
        bound=0.5,
        least=True,
    ),
    Goal(
        "kernel, top-p, V 131,072, 128 pairs: us",
        "FlashInfer, H100",
        **kernel("guidance-131072", "top-p", 131072, 128),
        column="p50",
        bound=139,
    ),
    Goal(
        "kernel, top-k and top-p, V 131,072, 128 pairs: us",
        "FlashInfer, H100",
        **kernel("guidance-131072", "both", 131072, 128),
        column="p50",
        bound=267,
    ),
    Goal("ORPO step, 8B: GiB", "an A40", "orpo", {"variant": SHARED}, "total_gib", 48),
)


def compare(folder: Path) -> list[dict[str, str]]:
    """The rows of a table, one for each goal, from the CSV files in `folder`."""
    table = []
    for goal in GOALS:
        figures = figures_of(goal, folder / f"{goal.file}.csv")
        row = {"goal": goal.name, "bound": f"at {'least' if goal.least else 'most'} {goal.bound:g}"}
        row |= {"measured": NOT_MEASURED, "verdict": "", "source": goal.source}
        if figures:
            worst = min(figures) if goal.least else max(figures)
            met = worst >= goal.bound if goal.least else worst <= goal.bound
            row |= {"measured": f"{worst:.3g}", "verdict": "met" if met else "missed"}
        table.append(row)
    return table


def figures_of(goal: Goal, path: Path) -> list[float]:
    """The figures of the rows that a goal is about; none where the file is missing."""
    if not path.exists():
        return []
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if goal.where.items() <= row.items():
                found.append(float(row[goal.column]))
    return found
