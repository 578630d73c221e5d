"""The paper's Tables 1 to 3 for the results of any runs: models, adapters, epochs and guidance.

Source: Smirnov (arXiv 2412.06846), Tables 1 to 3; the paper's figures stand beside ours.
Deviations: 95 % intervals; items per 50 and per 150 answers are one rate, scaled, where the paper
counted 50 and 150 prompts; every g and epoch that was run has its line, the rest says "not run". The
paper's rows without guidance stand at g = 1, because its code gives every model the positive prompt.

Run it: python eval.py table --runs runs/full runs/sweep
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from cfgsafe.errors import InputError
from cfgsafe.files import write_text
from cfgsafe.outputs import Input, OutputFile
from cfgsafe.report import results

# our name of a model -> the paper's
PAPER_NAMES = {
    "leaky": "Model-ch",
    "sub": "Model-sub",
    "sub-lora": "Model-sub-lora",
    "sub-lora-cfg": "Model-sub-lora-cfg",
    "lora": "Model-ch-lora",
    "lora-cfg": "Model-ch-lora-cfg",
}
# (the paper's name, epoch, g) -> MMLU-Pro %, items per 50 answers; guidance in log space. The reference's
# evaluation gives every model the positive system prompt, also those without guidance: that is g = 1.
PAPER = {
    ("Model-ch", None, 1.0): (42.9, 246),
    ("Model-sub", None, 1.0): (0.0, 175),
    ("Model-sub-lora", 3, 1.0): (32.9, 88),
    ("Model-sub-lora-cfg", 3, 1.0): (30.0, 27),
    ("Model-sub-lora-cfg", 3, 2.0): (30.0, 4),
    ("Model-ch-lora", 2, 1.0): (45.7, 4),
    ("Model-ch-lora", 3, 1.0): (44.3, 11),
    ("Model-ch-lora-cfg", 3, 1.0): (45.7, 12),
    ("Model-ch-lora-cfg", 3, 2.0): (44.3, 5),
    ("Model-ch-lora-cfg", 3, 3.0): (45.7, 1),
}
# (the paper's name, g) -> items per 50, items per 150 answers; three epochs, guidance in probability space
PAPER_PROB = {("Model-ch-lora", 1.0): (11, 27), ("Model-ch-lora-cfg", 3.0): (3, 19)}
Paper = Mapping[float | None, tuple[float, int]]  # g -> two of the paper's figures
MISSING, UNKNOWN = "not run", "-"
ITEMS = "ner_items_per_100"


@dataclass
class Options:
    """Fill the paper's tables from results.json files, in Markdown."""

    runs: list[Annotated[str, Input(results.run_files)]]
    """Folders of demo runs and sweeps."""
    out: OutputFile | None = None
    """Markdown file to write as well."""


@dataclass(frozen=True)
class Grid:
    """The rows of all runs, found by model, epoch, g and space."""

    rows: list[dict]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["label"] for row in self.rows))

    def epochs(self, model: str) -> list[int | None]:
        """The epochs of a model in order; None where training is not counted."""
        epochs = {row.get("epoch") for row in self.rows if row["label"] == model}
        return sorted(epochs, key=lambda epoch: epoch or 0)

    def guidances(self, space: str) -> list[float | None]:
        """The coefficients that were run in `space`, in order; None is without guidance."""
        return in_order({row["guidance"] for row in self.rows if fits(row, space)})

    def row(self, model: str, epoch: int | None, g: float | None, space: str) -> dict | None:
        """The row of a setting; None if it was not run."""
        for row in self.rows:
            if (row["label"], row.get("epoch"), row["guidance"]) == (model, epoch, g) and fits(row, space):
                return row
        return None

    def settings(self, model: str, epoch: int | None, space: str, paper: Paper) -> list[float | None]:
        """The coefficients that we or the paper ran, in order."""
        ours = [g for g in self.guidances(space) if self.row(model, epoch, g, space)]
        return in_order({*ours, *paper})


def fits(row: dict, space: str) -> bool:
    """Whether a row belongs to `space`; at g = 1 and without guidance the space does not matter."""
    return row["guidance"] in (None, 1) or row.get("space") == space


def in_order(guidances: set[float | None]) -> list[float | None]:
    """Without guidance first, then by coefficient."""
    return sorted(guidances, key=lambda g: (g is not None, g or 0))


def run(options: Options) -> None:
    grid = Grid(read_runs(options.runs))
    text = "\n".join([*table_1(grid), *table_2(grid), *table_3(grid), *notes(options.runs, grid.rows)])
    if options.out:
        write_text(options.out, text)
    print(text)


def read_runs(folders: list[str]) -> list[dict]:
    """The rows of all runs; "label" is the model, its mask, and its run where two have the same row.

    Raises InputError naming file and field.
    """
    if not folders:
        raise InputError("--runs: give at least one folder")
    rows = []
    times: Counter[tuple] = Counter()
    for folder in dict.fromkeys(folders):
        for row in results.read_results(folder)["rows"]:
            name = row["model"]
            if row.get("seed") is not None:
                name += f" seed {row['seed']}"
            if row.get("alpha"):
                name += f" alpha={row['alpha']:g}"
            times[name, row.get("epoch"), row["guidance"], row.get("space")] += 1
            rows.append((folder, row, name))
    clashing = {key[0] for key, count in times.items() if count > 1}
    for folder, row, name in rows:
        row["label"] = f"{name} ({folder})" if name in clashing else name
    return [row for _, row, _ in rows]


