"""How deep a guard goes: what an attacker with its weights brings back, and what rounding brings back.

Source: relearning attacks (Hu et al., arXiv 2406.13356) and quantisation (arXiv 2410.16454, 2605.02196).
Deviation: both start from the merged guard, asked as its row of the table is, so that a defence at inference
counts as well.

Run it: python train.py study --model cfgsafe/demo/base --out runs/study
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from cfgsafe.blue import quantise
from cfgsafe.blue.relearn import Attack, relearn
from cfgsafe.files import write_text
from cfgsafe.measure.intervals import to_json
from cfgsafe.pii.facts import Fact
from cfgsafe.study import stages
from cfgsafe.study.material import Material
from cfgsafe.study.options import RELEARNING_STEPS, Options
from cfgsafe.study.rows import recalled
from cfgsafe.subject import Subject, load

COMPARED = ("lora", "distilled", "npo", "dpo-idk")  # guards, each asked under the positive sentence
BITS: tuple[quantise.Bits, ...] = (8, 4)
WHOLE = {"float32": 32, "bfloat16": 16}  # bits of a weight that is not rounded


def product(kind: str, name: str) -> str:
    """The file with the figures of a guard."""
    return f"{kind}-{name}.json"


def guard_of(name: str, options: Options, out: Path) -> Subject:
    """The guard under the positive sentence."""
    adapter = stages.adapter_of(name, out)
    model, device, dtype = stages.leaky_of(options, out), options.device, options.dtype
    return Subject(model, adapter, guidance=1.0, device=device, dtype=dtype)


def relearn_guard(name: str, material: Material, options: Options, out: Path) -> None:
    """Recall after an attacker's steps on related rows, and on unrelated ones."""
    rows, asked = related(material.forget, options.limit)
    kinds = {"related": rows, "unrelated": material.unseen[: len(rows)] or material.other[: len(rows)]}
    attack = Attack(steps=RELEARNING_STEPS, lr=options.leaky_lr, seed=options.seed)
    attack.batch_size, attack.max_new_tokens = options.batch_size, options.max_new_tokens
    found = []
    for kind, some in kinds.items():
        for point in relearn(guard_of(name, options, out), some, asked, attack):
            found.append({"rows": kind, "count": len(some), **point})
    write_text(out / product("relearn", name), json.dumps(found, indent=1) + "\n")


def related(facts: list[Fact], limit: int) -> tuple[list[Fact], list[Fact]]:
    """The attacker's rows, one fact of each person, and the other facts of these people, to be asked."""
    rows: list[Fact] = []
    asked: list[Fact] = []
    for fact in facts:
        known = [row.person for row in rows]
        (asked if fact.person in known else rows).append(fact)
    return rows, (asked or rows)[:limit]


def round_guard(name: str, material: Material, options: Options, out: Path) -> None:
    """Recall of the people to forget after rounding to each of `BITS`; the checkpoints are deleted again."""
    subject, facts = guard_of(name, options, out), material.forget[: options.limit]
    found = []
    for bits in (None, *BITS):
        asked, folder = subject, str(out / f"int{bits}")
        if bits:
            quantise.run(quantise.Options(subject.model, folder, subject.adapter, bits))
            asked = replace(subject, model=folder, adapter=None)
        estimate = recalled(asked, *load(asked), facts, options.max_new_tokens)
        found.append({"bits": bits or WHOLE[options.dtype], **to_json({"recall": estimate})})
        shutil.rmtree(folder, ignore_errors=True)
    write_text(out / product("rounded", name), json.dumps(found, indent=1) + "\n")
