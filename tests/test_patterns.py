"""Regular expressions from elsewhere: what Python says, or one line in bounded time."""

import re
import time

import pytest

from cfgsafe import patterns
from cfgsafe.errors import CheckpointError
from cfgsafe.patterns import full_matches

NAMES = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(12) for part in "qkvo"] + ["lm_head"]
GOOD = [
    "lm_head",
    r"lm_hea.",
    r".*\.1\..*(q|v)_proj",
    r"^(?!.*k_proj).*$",
    r".*layers\.\d{2}\b.*",
    "",
    r"(.)+\1.*",
]


def test_names_are_matched_as_python_matches_them():
    for given in ([pattern] for pattern in GOOD):
        (pattern,) = given
        expected = {name for name in NAMES if re.fullmatch(pattern, name)}
        assert full_matches(given, NAMES) == {pattern: expected}
    assert len(full_matches(GOOD, NAMES)) == len(GOOD)


@pytest.mark.parametrize("pattern", ["(([a-z._0-9])+)+!", "(.|.)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!"])
def test_a_pattern_that_runs_away_ends(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="does not end within 0.5 seconds"):
        full_matches([pattern], NAMES)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*", "a{2,1}", "\\", "(?P<a>)(?P<a>)", "(" * 5000, "a{99999999999}"]
)
def test_what_is_no_regular_expression_is_one_line(pattern):
    with pytest.raises(CheckpointError, match="no regular expression") as error:
        full_matches([pattern], NAMES)
    assert (
        "\n" not in str(error.value) and "Traceback" not in str(error.value) and len(str(error.value)) < 400
    )


def test_a_pattern_that_is_too_long_is_not_tried():
    with pytest.raises(CheckpointError, match="a pattern of 100,000 characters"):
        full_matches(["a" * 100_000], NAMES)
