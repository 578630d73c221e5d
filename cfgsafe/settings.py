"""Settings in JSON files from elsewhere: each field that we use has a kind, and what it holds must fit.

A file of somebody else may hold anything: a string for a number, a size of 10^12, NaN. What is used
unchecked ends as an error of torch that names neither file nor field, or as a wrong figure. So each
file has a table of its fields (name -> `Kind`), and `check_fields` is the one place that compares.

Run it: python -m pytest tests/test_settings.py
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.errors import CheckpointError
from cfgsafe.files import read_json

DEEPEST = 50  # lists and objects inside each other; Python fails at about 1,000
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, which end the sentence "it must be ...", and as a test."""

    words: str
    fits: Callable[[object], bool]


def integer(least: int, most: int) -> Kind:
    """Whole numbers from `least` to `most`; true and 3.0 are none."""

    def fits(value: object) -> bool:
        return type(value) is int and least <= value <= most

    return Kind(f"an integer from {least:,} to {most:,}", fits)


def number(least: float, most: float) -> Kind:
    """Numbers from `least` to `most`, with or without a point; true and NaN are none."""

    def fits(value: object) -> bool:
        return type(value) in (int, float) and least <= value <= most  # type: ignore[operator]

    return Kind(f"a number from {least:g} to {most:g}", fits)


def above_zero(most: float) -> Kind:
    """Numbers above 0, up to `most`."""
    return Kind(f"a number above 0, at most {most:g}", number(math.ulp(0.0), most).fits)


def one_of(*values: object) -> Kind:
    """These values. 1 does not stand for true, nor 0 for false."""

    def fits(value: object) -> bool:
        return any(type(value) is type(other) and value == other for other in values)

    return Kind(" or ".join(map(repr, values)), fits)


def list_of(kind: Kind) -> Kind:
    """Lists, each element of `kind`; an empty one fits."""

    def fits(value: object) -> bool:
        return isinstance(value, list) and all(map(kind.fits, value))

    return Kind(f"a list, each element {kind.words}", fits)


def object_of(kind: Kind) -> Kind:
    """Objects, the value of each key of `kind`."""

    def fits(value: object) -> bool:
        return isinstance(value, dict) and all(map(kind.fits, value.values()))

    return Kind(f"an object, the value of each key {kind.words}", fits)


def either(first: Kind, second: Kind) -> Kind:
    """What fits one of two kinds."""
    return Kind(f"{first.words}, or {second.words}", lambda value: first.fits(value) or second.fits(value))


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def read_settings(path: Path, kinds: Mapping[str, Kind], needed: tuple[str, ...] = ()) -> dict:
    """The JSON object in a file, without fields that are null: their defaults hold, as if they were absent.

    Fields that `kinds` does not name are not checked. Raises what `read_json` and `check_fields` raise.
    """
    raw = read_json(path)
    if _depth(raw) > DEEPEST:
        raise CheckpointError(f"{path}: more than {DEEPEST} lists and objects inside each other")
    present = {name: value for name, value in raw.items() if value is not None}
    check_fields(present, kinds, path, needed)
    return present


def check_fields(
    raw: Mapping[str, object], kinds: Mapping[str, Kind], place: str | Path, needed: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError for the first field of `raw` that is not of its kind, or is needed and absent."""
    for name, kind in kinds.items():
        if name not in raw:
            if name in needed:
                raise CheckpointError(f"{place}: field {name!r} is missing; it must be {kind.words}")
        elif not kind.fits(raw[name]):
            raise CheckpointError(f"{place}: field {name!r} is {shown(raw[name])}; it must be {kind.words}")


def shown(value: object) -> str:
    """A value for an error message: what is long is shortened."""
    return _short.repr(value)


def brief(error: BaseException | str) -> str:
    """One short line of a library's message, which may quote what a file holds."""
    return " ".join(str(error)[:200].split())


def _depth(value: object) -> int:
    """How many lists and objects stand inside each other, at most."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[object] = []
        for outer in level:
            children = outer.values() if isinstance(outer, dict) else outer
            inner += [child for child in children if isinstance(child, (dict, list))]  # type: ignore[attr-defined]
        level = inner
    return depth
