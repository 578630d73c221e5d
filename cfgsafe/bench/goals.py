"""What the benchmarks of a GPU should reach, and what the CSV files of a run say of it.

Sources: FlashInfer publishes its draws from ready probabilities on an H100, for 128 rows; ours are of 128
pairs, guidance included. gpt-fast publishes its share of an A100's bandwidth by the data sheet; ours is of
the bandwidth that was measured. The other goals are our own.

Run it: python -m cfgsafe.bench gpu
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.bench.decode import CUDA_GRAPH, PROBABILITY_SPACE
from cfgsafe.bench.orpo import SHARED

COLUMNS = {"goal": "{goal}", "bound": "{bound}", "measured": "{measured}", "": "{verdict}", "of": "{source}"}
NOT_MEASURED = "not measured"
KERNEL = {"variant": "kernel", "pairs": "128"}
READ_ONCE = "a pair reads the weights once"


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


GOALS = (
    Goal("8B, guided / unguided", READ_ONCE, "decode-8b", {"variant": CUDA_GRAPH}, "of_unguided", 0.95, True),
    Goal(
        "8B, guided in probability space / unguided",
        READ_ONCE,
        "decode-8b",
        {"variant": PROBABILITY_SPACE},
        "of_unguided",
        0.95,
        True,
    ),
    Goal("1B, guided / unguided", READ_ONCE, "decode-1b", {"variant": CUDA_GRAPH}, "of_unguided", 0.95, True),
    Goal(
        "8B, guided, 1 request: share of the read bandwidth",
        "gpt-fast, A100",
        "decode-8b",
        {"variant": CUDA_GRAPH, "requests": "1"},
        "share_of_read",
        0.69,
        True,
    ),
    Goal(
        "kernel, greedy, V 128,256, 128 pairs: one read / time",
        "its second read is of the cache",
        "guidance",
        {**KERNEL, "method": "greedy", "vocabulary": "128256"},
        "share_of_read",
        0.5,
        True,
    ),
    Goal(
        "kernel, top-p, V 131,072, 128 pairs: us",
        "FlashInfer, H100",
        "guidance-compiled",
        {**KERNEL, "method": "top-p", "vocabulary": "131072"},
        "p50",
        139,
    ),
    Goal(
        "kernel, top-k and top-p, V 131,072, 128 pairs: us",
        "FlashInfer, H100",
        "guidance-compiled",
        {**KERNEL, "method": "both", "vocabulary": "131072"},
        "p50",
        267,
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
