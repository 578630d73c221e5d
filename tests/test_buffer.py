"""The replay buffer under hypothesis: capacity, ties, near-duplicates, resume, any text; edit distances against the definition."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfgsafe.errors import InputError
from cfgsafe.red.attacks import Attack, Trial
from cfgsafe.red.buffer import ReplayBuffer, edit_distances

words = st.lists(st.integers(0, 5), min_size=1, max_size=8).map(tuple)
texts = st.text(st.characters(exclude_categories=["Cs"]))


def found(tokens, score=0.5, text="", log_reference=-1.0) -> Attack:
    return Attack(tuple(tokens), text, log_reference, (Trial("c", text, score, (text,)),))


items = st.builds(found, words, st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0]), texts, st.floats(-100, 0))


def levenshtein(a: tuple, b: tuple) -> int:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


@settings(deadline=None)
@given(words, st.lists(words, max_size=5))
def test_edit_distances_are_levenshteins(one, others):
    assert edit_distances(one, others).tolist() == [levenshtein(one, other) for other in others]


@settings(deadline=None)
@given(st.lists(items, max_size=25), st.integers(1, 6))
def test_it_holds_the_best_and_no_two_alike(items_found, capacity):
    buffer = ReplayBuffer(capacity)
    for item in items_found:
        before, taken = list(buffer.items), buffer.add(item)
        assert taken == (item in buffer.items and buffer.items[-1] is item)
        if not taken:
            assert buffer.items == before
        assert len(buffer) <= capacity
        for n, one in enumerate(buffer.items):
            for other in buffer.items[n + 1 :]:
                assert levenshtein(one.tokens, other.tokens) >= 0.25 * (len(one.tokens) + len(other.tokens))
    if items_found:
        assert max(item.score for item in buffer.items) == max(item.score for item in items_found)


def test_a_tie_does_not_delete_another_item():
    """Two items of equal reward: removing one for its near-duplicate leaves the other."""
    buffer = ReplayBuffer(10)
    one, other = found((1, 1, 1, 1), 0.5, "a"), found((2, 2, 2, 2), 0.5, "b")
    assert buffer.add(one) and buffer.add(other)
    assert buffer.add(better := found((1, 1, 1, 3), 0.9, "c"))
    assert buffer.items == [other, better]


def test_a_full_buffer_gives_up_its_worst():
    buffer = ReplayBuffer(2)
    low, high = found((1,) * 4, 0.1, "low"), found((2,) * 4, 0.9, "high")
    buffer.add(low), buffer.add(high)
    assert not buffer.add(found((3,) * 4, 0.1, "as low"))
    assert buffer.add(middle := found((3,) * 4, 0.5, "middle")) and buffer.items == [high, middle]


def test_prompts_are_drawn_in_proportion_to_their_score():
    buffer = ReplayBuffer()
    for token, score in ((1, 0.2), (2, 0.8)):
        buffer.add(found((token,) * 4, score, str(token)))
    drawn = buffer.sample(5000)  # more than it holds
    assert abs(sum(item.text == "2" for item in drawn) / 5000 - 0.8) < 0.03
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer().sample(1)


@settings(deadline=None, max_examples=30)
@given(st.lists(items, min_size=1, max_size=10))
def test_a_saved_buffer_goes_on_as_it_would_have(tmp_path_factory, items_found):
    path = tmp_path_factory.mktemp("buffer") / "b.jsonl"
    buffer = ReplayBuffer(5, seed=3)
    for item in items_found:
        buffer.add(item)
    buffer.sample(3)
    buffer.save(path)
    again = ReplayBuffer.load(path)
    assert again.items == buffer.items and (again.capacity, again.tolerance) == (5, 0.25)
    assert again.sample(8) == buffer.sample(8)


def test_texts_of_any_kind_survive(tmp_path):
    buffer = ReplayBuffer()
    for number, text in enumerate(['a, "b"\n', "c\u2028d", "\U0001f600", "\\n;\t", "{}"]):
        buffer.add(found((number,) * 4, 0.5, text))
    buffer.save(tmp_path / "b.jsonl")
    assert ReplayBuffer.load(tmp_path / "b.jsonl").items == buffer.items


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="not a saved replay buffer"):
        ReplayBuffer.load(tmp_path / "x.jsonl")


def test_distances_to_nothing():
    assert edit_distances((1, 2), []).shape == (0,) and np.array_equal(edit_distances((), [(1,), ()]), [1, 0])