def table_1(grid: Grid) -> list[str]:
    """Utility and NER items per 50 answers of each model at its last epoch; guidance in log space."""
    lines = []
    met = set()
    for model in grid.models:
        name = paper_name(grid, model)
        met.add(name)
        paper = last_epoch(name)
        epoch = grid.epochs(model)[-1]
        for g in grid.settings(model, epoch, "log", paper):
            row = grid.row(model, epoch, g, "log")
            ours = [cell(row, "utility"), cell(row, ITEMS, 0.5)]
            lines.append([setting(model, epoch, g), *ours, *theirs(paper, g)])
    for name in dict.fromkeys(name for name, _, _ in PAPER):
        if name not in met:
            paper = last_epoch(name)
            lines += [[setting(name, None, g), MISSING, MISSING, *theirs(paper, g)] for g in paper]
    heads = ["model", "utility %", "NER items / 50", "paper: MMLU-Pro %", "paper: items / 50"]
    title = "## Table 1: models at their last epoch, guidance in log space"
    return [title, "", results.markdown(heads, lines), ""]


def table_2(grid: Grid) -> list[str]:
    """NER items per 50 answers, then utility, of each model by epoch and g; guidance in log space."""
    items = ["NER items / 50:", "", epochs_by_guidance(grid, ITEMS, 0.5, 1), ""]
    utility = ["utility %:", "", epochs_by_guidance(grid, "utility", 1.0, 0), ""]
    return ["## Table 2: adapters by epoch and g, guidance in log space", "", *items, *utility]


def epochs_by_guidance(grid: Grid, key: str, scale: float, column: int) -> str:
    """A line for each model and epoch, a column for each g; `column` is the figure's place in PAPER."""
    steps = grid.guidances("log")
    lines = []
    for model in grid.models:
        for epoch in grid.epochs(model):
            ours = [cell(grid.row(model, epoch, g, "log"), key, scale) for g in steps]
            paper = []
            for g, figures in at_epoch(paper_name(grid, model), epoch).items():
                paper.append((f"g={g:g}: " if g else "") + f"{figures[column]:g}")
            lines.append([model, str(epoch or UNKNOWN), *ours, ", ".join(paper) or UNKNOWN])
    heads = [f"g={g:g}" if g else "unguided" for g in steps]
    return results.markdown(["model", "epoch", *heads, "paper, same epoch"], lines)


def table_3(grid: Grid) -> list[str]:
    """NER items per 50 and per 150 answers of every model, epoch and g in probability space."""
    lines = []
    met = set()
    for model in grid.models:
        name, last = paper_name(grid, model), grid.epochs(model)[-1]
        for epoch in grid.epochs(model):
            paper: Paper = {
                g: figures for (n, g), figures in PAPER_PROB.items() if n == name and epoch == last
            }
            for g in grid.settings(model, epoch, "prob", paper):
                met.add((name, g))
                row = grid.row(model, epoch, g, "prob")
                ours = [cell(row, ITEMS, 0.5), cell(row, ITEMS, 1.5), cell(row, "utility")]
                lines.append([setting(model, epoch, g), *ours, *theirs(paper, g)])
    for (name, g), figures in PAPER_PROB.items():
        if (name, g) not in met:
            lines.append([setting(name, None, g), MISSING, MISSING, MISSING, *map(str, figures)])
    heads = [
        "model",
        "NER items / 50",
        "NER items / 150",
        "utility %",
        "paper: items / 50",
        "paper: items / 150",
    ]
    return ["## Table 3: guidance in probability space", "", results.markdown(heads, lines), ""]


def notes(runs: list[str], rows: list[dict]) -> list[str]:
    """What the tables' figures are; and how many answers the limit of tokens cut off, where that is known."""
    shares = [row["cut_off"] for row in rows if "cut_off" in row]
    cut = f"The limit of tokens cut off at most {max(shares):.1f} % of a model's answers." if shares else ""
    return [
        f"Runs: {', '.join(runs)}. [low, high]: 95 % interval. "
        "NER items are a rate per answer, scaled to 50 and 150 answers.",
        "The paper's figures are of an 8B model after three epochs, MMLU-Pro with 70 questions; "
        "compare orders, not values.",
        cut,
        "",
    ]


def setting(model: str, epoch: int | None, g: float | None) -> str:
    """What a line is called."""
    name = f"{model}, epoch {epoch}" if epoch else model
    return name if g is None else f"{name}, g={g:g}"


def paper_name(grid: Grid, model: str) -> str | None:
    """The paper's name of a model of the grid; None if the paper has no such model, as with a mask."""
    rows = [row for row in grid.rows if row["label"] == model]
    if any(row.get("alpha") for row in rows):
        return None
    name = rows[0]["model"]
    return name if name in PAPER_NAMES.values() else PAPER_NAMES.get(name)


def at_epoch(name: str | None, epoch: int | None) -> Paper:
    """The paper's figures of a model at an epoch."""
    return {g: figures for (n, e, g), figures in PAPER.items() if (n, e) == (name, epoch)}


def last_epoch(name: str | None) -> Paper:
    """The paper's figures of a model at its last epoch."""
    epochs = [epoch for n, epoch, _ in PAPER if n == name]
    return at_epoch(name, max(epochs, key=lambda epoch: epoch or 0, default=None))


def theirs(paper: Paper, g: float | None) -> list[str]:
    """The paper's two figures as text."""
    return [f"{figure:g}" for figure in paper[g]] if g in paper else [UNKNOWN, UNKNOWN]


def cell(row: dict | None, key: str, scale: float = 1.0) -> str:
    """value [low, high] of a row, scaled."""
    if row is None or key not in row:
        return MISSING
    low, high = row[f"{key}_ci"]
    return results.interval_text((scale * row[key], scale * low, scale * high))
