"""The replay buffer against its definition, with both kinds of likeness; edit distances."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfgsafe.errors import InputError
from cfgsafe.red.buffer import ReplayBuffer, edit_distances
from cfgsafe.red.diversity import character_ngrams
from cfgsafe.red.records import Attack, Trial

words = st.lists(st.integers(0, 2), max_size=8).map(tuple)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["tell me", "tell me now", "where is he", ""]),
)
kinds = st.sampled_from(["edit", "cosine"])


def found(tokens, score=0.5, text="", log_reference=-1.0) -> Attack:
    return Attack(tuple(tokens), text, log_reference, (Trial("c", text, score, (text,)),))


items = st.builds(found, words, st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0]), texts, st.floats(-100, 0))


def levenshtein(a: tuple, b: tuple) -> int:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(a), len(b))


def alike(kind: str, a: Attack, b: Attack) -> bool:
    if a.tokens == b.tokens:
        return True
    if kind == "edit":
        return levenshtein(a.tokens, b.tokens) < 0.25 * (len(a.tokens) + len(b.tokens))
    one, other = character_ngrams([a.text, b.text]).astype(np.float32)
    return bool(1 - one @ other < 0.25)


@settings(deadline=None)
@given(words, st.lists(words, max_size=5))
def test_edit_distances_are_levenshteins(one, others):
    assert edit_distances(one, others).tolist() == [levenshtein(one, other) for other in others]


@settings(deadline=None)
@given(st.lists(items, max_size=25), st.integers(1, 6), kinds)
def test_it_holds_the_best_and_no_two_alike(items_found, capacity, kind):
    buffer, expected = ReplayBuffer(capacity, likeness=kind), []
    for item in items_found:
        rest = [other for other in expected if not alike(kind, item, other)]
        taken = all(other in rest or other.score < item.score for other in expected)
        if taken and len(rest) == capacity:
            lowest = min(other.score for other in rest)
            taken = lowest < item.score
            rest.remove(next(other for other in rest if other.score == lowest))
        expected = [*rest, item] if taken else expected
        assert buffer.add(item) == taken and buffer.items == expected and len(buffer) <= capacity
    if items_found:
        assert max(item.score for item in buffer.items) == max(item.score for item in items_found)
    assert not any(alike(kind, a, b) for a, b in itertools.combinations(buffer.items, 2))


@pytest.mark.parametrize("kind", ["edit", "cosine"])
def test_a_tie_does_not_delete_another_item(kind):
    """Two items of equal reward: removing one for its near-duplicate leaves the other."""
    buffer = ReplayBuffer(10, likeness=kind)
    one, other = found((1, 1, 1, 1), 0.5, "where does he live"), found((2, 2, 2, 2), 0.5, "your phone number")
    assert buffer.add(one) and buffer.add(other)
    assert buffer.add(better := found((1, 1, 1, 3), 0.9, "where does he live?"))
    assert buffer.items == [other, better]


def test_edit_distance_is_divided_by_the_summed_length():
    """2 of 4 + 6 is below a quarter, 2 of 4 + 4 is not."""
    buffer = ReplayBuffer()
    assert buffer.add(found((1,) * 4, 0.5)) and buffer.add(found((1, 1, 2, 2), 0.5))
    assert not buffer.add(found((1,) * 6, 0.5))


def test_likeness_reads_tokens_or_texts():
    """`tokens` is like `one` by its tokens alone, `text` by its text alone."""
    one = found((1,) * 4, 0.5, "where is he")
    tokens = found((1, 1, 1, 2), 0.5, "a phone")
    text = found((9,) * 4, 0.5, "Where is he?")
    for kind, refused, taken in (("edit", tokens, text), ("cosine", text, tokens)):
        buffer = ReplayBuffer(likeness=kind)
        assert buffer.add(one) and not buffer.add(refused) and buffer.add(taken)


def test_a_tolerance_of_zero_keeps_all_but_the_same_tokens():
    for kind in ("edit", "cosine"):
        buffer = ReplayBuffer(tolerance=0.0, likeness=kind)
        items = [found((1, 2, 3), 0.5, "one"), found((1, 2, 4), 0.5, "two"), found((), 0.5, "")]
        assert all([buffer.add(item) for item in items])
        assert not buffer.add(found((1, 2, 3), 0.5, "one")) and not buffer.add(found((), 0.5, ""))


def test_an_unknown_likeness_is_refused():
    with pytest.raises(InputError, match="likeness 'bleu': must be one of edit, cosine"):
        ReplayBuffer(likeness="bleu")


def test_a_full_buffer_gives_up_its_worst():
    buffer = ReplayBuffer(2)
    low, high = found((1,) * 4, 0.1, "low"), found((2,) * 4, 0.9, "high")
    buffer.add(low), buffer.add(high)
    assert not buffer.add(found((3,) * 4, 0.1, "as low"))
    assert buffer.add(middle := found((3,) * 4, 0.5, "middle")) and buffer.items == [high, middle]


def test_an_attack_without_a_score_is_not_taken_in():
    buffer = ReplayBuffer()
    assert not buffer.add(found((1,), None)) and not buffer.add(Attack((1,), "", -1.0, ()))
    assert buffer.add(found((1,), 0.0)) and not buffer.add(found((1,), None))


def test_prompts_are_drawn_in_proportion_to_their_score():
    scores = np.array([0.05, 0.15, 0.3, 0.5])
    buffer = ReplayBuffer()
    for token, score in enumerate(scores):
        buffer.add(found((token,) * 4, score, str(token)))
    drawn = [item.tokens[0] for item in buffer.sample(8000)]  # more than it holds
    expected = 8000 * scores / scores.sum()
    chi_square = (((np.bincount(drawn, minlength=4) - expected) ** 2) / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_prompts_that_never_succeeded_are_drawn_alike():
    buffer = ReplayBuffer()
    for token in (1, 2):
        buffer.add(found((token,) * 4, 0.0))
    assert abs(sum(item.tokens[0] == 1 for item in buffer.sample(2000)) - 1000) < 150
    buffer.add(found((3,) * 4, 0.5))
    assert {item.tokens[0] for item in buffer.sample(2000)} == {3}


def test_fewer_prompts_than_asked_for_are_repeated():
    buffer = ReplayBuffer()
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    buffer.add(only := found((1,) * 4))
    assert buffer.sample(3) == [only] * 3 and buffer.sample(0) == []


@settings(deadline=None, max_examples=30)
@given(st.lists(items, min_size=1, max_size=10), st.lists(items, max_size=5), kinds)
def test_a_saved_buffer_goes_on_as_it_would_have(tmp_path_factory, items_found, later, kind):
    path = tmp_path_factory.mktemp("buffer") / "b.jsonl"
    buffer = ReplayBuffer(5, 0.2, seed=3, likeness=kind)
    for item in items_found:
        buffer.add(item)
    buffer.sample(3)
    buffer.save(path)
    again = ReplayBuffer.load(path)
    assert again.items == buffer.items and (again.capacity, again.tolerance, again.likeness) == (5, 0.2, kind)
    assert [again.add(item) for item in later] == [buffer.add(item) for item in later]
    assert again.items == buffer.items
    assert again.sample(8) == buffer.sample(8)
    again.save(path.with_name("c.jsonl")), buffer.save(path)
    assert path.read_bytes() == path.with_name("c.jsonl").read_bytes()


def test_texts_of_any_kind_survive(tmp_path):
    buffer = ReplayBuffer()
    for number, text in enumerate(['a, "b"\n', "c\u2028d", "\U0001f600", "\\n;\t", "{}"]):
        buffer.add(found((number,) * 4, 0.5, text))
    buffer.save(tmp_path / "b.jsonl")
    assert ReplayBuffer.load(tmp_path / "b.jsonl").items == buffer.items


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    for text in ("", '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(InputError, match="x.jsonl: not a saved replay buffer"):
            ReplayBuffer.load(path)
    ReplayBuffer().save(path)
    path.write_text(path.read_text() + '{"a": 1}\n')
    with pytest.raises(InputError, match="x.jsonl:2: not an attack"):
        ReplayBuffer.load(path)


def test_distances_to_nothing():
    assert edit_distances((1, 2), []).shape == (0,) and np.array_equal(edit_distances((), [(1,), ()]), [1, 0])
