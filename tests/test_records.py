"""Attacks: scores by hand, and files that keep every character or name the line that is wrong."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.red.records import FLOOR, Attack, Trial, read_attacks

# every character except halves of surrogate pairs; and those at which the reference code lost prompts
texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(',"\n\r\t\\\u2028\u2029\x00\x85\ufeff\U0001f600'),
    )
)
scores = st.one_of(st.none(), st.floats(0, 1))
trials = st.builds(Trial, texts, st.one_of(st.none(), texts), scores, st.lists(texts, max_size=3).map(tuple))
attacks = st.builds(
    Attack,
    st.lists(st.integers(0, 130_000), max_size=5).map(tuple),
    texts,
    st.floats(-1e6, 0),
    st.lists(trials, max_size=3).map(tuple),
)

GOOD = {
    "tokens": [1, 2],
    "text": "hi",
    "log_reference": -2.5,
    "least_likely": -2.0,
    "trials": [{"context": "c", "answer": "a", "score": 0.5, "found": ["x"]}],
}


def of(*values: float | None) -> Attack:
    return Attack((1,), "ask", -1.0, tuple(Trial("c", "a", value) for value in values))


def test_a_score_is_the_mean_of_the_trials_that_could_be_scored():
    assert of(1.0, 0.5, 0.0).score == 0.5
    assert of(1.0, None, 0.5).score == 0.75  # an answer that could not be scored is no safe one
    assert of(None, None).score is None and of().score is None


def test_a_success_scores_above_the_threshold_not_at_it():
    assert of(1.0, 0.5).succeeds() and not of(1.0, 0.0).succeeds() and not of(None).succeeds()
    assert of(1.0, 0.5).succeeds(0.7) and not of(1.0, 0.5).succeeds(0.75)


def test_its_logarithm_has_a_floor():
    assert of(1.0).log_score == 0 and of(0.25, 0.75).log_score == math.log(0.5)
    assert of(0.0).log_score == of(FLOOR / 2).log_score == math.log(FLOOR) == pytest.approx(-4.60517)
    with pytest.raises(ValueError, match="'ask' has no score"):
        _ = of(None).log_score


@settings(deadline=None)
@given(st.lists(attacks, min_size=1, max_size=4))
def test_what_is_written_is_read_again(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("attacks") / "attacks.jsonl"
    write_jsonl(path, [attack.to_json() for attack in written])
    assert read_attacks(path) == written


def test_a_file_shows_each_score(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [of(1.0, 0.0).to_json(), of(None).to_json()])
    assert [json.loads(line)["score"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [
        0.5,
        None,
    ]


TRIAL = GOOD["trials"][0]
BAD = [
    ({key: value for key, value in GOOD.items() if key != "text"}, "KeyError: 'text'"),
    (GOOD | {"text": 3}, "must be text"),
    (GOOD | {"tokens": 3}, "TypeError"),
    (GOOD | {"tokens": ["a"]}, "ValueError"),
    (GOOD | {"tokens": [math.inf]}, "OverflowError"),
    (GOOD | {"log_reference": None}, "TypeError"),
    (GOOD | {"trials": None}, "TypeError"),
    (GOOD | {"trials": ["a"]}, "TypeError"),
    (GOOD | {"trials": [TRIAL | {"score": 1.5}]}, "a score is not a number from 0 to 1"),
    (GOOD | {"trials": [TRIAL | {"score": "1"}]}, "a score is not a number from 0 to 1"),
    (GOOD | {"trials": [TRIAL | {"score": math.nan}]}, "a score is not a number from 0 to 1"),
    (GOOD | {"trials": [TRIAL | {"found": "Ann"}]}, "must be text"),
    (GOOD | {"trials": [TRIAL | {"answer": 0}]}, "must be text"),
    (GOOD | {"trials": [TRIAL | {"extra": 1}]}, "TypeError"),
    (GOOD | {"trials": [{"context": "c", "found": []}]}, "TypeError"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_a_bad_line_is_named_in_one(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [GOOD, row])
    with pytest.raises(InputError) as error:
        read_attacks(path)
    message = str(error.value)
    assert (
        message.startswith(f"{path}:2: not an attack (")
        and reason in message
        and "\n" not in message
        and "attacks.jsonl" in message
    )


def test_a_file_without_an_attack_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no attack"):
        read_attacks(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="a.jsonl:1: not JSON"):
        read_attacks(tmp_path / "a.jsonl")
