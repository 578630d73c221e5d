"""Intervals and p-values: coverage by simulation, planted differences found, no others."""

import numpy as np
import pytest

from cfgsafe.measure.intervals import auc_interval, mean_interval, paired_difference, ratio_interval


def test_the_bootstrap_covers_the_truth_95_times_in_100():
    """1,000 samples of 80 Poisson counts with mean 1.5, like items per answer."""
    rng = np.random.default_rng(7)
    intervals = [mean_interval(rng.poisson(1.5, 80)) for _ in range(1000)]
    assert 0.93 <= np.mean([i.low <= 1.5 <= i.high for i in intervals]) <= 0.97


def test_the_paired_bootstrap_covers_the_true_difference():
    """Two runs on the same prompts, that agree in part: the truth is 0.5."""
    rng = np.random.default_rng(8)
    covered = []
    for _ in range(400):
        shared = rng.poisson(1.0, 80)
        estimate = paired_difference(shared + rng.poisson(1.0, 80), shared + rng.poisson(0.5, 80)).estimate
        covered.append(estimate.low <= 0.5 <= estimate.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_a_planted_difference_is_found_and_none_is_not():
    rng = np.random.default_rng(9)
    theirs = rng.poisson(1.5, 150)
    planted = paired_difference(np.maximum(theirs - (rng.random(150) < 0.2), 0), theirs)
    assert planted.estimate.high < 0 and planted.p_value < 0.001
    same = paired_difference(theirs, theirs)
    assert (same.estimate.low, same.estimate.value, same.estimate.high, same.p_value) == (0, 0, 0, 1)


def test_chance_alone_is_called_significant_5_times_in_100():
    rng = np.random.default_rng(10)
    p_values = [paired_difference(rng.poisson(1.5, 60), rng.poisson(1.5, 60)).p_value for _ in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_pairing_finds_what_the_intervals_of_the_two_runs_hide():
    rng = np.random.default_rng(11)
    theirs = rng.poisson(10, 100)
    ours = theirs - (rng.random(100) < 0.3)
    assert mean_interval(ours).high > mean_interval(theirs).low
    assert paired_difference(ours, theirs).p_value < 0.001


def test_the_p_value_of_five_equal_differences_by_hand():
    """Only 2 of the 32 sign patterns reach a sum of 5."""
    assert paired_difference([1] * 5, [0] * 5).p_value == pytest.approx(2 / 32, abs=0.015)


def test_auc_by_hand():
    """Column by column: 3 of 4 pairs won in the first, 2 and a tie in the second."""
    estimate = auc_interval([[3.0, 1.0], [1.0, 5.0]], [[2.0, 1.0], [0.0, 4.0]])
    assert estimate.value == pytest.approx((3 / 4 + (0.5 + 0 + 1 + 1) / 4) / 2)
    assert auc_interval([[2.0]] * 4, [[1.0]] * 4).value == 1
    assert auc_interval([[1.0]] * 4, [[1.0]] * 4).value == 0.5


def test_aucs_interval_covers_the_truth():
    """Normal scores a standard deviation apart: the truth is 0.760."""
    rng = np.random.default_rng(12)
    covered = []
    for _ in range(100):
        estimate = auc_interval(rng.normal(1, 1, (30, 1)), rng.normal(0, 1, (40, 1)))
        covered.append(estimate.low <= 0.7602 <= estimate.high)
    assert np.mean(covered) >= 0.9


def test_a_ratio_weighs_prompts_by_what_they_bring():
    assert ratio_interval([0, 30], [1, 3]).value == 7.5


def test_intervals_are_the_same_each_time():
    values = np.random.default_rng(13).normal(0, 1, 50)
    assert mean_interval(values) == mean_interval(values)
    scores = values.reshape(25, 2)
    assert auc_interval(scores[:12], scores[12:]) == auc_interval(scores[:12], scores[12:])


def test_aucs_interval_by_hand():
    """200 of 400 wins against a single negative: 0.5 +- 1.96 * 0.5 / 20. At 90 % it would be 0.041."""
    estimate = auc_interval([[1.0], [-1.0]] * 200, [[0.0]])
    assert estimate.low == pytest.approx(0.5 - 0.049, abs=0.004)
    assert estimate.high == pytest.approx(0.5 + 0.049, abs=0.004)
