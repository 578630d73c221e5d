"""What fields of options declare: ranges, checked for every number of every command."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from cfgsafe.errors import InputError
from cfgsafe.fields import LARGEST, Count, Dropout, Guidance, Range, Rate, Seed, Share, Weight, check_ranges


@dataclass
class Inner:
    price: Weight | None = None


@dataclass
class Numbers:
    steps: Count = 1
    share: Share = 0.0
    lr: Rate = 1.0
    dropout: Dropout = 0.0
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
