"""TOFU's figures: probability, truth ratio, forget quality and model utility.

Source: Maini et al. (arXiv 2401.06121), section 2.2: P(a | q)^(1 / |a|); the truth ratio of eq. 1,
the arithmetic mean of that probability over the perturbed answers, over that of the paraphrased
answer; forget quality, the p-value of a two-sample Kolmogorov-Smirnov test; model utility, a
harmonic mean of nine figures.
Deviations:
- The probabilities are those of the guided distribution, over the answer's tokens without the one
  that ends it. No token counts as less likely than 1e-9, or one that guidance makes impossible
  would decide alone.
- The arithmetic mean of eq. 1 holds everywhere. TOFU's code takes the geometric one for forget
  quality, and open-unlearning (arXiv 2506.12618) for all, so their figures differ from these.
- The model never trained on the facts has the same guidance, so that only the training differs.
- Utility is over the figures that there are: a set without wrong answers has no truth ratio.

Run it: python eval.py memorised --model M --facts facts.jsonl --never BASE --retain others.jsonl
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from cfgsafe.measure.intervals import Estimate, ratio_interval
from cfgsafe.measure.mmlu_pro import Placed, one_line
from cfgsafe.measure.scoring import LEAST
from cfgsafe.pii.facts import SYSTEM, Fact

TINIEST = sys.float_info.min  # a p-value below has no logarithm here


@dataclass(frozen=True)
class Truth:
    """Probabilities to the power 1 / |a|, 0 to 1, of a fact's answers."""

    answer: float
    paraphrased: float  # the answer's own where the fact has no other
    perturbed: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """The truth ratio, 0 or more: below 1 where the truth is preferred; None without wrong ones."""
        if not self.perturbed:
            return None
        return sum(self.perturbed) / len(self.perturbed) / self.paraphrased

    @property
    def chosen(self) -> float:
        """The probability of the answer among it and the wrong ones: of multiple choice."""
        return self.answer / (self.answer + sum(self.perturbed))


def normalised(logprobs: Tensor) -> float:
    """P(a | q)^(1 / |a|) from the log-probabilities (T,) of the answer's tokens."""
    return math.exp(logprobs.clamp(min=LEAST).mean().item())


def texts_of(fact: Fact) -> list[str]:
    """The answers whose log-probabilities `truth_of` takes: own, paraphrased, perturbed."""
    return [text for text in (fact.answer, fact.paraphrased_answer, *fact.perturbed_answers) if text]


def truth_of(fact: Fact, logprobs: Sequence[Tensor]) -> Truth:
    """From the log-probabilities (T,) of each of `texts_of`."""
    answer, *others = map(normalised, logprobs)
    paraphrased = others.pop(0) if fact.paraphrased_answer else answer
    return Truth(answer, paraphrased, others)


def as_facts(questions: Placed) -> list[Fact]:
    """Multiple-choice questions as facts: wrong options are perturbed answers, categories splits.

    They are asked without their options.
    """
    facts = []
    for place, row in questions:
        options = [one_line(option) for option in row["options"]]
        right = options.pop(row["answer_index"])
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        split = str(row.get("category") or "questions")
        facts.append(Fact(asked, right, (), place, split, place, perturbed_answers=tuple(options)))
    return facts


def ks_p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Chance that two samples of one distribution differ at least as much: two-sided, exact.

    The samples, n and m values, are a path from (0, 0) to (n, m), all equally likely; the chance is
    that of a path that strays as far from the diagonal as theirs does. Ties are taken as
    scipy.stats.ks_2samp does.
    """
    n, m = len(ours), len(theirs)
    pooled = np.concatenate((ours, theirs))
    below, others = (np.searchsorted(np.sort(sample), pooled, "right") for sample in (ours, theirs))
    farthest = np.abs(below * m - others * n).max()  # n m times the statistic, a whole number
    i = np.arange(n + 1)
    strayed = np.zeros(n + 1)  # chance that a path to (i, step - i) has strayed
    for step in range(1, n + m + 1):
        j = step - i
        came = (i * np.roll(strayed, 1) + j * strayed) / step  # from (i - 1, j) or from (i, j - 1)
        outside = (j < 0) | (j > m) | (np.abs(i * m - j * n) >= farthest)
        strayed = np.where(outside, 1.0, came)
    return float(strayed[n]) if farthest else 1.0


def forget_quality(
    ours: Sequence[float | None], theirs: Sequence[float | None]
) -> dict[str, Estimate | None]:
    """The p-value between the truth ratios of two models, and its logarithm to the base 10.

    Facts without a truth ratio are left out. A low p-value shows that the models differ, a high one
    proves nothing: few facts give high ones.
    """
    samples = [[ratio for ratio in ratios if ratio is not None] for ratios in (ours, theirs)]
    if not all(samples):
        return {}
    p_value = ks_p_value(*samples)
    values = {"forget_quality": p_value, "forget_quality_log10": math.log10(max(p_value, TINIEST))}
    return {name: Estimate(value, -math.inf, math.inf) for name, value in values.items()}


@dataclass(frozen=True)
class Known:
    """What a model shows of a fact that it should still know, each 0 to 1, more is better."""

    probability: float
    rouge_l: float
    truth: float | None  # max(0, 1 - truth ratio)
    person: str


def model_utility(sets: Sequence[Sequence[Known]]) -> Estimate | None:
    """Harmonic mean of the means over each set of probability, ROUGE-L and truth; None without facts.

    The interval is linearised, over persons, the sets independent; none is given for a 0.
    """
    parts = []  # of each set, (facts, figures)
    for known in filter(None, sets):
        columns = [[fact.probability for fact in known], [fact.rouge_l for fact in known]]
        truths = [fact.truth for fact in known if fact.truth is not None]
        if len(truths) == len(known):
            columns.append(truths)
        parts.append(np.array(columns).T)
    if not parts:
        return None
    means = [part.mean(0) for part in parts]
    every = np.concatenate(means)
    if every.min() <= 0:
        return Estimate(0.0, -math.inf, math.inf)
    value = float(len(every) / (1 / every).sum())
    variance = 0.0  # of the half widths
    for known, part, mean in zip(filter(None, sets), parts, means, strict=True):
        slopes = value**2 / len(every) / mean**2  # d value / d mean
        effect = ratio_interval(part @ slopes, clusters=[fact.person for fact in known])
        variance += (effect.high - effect.value) ** 2 if effect else 0.0
    half = math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
