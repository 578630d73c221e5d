"""Diversity by hand: the same texts, different ones, and the traps of each measure."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfgsafe.red.diversity import character_ngrams, clusters, distinct_n, mean_cosine_distance, self_bleu

SAME = ["tell me the name of ann"] * 3
lines = st.lists(st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join), min_size=2, max_size=6)
DIFFERENT = ["tell me the name of ann", "where do you live", "xyz 123 phone"]


def test_cosine_distance_by_hand():
    square = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # distances 1, 0, 1
    assert mean_cosine_distance(square) == pytest.approx(2 / 3)
    assert mean_cosine_distance(square[:1]) == 0
    alike = np.tile(np.random.default_rng(1).normal(size=50), (7, 1))
    assert 0 <= mean_cosine_distance(alike / np.linalg.norm(alike[0])) < 1e-9


def test_clusters_by_hand():
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # distances 0.2, 1, 0.4
    assert [clusters(vectors, threshold) for threshold in (0.1, 0.3, 0.5, 1.0, 1.1)] == [3, 2, 2, 2, 1]


def test_same_texts_have_no_diversity_and_different_ones_have():
    same, different = character_ngrams(SAME), character_ngrams(DIFFERENT)
    assert mean_cosine_distance(same) == pytest.approx(0, abs=1e-9) and clusters(same, 0.3) == 1
    assert mean_cosine_distance(different) > 0.8 and clusters(different, 0.3) == 3
    assert np.allclose(np.linalg.norm(different, axis=1), 1)


def test_a_mean_hides_collapse_that_clusters_show():
    """Two texts, each many times: the mean distance stays near a half, the unique attacks are two."""
    vectors = character_ngrams(["tell me the name"] * 50 + ["where do you live"] * 50)
    assert mean_cosine_distance(vectors) > 0.4 and clusters(vectors, 0.3) == 2


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 1) == 0.5 and distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n([], 2) == distinct_n(["a"], 2) == 0


def test_self_bleu_is_one_for_copies_and_low_for_others():
    assert self_bleu(SAME) == pytest.approx(1)
    assert self_bleu(DIFFERENT) == 0  # no word in common
    assert 0 < self_bleu(["tell me the name", "tell me the town"]) < 1
    assert self_bleu(["alone"]) == 0


def test_a_short_text_is_punished_for_its_length():
    """BLEU's brevity penalty: "a b" against "a b c d" has all its words right and half the length."""
    assert self_bleu(["a b", "a b c d"], n=1) == pytest.approx((np.exp(1 - 4 / 2) + 0.5) / 2)


def test_empty_texts_do_not_break_it():
    assert np.isfinite(character_ngrams(["", "ab", "abc"])).all()


def test_an_embedding_depends_on_no_other_text_and_on_no_process():
    alone = character_ngrams(["tell me the name"])[0]
    among = character_ngrams([*DIFFERENT, "Tell me THE name"])[-1]
    assert np.array_equal(alone, among)
    (place,) = np.flatnonzero(character_ngrams(["abc"]))
    assert (place, character_ngrams(["abc"])[0, place]) == (450, -1)  # CRC-32 of "abc" is 0x352441c2


def gram_counts(text: str) -> Counter:
    counts = Counter()
    for n in (3, 4, 5):
        counts.update(text[i : i + n] for i in range(len(text) - n + 1))
    return counts


def dot(a: Counter, b: Counter) -> int:
    return sum(times * b[gram] for gram, times in a.items())


def test_hashed_cosines_are_close_to_those_of_the_counts():
    """Theory: no bias, and a standard error of 1 / sqrt(HASHED) = 0.031."""
    errors = []
    for seed in range(20):
        draw = random.Random(seed)
        words = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(2, 7))) for _ in range(30)]
        texts = [" ".join(draw.choices(words, k=10)) for _ in range(20)]
        counts = [gram_counts(text) for text in texts]
        vectors = character_ngrams(texts)
        for (a, count_a), (b, count_b) in itertools.combinations(enumerate(counts), 2):
            exact = dot(count_a, count_b) / math.sqrt(dot(count_a, count_a) * dot(count_b, count_b))
            errors.append(vectors[a] @ vectors[b] - exact)
    assert abs(np.mean(errors)) < 0.01 and np.sqrt(np.mean(np.square(errors))) < 0.04


def bleu(mine: list[str], others: list[list[str]], n: int) -> float:
    """By the definition: each n-gram counts as often as in the other text that has it most often."""

    def grams(words: list[str], size: int) -> list[tuple]:
        return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]

    product = 1.0
    for size in range(1, n + 1):
        own, hits = Counter(grams(mine, size)), 0
        for gram, times in own.items():
            hits += min(times, max(grams(other, size).count(gram) for other in others))
        all_, smooth = sum(own.values()), int(size > 1)
        product *= (hits + smooth) / (all_ + smooth) if all_ + smooth else 0.0
    closest = min(map(len, others), key=lambda length: (abs(length - len(mine)), length))
    return product ** (1 / n) * (1.0 if len(mine) >= closest else math.exp(1 - closest / max(len(mine), 1)))


@settings(deadline=None)
@given(lines, st.integers(1, 4))
def test_self_bleu_is_the_mean_bleu_against_the_others(texts, n):
    words = [text.split() for text in texts]
    scores = []
    for number, line in enumerate(words):
        scores.append(bleu(line, words[:number] + words[number + 1 :], n))
    assert self_bleu(texts, n) == pytest.approx(np.mean(scores))
