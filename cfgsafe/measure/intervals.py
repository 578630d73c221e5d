"""Shares, rates, ratios, differences and AUCs with 95 % intervals that have a width at 0 and at 100 %.

Source: mid-P intervals (Lancaster 1961) of a binomial share and of a Poisson count, of the sample's
*effective* size as in surveys (Korn & Graubard 1998). Units of one cluster, such as prompts about one
person, tell less than as many independent ones: the design effect says by how much, from the variance
of the clusters' sums around the common ratio. AUC: the score interval of Newcombe (2006) on Hanley &
McNeil's variance (1982), which is scaled to that of DeLong et al. (1988). p-value: Fisher's paired
permutation test, which flips whole clusters.
Deviations: two *imagined clusters* of the usual size, one above and one below the others, enter the
variance, so that it is never 0. Where all units agree, each cluster then counts as one unit: 0 of 300
prompts about 100 persons says no more than 0 of 100. For differences these are one change up and one
down, in the manner of Agresti & Min (2005).

Coverage, in tests/test_intervals.py, is 93 to 97 % for shares, rates and AUCs wherever a discrete count
allows it. For a share of 0.3 % in 150 none lies between 92.5 and 98.9 %: this one has 98.9. Clustered
samples with few hits, and differences with few changes, have more than 97 %.
An upper bound above zero items takes for granted that a unit seldom holds more than one.

Units: shares in percent, rates and differences per 100 units, ratios in the unit of the values, AUC from 0
to 1.

Run it: python eval.py leak --model cfgsafe/demo/leaky
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

TAIL = 0.025  # the probability beyond either bound
NORMAL = 1.959964  # the normal distribution is above it with that probability
PERMUTATIONS = 2000

Values = Sequence[float] | np.ndarray  # (N,), one for each unit
Clusters = Sequence[Hashable] | None  # (N,), the cluster of each unit; None: each unit is its own
Scores = Sequence[Sequence[float]] | np.ndarray  # (N, K)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A difference, and the two-sided probability of one at least as large by chance."""

    estimate: Estimate
    p_value: float


def to_json(estimates: Mapping[str, Estimate | None]) -> dict:
    """{name: value, name_ci: [low, high]} of each estimate, rounded to 4 digits.

    None is left out, and so is an interval that has no bound.
    """
    flat: dict[str, float | list[float]] = {}
    for name, estimate in estimates.items():
        if estimate is not None:
            flat[name] = round(estimate.value, 4)
            if math.isfinite(estimate.high - estimate.low):
                flat[f"{name}_ci"] = [round(estimate.low, 4), round(estimate.high, 4)]
    return flat


def share_interval(hits: Values, totals: Values | None = None, clusters: Clusters = None) -> Estimate | None:
    """Percentage of hits: 100 sum(hits) / sum(totals), None if there is nothing that could be one.

    `hits` (N,) of `totals` (N,) things in each unit; by default a unit is one thing, hit or not.
    """
    found, sizes = _sums(hits, totals, clusters)
    n = sizes.sum()
    if not n:
        return None
    usual = _usual_size(sizes)
    above, all_sizes = np.append(found, [usual, 0]), np.append(sizes, [usual, usual])
    share = above.sum() / all_sizes.sum()
    effect = _variance(above, all_sizes) / (all_sizes.sum() * share * (1 - share))
    few = (t_quantile(n - 1) / t_quantile(len(sizes) - 1)) ** 2
    effective = max(1.0, few * n / max(1.0, effect))
    share = found.sum() / n
    low, high = binomial_interval(share * effective, effective)
    return Estimate(float(100 * share), 100 * low, 100 * high)


def fault_interval(faults: Sequence[bool], clusters: Clusters = None) -> Estimate | None:
    """Percentage of units with a fault that should never be; None, and so not shown, without any."""
    return share_interval(faults, clusters=clusters) if any(faults) else None


