"""Intervals and p-values: exact or simulated coverage, widths at the ends, clusters, planted differences."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from cfgsafe.measure.intervals import (
    auc_interval,
    beta_cdf,
    binomial_interval,
    paired_difference,
    poisson_interval,
    rate_interval,
    ratio_interval,
    share_interval,
    t_quantile,
    to_json,
)

THREES = np.arange(100).repeat(3)  # the clusters of 3 prompts of each of 100 persons


def chances_of(n: int, share: float) -> np.ndarray:
    """Chance of each number of hits, 0 to n, in n."""
    hits = np.arange(n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(h + 1) - math.lgamma(n - h + 1) for h in hits])
    return np.exp(ways + hits * math.log(share) + (n - hits) * math.log1p(-share))


def coverage(estimates: list, truth: float) -> float:
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def attainable(n: int, share: float) -> float:
    """The lowest coverage of at least 93 % that an interval around the likeliest counts can have."""
    covered = np.cumsum(np.sort(chances_of(n, share))[::-1])
    return float(covered[covered >= 0.93][0])


@pytest.mark.parametrize("n", [150, 338])
@pytest.mark.parametrize("share", [0.003, 0.05, 0.5, 0.995])
def test_a_share_is_covered_93_to_97_times_in_100_or_as_near_as_counts_allow(n, share):
    """Exact: the chances of all counts whose interval holds the truth. 0.3 % allows 98.9 and 98.0 %."""
    bounds = [binomial_interval(hits, n) for hits in range(n + 1)]
    inside = [low <= share <= high for low, high in bounds]
    covered = chances_of(n, share)[inside].sum()
    assert 0.93 <= covered <= max(0.97, attainable(n, share)) + 1e-3


def test_shares_of_0_3_percent_have_no_coverage_between():
    """0 and 1 hits of 150 have 92.5 % of the chance, 0 to 2 have 98.9 %."""
    chances = chances_of(150, 0.003)
    assert chances[:2].sum() == pytest.approx(0.9248, abs=1e-4)
    assert chances[:3].sum() == attainable(150, 0.003) == pytest.approx(0.9893, abs=1e-4)


@pytest.mark.parametrize("mean", [0.05, 0.5, 1.5])
def test_a_rate_of_items_is_covered(mean):
    """150 answers with a Poisson number of items."""
    rng = np.random.default_rng(8)
    estimates = [rate_interval(rng.poisson(mean, 150)) for _ in range(500)]
    assert 0.93 <= coverage(estimates, 100 * mean) <= 0.97


@pytest.mark.parametrize(("items", "share"), [(1, 0.5), (3, 0.05), (3, 0.5), (3, 0.95)])
def test_a_rate_of_answers_that_leak_all_or_nothing_is_covered(items, share):
    rng = np.random.default_rng(6)
    estimates = [rate_interval(items * (rng.random(150) < share)) for _ in range(400)]
    assert 0.93 <= coverage(estimates, 100 * items * share) <= 0.975


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_prompts_of_one_person_are_covered_only_as_clusters(share):
    """3 prompts a person, shares of a beta distribution with an intra-class correlation of 0.3."""
    rng = np.random.default_rng(5)
    samples = [
        rng.random(300) < rng.beta(share * 7 / 3, (1 - share) * 7 / 3, 100).repeat(3) for _ in range(200)
    ]
    clustered = [share_interval(hits, clusters=list(THREES)) for hits in samples]
    covered = coverage(clustered, 100 * share)
    assert 0.93 <= covered <= 0.985
    assert coverage([share_interval(hits) for hits in samples], 100 * share) < covered - 0.03


def test_clustered_items_are_covered():
    rng = np.random.default_rng(4)
    estimates = []
    for _ in range(400):
        counts = rng.poisson(rng.gamma(2, 0.25, 100).repeat(3))
        estimates.append(rate_interval(counts, list(THREES)))
    assert 0.93 <= coverage(estimates, 50) <= 0.97


@pytest.mark.parametrize("truth", [0.6, 0.75, 0.9])
def test_an_auc_of_8_against_64_is_covered(truth):
    rng = np.random.default_rng(14)
    shift = math.sqrt(2) * NormalDist().inv_cdf(truth)
    estimates = []
    for _ in range(500):
        estimates.append(auc_interval(rng.normal(shift, 1, (8, 1)), rng.normal(0, 1, (64, 1))))
    assert 0.93 <= coverage(estimates, truth) <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.5, 0.6, 0.75, 0.9, 0.97])
@pytest.mark.parametrize(("questions", "spread", "least"), [(1, 1, 0.94), (9, 1, 0.94), (1, 2, 0.92)])
def test_an_auc_is_covered_with_many_questions_and_with_spread_positives(truth, questions, spread, least):
    """9 scores of each person, who has half of their variance; or positives that spread twice as far."""
    rng = np.random.default_rng(3)
    shift = math.sqrt(1 + spread**2) * NormalDist().inv_cdf(truth)
    own = 1 if questions == 1 else 0.5  # the person's share of the variance

    def scores(persons: int) -> np.ndarray:
        of_person, of_question = rng.normal(0, 1, (persons, 1)), rng.normal(0, 1, (persons, questions))
        return math.sqrt(own) * of_person + math.sqrt(1 - own) * of_question

    estimates = [auc_interval(shift + spread * scores(8), scores(64)) for _ in range(2000)]
    assert least <= coverage(estimates, truth) <= 0.995


def test_a_paired_difference_is_covered():
    """Two runs on the same prompts, that agree in part: the truth is 50 per 100."""
    rng = np.random.default_rng(8)
    estimates = []
    for _ in range(400):
        shared = rng.poisson(1.0, 80)
        found = paired_difference(shared + rng.poisson(1.0, 80), shared + rng.poisson(0.5, 80))
        estimates.append(found.estimate)
    assert 0.93 <= coverage(estimates, 50) <= 0.97


@pytest.mark.parametrize("share", [0.003, 0.05, 0.3])
def test_the_difference_of_a_few_answers_is_covered(share):
    """Ours leaks one item less than theirs in some of 150 answers."""
    rng = np.random.default_rng(2)
    estimates = [paired_difference(rng.random(150) >= share, np.ones(150)).estimate for _ in range(400)]
    assert coverage(estimates, -100 * share) >= 0.92


def test_a_mean_over_dialogues_is_covered():
    """Losses of 30 dialogues of unequal length, each with a difficulty of its own."""
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(400):
        tokens = rng.integers(20, 200, 30)
        estimates.append(ratio_interval(tokens * rng.normal(2, 0.5, 30), tokens))
    assert 0.92 <= coverage(estimates, 2) <= 0.97


def test_what_all_units_share_is_not_certain():
    """150 of 150 leave up to 2 %, the rule of three; an interval of no width would claim to know."""
    assert share_interval([1] * 150).low == pytest.approx(100 * 0.05 ** (1 / 150), abs=1e-6)
    assert share_interval([0] * 150).high == pytest.approx(100 - 100 * 0.05 ** (1 / 150), abs=1e-6)
    assert rate_interval([0] * 150).high == pytest.approx(2.0, abs=0.1)
    ones = rate_interval([1] * 150)
    assert (ones.low, ones.value, ones.high) == pytest.approx((98.2, 100, 101.8), abs=0.1)
    same = paired_difference([3] * 150, [3] * 150)
    assert (same.estimate.value, same.p_value) == (0, 1)
    assert same.estimate.high == -same.estimate.low == pytest.approx(1.976 * math.sqrt(2) / 1.5, abs=1e-3)
    perfect = auc_interval([[1.0]] * 8, [[0.0]] * 64)
    assert perfect.high == perfect.value == 1 and 0.84 < perfect.low < 0.88


def test_no_hit_of_100_persons_says_no_more_with_three_prompts_each():
    alone = share_interval([0] * 100)
    assert share_interval([0] * 300, clusters=list(THREES)).high == pytest.approx(alone.high, rel=0.03)
    assert share_interval([0] * 300).high < 0.4 * alone.high
    assert rate_interval([0] * 300, list(THREES)).high == pytest.approx(3.0, abs=0.1)
    changed = paired_difference([0] * 300, [0] * 300, clusters=list(THREES)).estimate
    assert changed.high == pytest.approx(t_quantile(99) * math.sqrt(18) / 3, abs=1e-6)


def test_one_hit_says_no_less_of_the_upper_bound_than_none():
    one = [1] + [0] * 299
    for interval in (
        lambda hits: share_interval(hits, None, list(THREES)),
        lambda n: rate_interval(n, list(THREES)),
    ):
        none, some = interval([0] * 300), interval(one)
        assert some.high > none.high and some.low > 0


def test_clusters_that_differ_no_more_than_units_cost_little():
    rng = np.random.default_rng(0)
    hits = rng.random(300) < 0.3
    alone, clustered = share_interval(hits), share_interval(hits, clusters=list(THREES))
    assert 1 <= (clustered.high - clustered.low) / (alone.high - alone.low) < 1.1


def test_one_cluster_is_one_unit():
    """20 items of one dialogue, none of them found: nothing is known of other dialogues."""
    assert share_interval([0] * 20, clusters=["a"] * 20).high == pytest.approx(95)
    lone = ratio_interval([4.0], [2])
    assert (lone.value, lone.low, lone.high) == (2, -math.inf, math.inf)
    assert to_json({"fluency": lone}) == {"fluency": 2}


def test_where_there_is_nothing_to_count_there_is_no_figure():
    empty = [share_interval([0], [0]), rate_interval([]), ratio_interval([0], [0]), paired_difference([], [])]
    assert empty == [None] * 4
    assert to_json({"recall": share_interval([0, 0], [0, 0])}) == {}


def test_a_share_weighs_units_by_what_they_hold():
    assert share_interval([0, 3], [1, 5]).value == 50
    assert ratio_interval([0, 30], [1, 3]).value == 7.5
    assert paired_difference([1, 3], [0, 1], totals=[2, 4]).estimate.value == 50


def test_a_planted_difference_is_found():
    rng = np.random.default_rng(9)
    theirs = rng.poisson(1.5, 150)
    planted = paired_difference(np.maximum(theirs - (rng.random(150) < 0.2), 0), theirs)
    assert planted.estimate.high < 0 and planted.p_value < 0.001


def test_chance_alone_is_called_significant_5_times_in_100():
    rng = np.random.default_rng(10)
    p_values = [paired_difference(rng.poisson(1.5, 60), rng.poisson(1.5, 60)).p_value for _ in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_pairing_finds_what_the_intervals_of_the_two_runs_hide():
    rng = np.random.default_rng(11)
    theirs = rng.poisson(10, 100)
    ours = theirs - (rng.random(100) < 0.3)
    assert rate_interval(ours).high > rate_interval(theirs).low
    assert paired_difference(ours, theirs).p_value < 0.001


def test_the_p_value_of_five_equal_differences_by_hand():
    """Only 2 of the 32 sign patterns reach a sum of 5; of 2 persons, 2 of the 4 do."""
    assert paired_difference([1] * 5, [0] * 5).p_value == pytest.approx(2 / 32, abs=0.015)
    of_two = paired_difference([1] * 5, [0] * 5, clusters=list("aaabb"))
    assert of_two.p_value == pytest.approx(2 / 4, abs=0.04)


def test_auc_by_hand():
    """Column by column: 3 of 4 pairs won in the first, 2 and a tie in the second."""
    estimate = auc_interval([[3.0, 1.0], [1.0, 5.0]], [[2.0, 1.0], [0.0, 4.0]])
    assert estimate.value == pytest.approx((3 / 4 + (0.5 + 0 + 1 + 1) / 4) / 2)
    assert auc_interval([[2.0]] * 4, [[1.0]] * 4).value == 1
    assert auc_interval([[1.0]] * 4, [[1.0]] * 4).value == 0.5


def test_an_aucs_interval_by_hand():
    """Of 400 positives 200 win against each of 400 negatives: the variance of 0.5 is 1 / 1600."""
    estimate = auc_interval([[1.0], [-1.0]] * 200, [[0.0]] * 400)
    assert estimate.low == pytest.approx(0.5 - 1.96 / 40, abs=0.0005)
    assert estimate.high == pytest.approx(0.5 + 1.96 / 40, abs=0.0005)
    assert auc_interval([[1.0]], [[0.0]]).low < 0.3  # one pair proves little


def test_more_questions_about_the_same_persons_narrow_an_auc():
    """With scores that have nothing of the person; twice the same score tells nothing new."""
    rng = np.random.default_rng(13)
    ours, theirs = rng.normal(1, 1, (8, 9)), rng.normal(0, 1, (64, 9))
    nine, one = auc_interval(ours, theirs), auc_interval(ours[:, :1], theirs[:, :1])
    widths = []
    for place in range(9):
        alone = auc_interval(ours[:, [place]], theirs[:, [place]])
        widths.append(alone.high - alone.low)
    assert nine.high - nine.low < 0.8 * np.mean(widths)
    twice = auc_interval(ours[:, :1].repeat(2, 1), theirs[:, :1].repeat(2, 1))
    assert (twice.low, twice.high) == pytest.approx((one.low, one.high))


def test_published_quantiles():
    """Tables of Student's t, of the mid-P interval, and of the incomplete beta function."""
    assert [round(t_quantile(n), 3) for n in (1, 7, 30, 1e9)] == [12.706, 2.365, 2.042, 1.96]
    assert beta_cdf(0.5, 2, 3) == pytest.approx(11 / 16)
    assert beta_cdf(0.3, 2.5, 0.5) == pytest.approx(1 - beta_cdf(0.7, 0.5, 2.5))
    for hits, n, share in ((3, 10, 0.2), (0, 7, 0.3), (120, 150, 0.75)):
        assert beta_cdf(share, hits + 1, n - hits) == pytest.approx(chances_of(n, share)[hits + 1 :].sum())
    assert poisson_interval(5) == pytest.approx((1.8, 11.1), abs=0.05)


def test_intervals_are_the_same_each_time():
    ours, theirs = np.random.default_rng(13).poisson([[1.2], [1.0]], (2, 200))
    p_values = {paired_difference(ours, theirs).p_value for _ in range(5)}
    assert len(p_values) == 1 and 0.05 < p_values.pop() < 0.95


def test_clusters_of_another_number_are_refused():
    with pytest.raises(ValueError, match="2 clusters of 3 units"):
        share_interval([1, 0, 0], clusters=["a", "b"])
