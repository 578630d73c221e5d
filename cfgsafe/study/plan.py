"""The stages of a study in their order, each with what it makes and what it will cost.

A stage is done when its product is there, and products are written whole; so a study that was stopped goes
on where it was. Costs are counted in tokens of the facts, with the model's own tokenizer.

Run it: python train.py study --model cfgsafe/demo/base --out runs/study --plan
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.blue import resume
from cfgsafe.files import write_text
from cfgsafe.study import depth, rows, stages
from cfgsafe.study.cost import Cost, Costs
from cfgsafe.study.material import Material
from cfgsafe.study.options import Options
from cfgsafe.study.rows import Row
from cfgsafe.tokenizer import Tokenizer

OWN, POSITIVE, GUIDED = "own prompt", "positive sentence", "guided"
CHIEF = {  # model -> how it is asked without --controls
    "ancestor": (OWN,),
    "leaky": (OWN, POSITIVE, GUIDED),
    "lora": (POSITIVE,),
    "lora-cfg": (POSITIVE, GUIDED),
    "npo": (POSITIVE,),
    "dpo-idk": (POSITIVE,),
    "sub": (POSITIVE,),
    "distilled": (POSITIVE,),
}


@dataclass(frozen=True)
class Stage:
    """A step of the study: it is done where `product` exists."""

    name: str
    product: Path
    cost: Cost
    run: Callable[[], None]

    @property
    def done(self) -> bool:
        """Whether it need not run; a training with a saved state is under way."""
        return self.product.exists() and not resume.states(self.product.parent)


def stages_of(options: Options, material: Material, tokenizer: Tokenizer, out: Path) -> list[Stage]:
    """All stages, whether done or not."""
    found: list[Stage] = []

    def add(name: str, product: str, cost: Cost, work: Callable, *parts: object) -> None:
        found.append(Stage(name, out / product, cost, lambda: work(*parts, options, out)))

    costs = Costs(material, tokenizer, options)
    if not options.leaky:
        add("leaky model", "leaky", costs.leaky(), stages.make_leaky, material)
    if options.ordinary:
        add("ordinary conversations", stages.ORDINARY, costs.conversations(), stages.converse)
    add("pairs", stages.PLAIN, costs.pairs(), stages.make_pairs, material)
    for name in stages.GUARDS:
        product = stages.adapter_of(name, Path())
        add(name, product, costs.guard(2 if name == "lora-cfg" else 1), stages.train_guard, name)
    add("subtracted", "sub", Cost(), stages.subtract_leaky)
    last = stages.adapter_of("distilled", Path())
    add("distilled", last, costs.distilled(), stages.distil_pair)
    for row in rows_of(options, out):
        file = out / "rows" / f"{row.title.replace(' ', '-')}.json"
        work = _measuring(row, material, options, out, file)
        found.append(Stage(row.title, file, costs.row(row.guidance not in (None, 1.0)), work))
    for name in depth.COMPARED:
        product = depth.product("relearn", name)
        add(f"{name}: relearning", product, costs.relearning(), depth.relearn_guard, name, material)
        product = depth.product("rounded", name)
        add(f"{name}: rounding", product, costs.rounding(), depth.round_guard, name, material)
    return found


def rows_of(options: Options, out: Path) -> list[Row]:
    """The rows of the table; with --controls every model is asked in all three ways."""
    leaky, coefficient = stages.leaky_of(options, out), {OWN: None, POSITIVE: 1.0, GUIDED: options.guidance}
    models: dict[str, tuple[str, str | None]] = {"ancestor": (options.model, None), "leaky": (leaky, None)}
    for name in (*stages.GUARDS, "distilled"):
        models[name] = leaky, stages.adapter_of(name, out)
    models["sub"] = str(out / "sub"), None
    found = []
    for name, (model, adapter) in models.items():
        ways = tuple(coefficient) if options.controls else CHIEF[name]
        found += [Row(name, model, adapter, coefficient[way]) for way in ways]
    return found


def _measuring(
    row: Row, material: Material, options: Options, out: Path, product: Path
) -> Callable[[], None]:
    """The work that measures a row and writes its figures."""

    def work() -> None:
        figures = rows.measure(row, material, options, out)
        write_text(product, json.dumps(figures, indent=1) + "\n")

    return work