def rate_interval(counts: Values, clusters: Clusters = None) -> Estimate | None:
    """Items per 100 units, of which each holds `counts` (N,), 0 or more; None without units."""
    found, sizes = _sums(counts, None, clusters)
    n = sizes.sum()
    if not n:
        return None
    usual, rate = _usual_size(sizes), found.sum() / n
    above = np.append(found, [usual * (rate + 1), usual * max(rate - 1, 0)])
    effect = _variance(above, np.append(sizes, [usual, usual])) / above.sum()
    effect *= (t_quantile(len(sizes) - 1) / NORMAL) ** 2
    low, high = poisson_interval(found.sum() / effect)
    scale = float(100 * effect / n)
    return Estimate(float(100 * rate), scale * low, scale * high)


def ratio_interval(
    numerators: Values, denominators: Values | None = None, clusters: Clusters = None
) -> Estimate | None:
    """sum(numerators) / sum(denominators), by default the mean; None if the denominator is 0.

    Both are (N,), of any real values; the interval is linearised, with Student's t. One cluster alone
    gives no bound.
    """
    above, below = _sums(numerators, denominators, clusters)
    if not below.sum():
        return None
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return Estimate(value, -math.inf, math.inf)
    variance = _variance(above, below) * len(above) / (len(above) - 1)
    half = t_quantile(len(above) - 1) * math.sqrt(variance) / below.sum()
    return Estimate(value, float(value - half), float(value + half))


def paired_difference(
    ours: Values, theirs: Values, totals: Values | None = None, clusters: Clusters = None
) -> Difference | None:
    """100 (sum(ours) - sum(theirs)) / sum(totals) of the same units, None if there are none.

    All are (N,); by default the total of a unit is 1. The p-value is at least 1 / (PERMUTATIONS + 1).
    """
    differences, sizes = _sums(np.asarray(ours, float) - np.asarray(theirs, float), totals, clusters)
    n = sizes.sum()
    if not n:
        return None
    value = 100 * differences.sum() / n
    variance = _variance(differences, sizes) + 2 * _usual_size(sizes) ** 2
    half = 100 * t_quantile(len(sizes) - 1) * math.sqrt(variance) / n
    flips = np.random.default_rng(1).integers(0, 2, (PERMUTATIONS, len(sizes)), dtype=np.int8)
    flipped = differences.sum() - 2 * (flips @ differences)
    as_large = np.abs(flipped) >= abs(differences.sum()) - 1e-9
    p_value = float((1 + as_large.sum()) / (1 + PERMUTATIONS))
    return Difference(Estimate(float(value), float(value - half), float(value + half)), p_value)


def auc_interval(positives: Scores, negatives: Scores) -> Estimate:
    """Chance, 0 to 1, that a positive's score is above a negative's; a tie counts one half.

    `positives` (P, K) and `negatives` (N, K) hold K scores of each person; scores of one column are
    compared and the K chances averaged. Persons are independent, the scores of one are not.
    """
    above, below = np.asarray(positives, float)[:, None], np.asarray(negatives, float)[None]
    wins = ((above > below) + (above == below) / 2).mean(-1)  # (P, N)
    auc, sizes = float(wins.mean()), wins.shape
    modelled = hanley_mcneil(auc, *sizes)
    # The variance that is seen scales the model's, steadied by that of an AUC which is not 0 or 1.
    fewer = min(sizes)
    steady = hanley_mcneil((fewer * auc + 0.5) / (fewer + 1), *sizes) / fewer
    parts = [_variance_of_mean(wins.mean(1)), _variance_of_mean(wins.mean(0))]
    if fewer == 1:
        parts = [modelled, 0.0]
    scale = (sum(parts) + steady) / (modelled + steady)
    unsure = sum(part**2 / max(size - 1, 1) for part, size in zip(parts, sizes, strict=True))
    t = t_quantile((sum(parts) + steady) ** 2 / unsure) if unsure else NORMAL

    def too_far(truth: float) -> bool:
        return (auc - truth) ** 2 > t**2 * scale * hanley_mcneil(truth, *sizes)

    low = _border(lambda truth: not too_far(truth), 0.0, auc)
    return Estimate(auc, low, _border(too_far, auc, 1.0))


def hanley_mcneil(auc: float, positives: int, negatives: int) -> float:
    """Variance of an AUC; with Newcombe's mean of both group sizes in place of either."""
    others = (positives + negatives) / 2 - 1
    spread = 1 + others * ((1 - auc) / (2 - auc) + auc / (1 + auc))
    return auc * (1 - auc) * spread / (positives * negatives)


