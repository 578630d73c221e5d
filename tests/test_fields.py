"""What fields of options declare: ranges, checked for every number of every command."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, get_args, get_type_hints

import pytest

import eval as measuring
import infer
import train
from cfgsafe.bench.__main__ import BENCHES
from cfgsafe.errors import InputError
from cfgsafe.fields import (
    LARGEST,
    Count,
    Guidance,
    PartialShare,
    Range,
    Rate,
    Seed,
    Share,
    Weight,
    check_ranges,
    declared,
)

COMMANDS = {**train.STAGES, **measuring.COMMANDS, **BENCHES}
OPTIONS = {name: options for name, (options, _) in COMMANDS.items()}
OPTIONS |= {"train demo-models": train.STAGES["demo-models"][0], "infer": infer.Options}
OPTIONS |= {"bench orpo": BENCHES["orpo"][0], "train orpo": train.STAGES["orpo"][0]}


def types_in(hint: object) -> set[object]:
    """The plain types within a type: int and None for Count | None."""
    parts = get_args(hint)
    return set().union(*map(types_in, parts)) if parts else {hint}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_of_every_command_declares_its_range(name):
    bare = []
    waiting = [OPTIONS[name]]
    while waiting:
        options = waiting.pop()
        hints = get_type_hints(options)
        ranges = dict(declared(options, Range))
        waiting += [hint for hint in hints.values() if is_dataclass(hint)]
        for each in fields(options):
            if types_in(hints[each.name]) & {int, float} and not ranges[each.name]:
                bare.append(each.name)
    assert not bare


@dataclass
class Inner:
    price: Weight | None = None


@dataclass
class Numbers:
    steps: Count = 1
    share: Share = 0.0
    lr: Rate = 1.0
    dropout: PartialShare = 0.0
    g: Guidance | None = None
    seed: Seed = 0
    sizes: tuple[Count, ...] = (1,)
    scales: list[Annotated[float, Range(above=-1, below=1)]] = field(default_factory=list)
    plain: float = 0.0
    on: bool = True
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("steps", 0, "--steps 0: must be at least 1"),
        ("steps", LARGEST + 1, "--steps 2147483648: must be at most 2147483647"),
        ("steps", 10**400, f"--steps 1{'0' * 400}: must be at most 2147483647"),
        ("share", 1.5, "--share 1.5: must be at most 1"),
        ("lr", 0.0, "--lr 0.0: must be above 0"),
        ("dropout", 1.0, "--dropout 1.0: must be below 1"),
        ("g", -1e308, "--g -1e\\+308: must be at least -1000"),
        ("seed", -1, "--seed -1: must be at least 0"),
        ("seed", 2**32, "--seed 4294967296: must be at most 4294967295"),
        ("sizes", (1, 0), "--sizes 0: must be at least 1"),
        ("scales", [0.5, -1.0], "--scales -1.0: must be above -1"),
        ("inner", Inner(-2.0), "--price -2.0: must be at least 0"),
        ("plain", math.inf, "--plain inf: must be a finite number"),
        ("plain", math.nan, "--plain nan: must be a finite number"),
        ("lr", math.nan, "--lr nan: must be a finite number"),
        ("scales", [math.nan], "--scales nan: must be a finite number"),
    ],
)
def test_a_number_out_of_range_is_named(name, value, line):
    with pytest.raises(InputError, match=f"^{line}$"):
        check_ranges(Numbers(**{name: value}))


def test_bounds_that_belong_to_the_range_are_taken():
    check_ranges(Numbers(LARGEST, 1.0, 1000.0, 0.999, -1000.0, 2**32 - 1, (), [0.999], -1e308, False))


def test_a_row_of_a_file_is_named_by_its_place():
    with pytest.raises(InputError, match="^p.jsonl:3: seed -1: must be at least 0$"):
        check_ranges(Numbers(seed=-1), "p.jsonl:3")
