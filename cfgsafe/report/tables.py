"""The paper's Tables 1 to 3 in shape, as a grid over models, adapters, epochs and guidance, from the results of any runs.

Source: Smirnov (arXiv 2412.06846), Tables 1 to 3; the paper's own figures stand beside ours where the model's name is the same.
Deviations: 95 % intervals; items per 50 and per 150 answers are one rate, scaled (the paper counted 50 and 150 prompts); the grid has
every g and epoch that was run, and says "not run" for the rest.

Run it: python eval.py table --runs runs/full runs/sweep
"""

from dataclasses import dataclass

from cfgsafe.errors import InputError
from cfgsafe.files import write_text
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
# (the paper's name, epoch, g) -> MMLU-Pro %, items per 50 answers; guidance in log space
PAPER = {
    ("Model-ch", None, None): (42.9, 246),
    ("Model-sub", None, None): (0.0, 175),
    ("Model-sub-lora", 3, None): (32.9, 88),
    ("Model-sub-lora-cfg", 3, 1.0): (30.0, 27),
    ("Model-sub-lora-cfg", 3, 2.0): (30.0, 4),
    ("Model-ch-lora", 2, None): (45.7, 4),
    ("Model-ch-lora", 3, None): (44.3, 11),
    ("Model-ch-lora-cfg", 3, 1.0): (45.7, 12),
    ("Model-ch-lora-cfg", 3, 2.0): (44.3, 5),
    ("Model-ch-lora-cfg", 3, 3.0): (45.7, 1),
}
# (the paper's name, g) -> items per 50, items per 150 answers; three epochs, guidance in probability space
PAPER_PROB = {("Model-ch-lora", None): (11, 27), ("Model-ch-lora-cfg", 3.0): (3, 19)}
MISSING, UNKNOWN = "not run", "-"


@dataclass
class Options:
    """Rebuild the paper's tables from results.json files, in Markdown."""

    runs: list[str]
    """Folders of demo runs and sweeps."""
    out: str | None = None
    """Markdown file to write as well."""


@dataclass(frozen=True)
class Grid:
    """The rows of all runs, to be asked for by model, epoch, g and space."""

    rows: list[dict]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["label"] for row in self.rows))

    def epochs(self, model: str) -> list[int | None]:
        """Those of a model, the last one last; None where training is not counted."""
        return sorted(
            {row.get("epoch") for row in self.rows if row["label"] == model}, key=lambda epoch: epoch or 0
        )

    def guidances(self, space: str) -> list[float | None]:
        """None (unguided), 1, and the coefficients run in `space`, in order."""
        found = {
            row["guidance"] for row in self.rows if row["guidance"] in (None, 1) or row.get("space") == space
        }
        return sorted(found, key=lambda g: (g is not None, g or 0))

    def row(self, model: str, epoch: int | None, g: float | None, space: str) -> dict | None:
        """The row; at g = 1, and without guidance, the space does not matter."""
        for row in self.rows:
            if (row["label"], row.get("epoch"), row["guidance"]) == (model, epoch, g) and (
                g in (None, 1) or row["space"] == space
            ):
                return row
        return None


def run(options: Options) -> None:
    grid = Grid(read_runs(options.runs))
    text = "\n".join([*table_1(grid), *table_2(grid), *table_3(grid), *notes(grid, options.runs)])
    if options.out:
        write_text(options.out, text)
    print(text)


def read_runs(folders: list[str]) -> list[dict]:
    """The rows of all runs, each with its "label": the model, its mask if any, and its run where two runs have the same row.

    Raises InputError naming file and field.
    """
    runs = {folder: results.read_results(folder)["rows"] for folder in dict.fromkeys(folders)}
    if not runs:
        raise InputError("--runs: give at least one folder")
    name = lambda row: row["model"] + (f" alpha={row['alpha']:g}" if row.get("alpha") else "")
    key = lambda row: (name(row), row.get("epoch"), row["guidance"], row.get("space"))
    found = [key(row) for rows in runs.values() for row in rows]
    clashing = {k[0] for k in found if found.count(k) > 1}
    return [
        {**row, "label": name(row) + (f" ({folder})" if name(row) in clashing else "")}
        for folder, rows in runs.items()
        for row in rows
    ]


