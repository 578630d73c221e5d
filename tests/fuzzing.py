"""The seeded cases of the fuzzers in tests/fuzz: the fixture `cases`, and how long it draws.

    python -m pytest tests/fuzz -m slow -n 0                               # a minute each
    CFGSAFE_FUZZ_SECONDS=3600 python -m pytest tests/fuzz -m slow -n 0     # an hour each
    CFGSAFE_FUZZ_SEED=7 ...                                                # other cases
    CFGSAFE_FUZZ_CASE=812 ... tests/fuzz/test_fuzz_rows.py                 # one case again

A case that fails becomes a named test of the file that it is about.
"""

import os
import random
import time
from collections.abc import Iterator

import pytest

SECONDS = float(os.environ.get("CFGSAFE_FUZZ_SECONDS", "60"))
SEED = os.environ.get("CFGSAFE_FUZZ_SEED", "0")
CASE = os.environ.get("CFGSAFE_FUZZ_CASE")


@pytest.fixture
def cases(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture) -> Iterator[Iterator[random.Random]]:
    """The random generators of the cases, one after the other, until `SECONDS` are over."""
    name = request.node.name
    number = first = int(CASE or 0)

    def draw() -> Iterator[random.Random]:
        nonlocal number
        end = time.monotonic() + SECONDS
        while number == first or (CASE is None and time.monotonic() < end):
            yield random.Random(f"{name} {SEED} {number}")
            number += 1

    yield draw()
    with capsys.disabled():
        print(f"\n{name}: {number - first} cases held (seed {SEED}); the next is case {number}")
