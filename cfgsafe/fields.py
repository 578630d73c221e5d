"""What a field of options may hold, declared on the field itself: the range of a number.

    @dataclass
    class Options:
        epochs: Count = 3                                       # a type that is ready
        share: Annotated[float, Range(least=0, below=1)] = 0.0  # a range of its own

No number may be NaN or infinite, whether its field declares a range or not. `check_ranges` refuses what is
out of range. The command line calls it before anything is read or written (cfgsafe/cli.py); functions that
take options from Python call it as well.

Run it: python train.py orpo --lr -1 --model M --pairs P --out O      (one line, and nothing is touched)
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from cfgsafe.errors import InputError, option

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: at least `least`, above `above`, at most `most`, below `below`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """The bound that a number breaks, in words; None where it lies in the range.

        >>> Range(above=0, most=1).broken_by(0), Range(above=0, most=1).broken_by(1)
        ('above 0', None)
        """
        if self.least is not None and value < self.least:
            return f"at least {self.least}"
        if self.above is not None and value <= self.above:
            return f"above {self.above}"
        if self.most is not None and value > self.most:
            return f"at most {self.most}"
        if self.below is not None and value >= self.below:
            return f"below {self.below}"
        return None


LARGEST = 2**31 - 1  # of a whole number: what C libraries, and torch's own counters, hold

Count = Annotated[int, Range(least=1, most=LARGEST)]  # of things, steps or tokens
Several = Annotated[int, Range(least=2, most=LARGEST)]
Whole = Annotated[int, Range(least=0, most=LARGEST)]  # a count that may be none
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # what random, torch and numpy all take
RequestSeed = Annotated[int, Range(least=0, most=2**63 - 1)]  # of one request: the kernels take 63 bits
Share = Annotated[float, Range(least=0, most=1)]
PartialShare = Annotated[float, Range(least=0, below=1)]
Rate = Annotated[float, Range(above=0, most=1000)]  # a learning rate
Positive = Annotated[float, Range(above=0, most=10**6)]
Weight = Annotated[float, Range(least=0, most=10**6)]  # of a part of a loss; 0 leaves it out
Divisor = Annotated[float, Range(least=0.001, most=1000)]  # a temperature or weight to divide by
LogProb = Annotated[float, Range(least=-(10**9), most=10**9)]  # a bound of one, in nats
Threshold = Annotated[float, Range(least=-1, most=1)]  # of scores from 0 to 1: all are above -1
Seconds = Annotated[float, Range(above=0, most=10**6)]
Guidance = Annotated[float, Range(least=-1000, most=1000)]  # g; beyond, float32 has no digits left
Temperature = Annotated[float, Range(least=0, most=1000)]  # 0 is greedy


def check_ranges(options: object, place: str | None = None) -> None:
    """Raise InputError for the first number of a dataclass that is out of its range, or not finite.

    Nested dataclasses are checked as well, and every item of a list. The line begins with the option,
    "--lr -1: ...", or with `place` and the name of the field, "p.jsonl:3: seed -1: ...".
    """
    for name, ranges in declared(type(options), Range):
        value = getattr(options, name)
        if is_dataclass(value):
            check_ranges(value, place)
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            fault = _fault(item, ranges)
            if fault:
                shown = option(name) if place is None else f"{place}: {name}"
                raise InputError(f"{shown} {item}: must be {fault}")


def _fault(value: object, ranges: tuple[Range, ...]) -> str | None:
    """What a number must be and is not; None where nothing is wrong, or where the value is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return next(filter(None, (bounds.broken_by(value) for bounds in ranges)), None)


def declared(options_of: type, kind: type[T]) -> list[tuple[str, tuple[T, ...]]]:
    """(name, what its type declares of this kind) of each field of a dataclass, in order."""
    found = []
    for name, metadata in _metadata_of(options_of):
        found.append((name, tuple(item for item in metadata if isinstance(item, kind))))
    return found


@cache
def _metadata_of(options_of: Any) -> list[tuple[str, list[Any]]]:
    hints = get_type_hints(options_of, include_extras=True)
    return [(field.name, _metadata(hints[field.name])) for field in fields(options_of)]


def _metadata(hint: object) -> list[Any]:
    """What a type declares with `Annotated`, also within unions, lists and tuples."""
    found = list(getattr(hint, "__metadata__", ()))
    for part in get_args(hint):
        found += _metadata(part)
    return found