def table_1(grid: Grid) -> list[str]:
    """Model x (utility, NER items per 50 answers) at each model's last epoch; guidance in log space, as in the paper."""
    lines, met = [], set()
    for model in grid.models:
        epoch = grid.epochs(model)[-1]
        paper = last_epoch(paper_name(grid, model))
        met.add(paper_name(grid, model))
        run = [g for g in grid.guidances("log") if grid.row(model, epoch, g, "log")]
        for g in sorted({*run, *paper}, key=lambda g: (g is not None, g or 0)):
            row = grid.row(model, epoch, g, "log")
            theirs = [f"{paper[g][0]:g}", f"{paper[g][1]}"] if g in paper else [UNKNOWN, UNKNOWN]
            lines.append(
                [setting(model, epoch, g), cell(row, "utility"), cell(row, "ner_items_per_100", 0.5), *theirs]
            )
    for name in dict.fromkeys(name for name, _, _ in PAPER):
        if name not in met:
            figures = last_epoch(name)
            lines += [
                [setting(name, None, g), MISSING, MISSING, f"{u:g}", f"{n}"] for g, (u, n) in figures.items()
            ]
    heads = ["model", "utility %", "NER items / 50", "paper: MMLU-Pro %", "paper: items / 50"]
    return [
        "## Table 1: models at their last epoch, guidance in log space",
        "",
        results.markdown(heads, lines),
        "",
    ]


def table_2(grid: Grid) -> list[str]:
    """NER items per 50 answers, and utility, of each model by epoch and g; guidance in log space."""
    steps = grid.guidances("log")
    texts = ["## Table 2: adapters by epoch and g, guidance in log space", ""]
    for key, scale, column, title in (
        ("ner_items_per_100", 0.5, 1, "NER items / 50"),
        ("utility", 1.0, 0, "utility %"),
    ):
        lines = []
        for model in grid.models:
            for epoch in grid.epochs(model):
                theirs = {
                    g: figures
                    for (name, e, g), figures in PAPER.items()
                    if (name, e) == (paper_name(grid, model), epoch)
                }
                paper = ", ".join(
                    (f"g={g:g}: " if g else "") + f"{figures[column]:g}" for g, figures in theirs.items()
                )
                ours = [cell(grid.row(model, epoch, g, "log"), key, scale) for g in steps]
                lines.append([model, str(epoch or UNKNOWN), *ours, paper or UNKNOWN])
        heads = ["model", "epoch", *(f"g={g:g}" if g else "unguided" for g in steps), "paper, same epoch"]
        texts += [f"{title}:", "", results.markdown(heads, lines), ""]
    return texts


def table_3(grid: Grid) -> list[str]:
    """Probability space: every epoch and g, per 50 and per 150 answers."""
    lines, met = [], set()
    for model in grid.models:
        name = paper_name(grid, model)
        epochs = grid.epochs(model)
        for epoch in epochs:
            theirs = {g: PAPER_PROB[n, g] for n, g in PAPER_PROB if n == name and epoch == epochs[-1]}
            run = [g for g in grid.guidances("prob") if grid.row(model, epoch, g, "prob")]
            for g in sorted({*run, *theirs}, key=lambda g: (g is not None, g or 0)):
                row = grid.row(model, epoch, g, "prob")
                met.add((name, g))
                ours = [
                    cell(row, "ner_items_per_100", 0.5),
                    cell(row, "ner_items_per_100", 1.5),
                    cell(row, "utility"),
                ]
                lines.append([setting(model, epoch, g), *ours, *map(str, theirs.get(g, (UNKNOWN, UNKNOWN)))])
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


def notes(grid: Grid, runs: list[str]) -> list[str]:
    return [
        f"Runs: {', '.join(runs)}. [low, high]: 95 % interval. NER items are a rate per answer, scaled to 50 and 150 answers.",
        "The paper's figures are of an 8B model after three epochs, MMLU-Pro with 70 questions; compare orders, not values.",
        "",
    ]


def setting(model: str, epoch: int | None, g: float | None) -> str:
    return model + (f", epoch {epoch}" if epoch else "") + (f", g={g:g}" if g is not None else "")


def paper_name(grid: Grid, model: str) -> str | None:
    """The paper's name of a model of the grid, or None; a mask is not in the paper."""
    row = next(row for row in grid.rows if row["label"] == model)
    if any(r.get("alpha") for r in grid.rows if r["label"] == model):
        return None
    return PAPER_NAMES.get(row["model"], row["model"] if row["model"] in PAPER_NAMES.values() else None)


def last_epoch(name: str | None) -> dict[float | None, tuple[float, int]]:
    """g -> the paper's figures of a model at its last epoch."""
    epochs = [epoch or 0 for n, epoch, _ in PAPER if n == name]
    return {
        g: figures for (n, epoch, g), figures in PAPER.items() if n == name and (epoch or 0) == max(epochs)
    }


def cell(row: dict | None, key: str, scale: float = 1.0) -> str:
    """value [low, high] of a row, scaled."""
    if row is None or key not in row:
        return MISSING
    low, high = row[f"{key}_ci"]
    return f"{scale * row[key]:.1f} [{scale * low:.1f}, {scale * high:.1f}]"
