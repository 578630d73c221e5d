"""Means, differences and AUCs with 95 % bootstrap intervals.

Source: Efron's percentile bootstrap over prompts, 2,000 resamples from a fixed seed; Fisher's paired permutation test, which flips the
sign of each prompt's difference. Where no prompt, or every prompt, counts, the interval has no width: the bootstrap cannot know better.

Run it: python eval.py leak --model cfgsafe/demo/leaky
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def to_json(estimates: dict[str, Estimate]) -> dict:
    """{name: value, name_ci: [low, high]} of each."""
    flat = {}
    for name, e in estimates.items():
        flat[name], flat[f"{name}_ci"] = round(e.value, 4), [round(e.low, 4), round(e.high, 4)]
    return flat


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of one value a prompt."""
    return ratio_interval(values, np.ones(len(values)))


def ratio_interval(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """sum(tops) / sum(bottoms), where each prompt brings one of each; 0 where nothing is below the line."""
    tops, bottoms = np.asarray(tops, float), np.asarray(bottoms, float)
    if not bottoms.sum():
        return Estimate(0.0, 0.0, 0.0)
    picks = np.random.default_rng(0).integers(0, len(tops), (RESAMPLES, len(tops)))
    resampled = tops[picks].sum(1) / np.maximum(bottoms[picks].sum(1), 1e-12)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(tops.sum() / bottoms.sum()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, and how often chance alone gives one at least as large."""

    estimate: Estimate
    p_value: float


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours[i] - theirs[i], two figures of the same prompt; the p-value is two-sided and at least 1 / (RESAMPLES + 1)."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    flips = np.random.default_rng(1).integers(0, 2, (RESAMPLES, len(differences)), dtype=np.int8)
    flipped = differences.sum() - 2 * (flips @ differences)
    as_large = np.abs(flipped) >= abs(differences.sum()) - 1e-9
    return Difference(mean_interval(differences), float((1 + as_large.sum()) / (1 + RESAMPLES)))


def auc_interval(positives: Sequence[Sequence[float]], negatives: Sequence[Sequence[float]]) -> Estimate:
    """Chance that a positive's score lies above a negative's, ties half, averaged over the kinds of scores.

    positives (P, K) and negatives (N, K): K scores of each person, compared kind by kind; persons are resampled, with all of their scores.
    """
    above, below = np.asarray(positives, float)[:, None], np.asarray(negatives, float)[None]
    wins = ((above > below) + (above == below) / 2).mean(-1)  # (P, N)
    rng = np.random.default_rng(0)
    times = lambda count: rng.multinomial(
        count, np.full(count, 1 / count), RESAMPLES
    )  # how often each is drawn
    resampled = ((times(len(wins)) @ wins) * times(len(wins[0]))).sum(1) / wins.size
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(wins.mean()), float(low), float(high))