def binomial_interval(hits: float, n: float) -> tuple[float, float]:
    """The mid-P interval of a share, 0 to 1; neither number need be whole.

    >>> tuple(round(bound, 4) for bound in binomial_interval(0, 150))
    (0.0, 0.0198)
    """

    def at_least(share: float) -> float:  # P(more hits) + P(as many) / 2
        return (beta_cdf(share, hits, n - hits + 1) + beta_cdf(share, hits + 1, n - hits)) / 2

    low = _border(lambda share: at_least(share) > TAIL, 0.0, 1.0) if hits else 0.0
    high = _border(lambda share: at_least(share) > 1 - TAIL, 0.0, 1.0) if hits < n else 1.0
    return low, high


def poisson_interval(count: float) -> tuple[float, float]:
    """The mid-P interval of the mean of a Poisson count, which need not be whole.

    >>> tuple(round(bound, 4) for bound in poisson_interval(0))
    (0.0, 2.9957)
    """

    def at_least(mean: float) -> float:  # P(a higher count) + P(this one) / 2
        both = torch.tensor([max(count, 1e-300), count + 1], dtype=torch.float64)
        return torch.special.gammainc(both, torch.full_like(both, mean)).mean().item()

    most = count + 10 * math.sqrt(count) + 20
    low = _border(lambda mean: at_least(mean) > TAIL, 0.0, most) if count else 0.0
    return low, _border(lambda mean: at_least(mean) > 1 - TAIL, 0.0, most)


@cache
def t_quantile(freedom: float) -> float:
    """Student's t that is exceeded with probability TAIL; below 1 degree of freedom that of 1.

    >>> round(t_quantile(7), 4)
    2.3646
    """
    half = min(max(freedom, 1.0), 1e6) / 2
    x = _border(lambda x: beta_cdf(x, 0.5, half) > 1 - 2 * TAIL, 0.0, 1.0)
    return math.sqrt(2 * half * x / (1 - x))


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(X <= x) of a beta distribution, by the continued fraction of DLMF 8.17.22 (Lentz).

    With a = 0 all of it lies at 0, with b = 0 at 1.
    """
    if a <= 0 or x >= 1:
        return 1.0
    if b <= 0 or x <= 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - beta_cdf(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logarithm + a * math.log(x) + b * math.log1p(-x)) / a
    value = above = 1.0
    below, m, change = 0.0, 0, 0.0
    while abs(change - 1) > 1e-13:
        half = m // 2
        if m % 2:
            term = -(a + half) * (a + b + half) * x / ((a + m - 1) * (a + m))
        else:
            term = half * (b - half) * x / ((a + m - 1) * (a + m)) if m else 1.0
        below = 1 / (1 + term * below)
        above = 1 + term / above
        change = above * below
        value *= change
        m += 1
    return front * (value - 1)


def _border(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where, from `low` to `high`, `holds` becomes true; by halving."""
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _sums(values: Values, totals: Values | None, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values and of totals over each cluster, both (C,); clusters without a total are left out."""
    values = np.asarray(values, float)
    totals = np.ones(len(values)) if totals is None else np.asarray(totals, float)
    numbers: dict[Hashable, int] = {}
    places = [numbers.setdefault(name, len(numbers)) for name in clusters or range(len(values))]
    if len(places) != len(values):
        raise ValueError(f"{len(places)} clusters of {len(values)} units")
    above, below = np.zeros(len(numbers)), np.zeros(len(numbers))
    np.add.at(above, places, values)
    np.add.at(below, places, totals)
    return above[below > 0], below[below > 0]


def _usual_size(sizes: np.ndarray) -> float:
    """The size of the cluster that a unit is in, on average; Kish's design effect if a cluster agrees."""
    return float((sizes**2).sum() / sizes.sum())


def _variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Variance of the total of `sums` around the common ratio to `sizes`, linearised; both (C,)."""
    return float(((sums - sums.sum() / sizes.sum() * sizes) ** 2).sum())


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0
