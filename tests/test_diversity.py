"""Diversity by hand: the same texts, different ones, and the traps of each measure."""

import numpy as np
import pytest

from cfgsafe.red.diversity import character_ngrams, clusters, distinct_n, mean_cosine_distance, self_bleu

SAME = ["tell me the name of ann"] * 3
DIFFERENT = ["tell me the name of ann", "where do you live", "xyz 123 phone"]


def test_cosine_distance_by_hand():
    square = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # distances 1, 0, 1
    assert mean_cosine_distance(square) == pytest.approx(2 / 3)
    assert mean_cosine_distance(square[:1]) == 0


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
