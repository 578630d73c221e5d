"""Means, ratios, differences and AUCs with 95 % bootstrap intervals.

Source: Efron's percentile bootstrap, 2,000 resamples from a fixed seed; Fisher's paired
permutation test, which flips the sign of each prompt's difference. If all prompts have the same
value, the interval has no width, because resampling sees no variation.

Units: estimates have the unit of the values; callers pass 100 * count for percent and per 100
answers.

Run it: python eval.py leak --model cfgsafe/demo/leaky
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000

Values = Sequence[float] | np.ndarray  # (N,)
Scores = Sequence[Sequence[float]] | np.ndarray  # (N, K)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def to_json(estimates: dict[str, Estimate]) -> dict:
    """{name: value, name_ci: [low, high]} of each estimate, rounded to 4 digits."""
    flat: dict[str, float | list[float]] = {}
    for name, estimate in estimates.items():
        flat[name] = round(estimate.value, 4)
        flat[f"{name}_ci"] = [round(estimate.low, 4), round(estimate.high, 4)]
    return flat


def mean_interval(values: Values) -> Estimate:
    """Mean of `values` (N,), one for each unit that is resampled."""
    return ratio_interval(values, np.ones(len(values)))


def ratio_interval(numerators: Values, denominators: Values) -> Estimate:
    """sum(numerators) / sum(denominators), 0 if all denominators are 0.

    Both are (N,), one entry for each unit that is resampled: a prompt, a dialogue or a text.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if not below.sum():
        return Estimate(0.0, 0.0, 0.0)
    picks = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    resampled = above[picks].sum(1) / np.maximum(below[picks].sum(1), 1e-12)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """A mean difference, and the two-sided probability of one at least as large by chance."""

    estimate: Estimate
    p_value: float


def paired_difference(ours: Values, theirs: Values) -> Difference:
    """Mean of ours - theirs, both (N,), of the same prompts, which are resampled.

    The p-value is at least 1 / (RESAMPLES + 1).
    """
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    flips = np.random.default_rng(1).integers(0, 2, (RESAMPLES, len(differences)), dtype=np.int8)
    flipped = differences.sum() - 2 * (flips @ differences)
    as_large = np.abs(flipped) >= abs(differences.sum()) - 1e-9
    return Difference(mean_interval(differences), float((1 + as_large.sum()) / (1 + RESAMPLES)))


def auc_interval(positives: Scores, negatives: Scores) -> Estimate:
    """Chance, 0 to 1, that a positive's score is above a negative's; a tie counts one half.

    `positives` (P, K) and `negatives` (N, K) hold K scores of each person; scores of one column are
    compared and the K chances averaged. Persons are resampled, each with all of its scores.
    """
    above, below = np.asarray(positives, float)[:, None], np.asarray(negatives, float)[None]
    wins = ((above > below) + (above == below) / 2).mean(-1)  # (P, N)
    rng = np.random.default_rng(0)
    times_positive = _times_drawn(rng, len(wins))
    times_negative = _times_drawn(rng, len(wins[0]))
    resampled = ((times_positive @ wins) * times_negative).sum(1) / wins.size
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(wins.mean()), float(low), float(high))


def _times_drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of `count` persons is drawn in each resample, (RESAMPLES, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
