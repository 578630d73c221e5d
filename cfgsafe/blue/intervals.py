"""Means with 95 % bootstrap intervals.

Source: Efron's percentile bootstrap over prompts, 2,000 resamples from a fixed seed.

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
