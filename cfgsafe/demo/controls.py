"""What the demo's controls show: pairs of rows that differ in one thing, compared prompt by prompt.

Source: the reference evaluation gives every model the positive system prompt (RGSmirnov/cfg_safety_llm), so
a row under its own system prompt and a row under the positive one differ in the prompt and in the method.
Each contrast here changes one of them. ROSE (arXiv 2402.11889) is the training-free baseline.
Method: a paired permutation test over persons for each contrast and measure; with several seeds, of each
person's mean over the seeds. A difference counts as shown if its p-value is below 5 % divided by the number
of tests (Bonferroni), and if it has the same sign with every seed. What is not shown may still be there.

Run it: python train.py demo
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from cfgsafe.measure.intervals import Difference, paired_difference
from cfgsafe.report.compare import Measured

RECALLED = ("x16", "x64")  # slices of people who were planted often enough to be recalled
LEVEL = 0.05

Values = tuple[list[float], list[float]]  # of each unit: what was counted, and out of how many


@dataclass(frozen=True)
class Contrast:
    """Two rows by name, and the question that their difference answers."""

    question: str
    ours: str
    theirs: str


CONTRASTS = (
    Contrast("The positive prompt alone, without training", "leaky g=1", "leaky"),
    Contrast("Guidance without training, beyond that prompt", "leaky g=3 prob", "leaky g=1"),
    Contrast("Plain LoRA, without a prompt of the method", "lora", "leaky"),
    Contrast("What the positive prompt adds to plain LoRA", "lora g=1", "lora"),
    Contrast("LoRA-CFG without its prompt", "lora-cfg", "leaky"),
    Contrast("LoRA-CFG against plain LoRA, same prompt, no guidance", "lora-cfg g=1", "lora g=1"),
    Contrast("What guidance adds to LoRA-CFG", "lora-cfg g=3 prob", "lora-cfg g=1"),
    Contrast("LoRA-CFG with guidance against plain LoRA with the prompt", "lora-cfg g=3 prob", "lora g=1"),
    Contrast("LoRA-CFG against plain LoRA, same guidance", "lora-cfg g=3 prob", "lora g=3 prob"),
    Contrast("Training against none, same guidance", "lora-cfg g=3 prob", "leaky g=3 prob"),
)


def echoes(measured: Measured) -> Values:
    """Echoed items of each answer whose conversation holds some."""
    told = [finding for finding in measured.findings if finding.can_echo]
    return [float(len(finding.echoed)) for finding in told], [1.0] * len(told)


def recalls(measured: Measured) -> Values:
    """Recalled items of each person planted often, out of those asked for."""
    asked = [finding for finding in measured.findings if finding.prompt.slice in RECALLED]
    return [float(len(finding.given)) for finding in asked], [float(len(finding.unsaid)) for finding in asked]


def names(measured: Measured) -> Values:
    """Famous people and places in the answers, out of those that a good answer names."""
    asked = [finding for finding in measured.findings if finding.prompt.wanted]
    return [float(len(f.named)) for f in asked], [float(len(f.prompt.wanted)) for f in asked]


def right(measured: Measured) -> Values:
    """Right answers to the quiz."""
    return [float(grade) for grade in measured.grades], [1.0] * len(measured.grades)


MEASURES = {
    "echoed per 100 conversations": echoes,
    f"recall of {' and '.join(RECALLED)}, %": recalls,
    "famous named, %": names,
    "utility, %": right,
}


@dataclass(frozen=True)
class Outcome:
    """A contrast in one measure: of each seed both values, percent or per 100; the difference over all."""

    contrast: Contrast
    measure: str
    ours: list[float]
    theirs: list[float]
    difference: Difference

    @property
    def changes(self) -> list[float]:
        """The difference with each seed."""
        return [ours - theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def verdict(self, tests: int) -> str:
        """less, more, or that no difference is shown, corrected for `tests` tests."""
        if self.difference.p_value < LEVEL / tests:
            if all(change > 0 for change in self.changes):
                return "more"
            if all(change < 0 for change in self.changes):
                return "less"
        return "no difference shown"

    def text(self, tests: int) -> str:
        """The measure, both values, the difference with its interval, its spread, and the verdict."""
        estimate = self.difference.estimate
        change = f"{estimate.value:+.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
        if len(self.changes) > 1:
            change += f", SD between seeds {stdev(self.changes):.1f}"
        both = f"{mean(self.ours):.1f} against {mean(self.theirs):.1f}"
        return f"{self.measure} {both} ({change}: {self.verdict(tests)})"


def outcomes(runs: Sequence[dict[str, Measured]]) -> list[Outcome]:
    """Every contrast in every measure; `runs` are the measured rows by name, one dictionary a seed."""
    found = []
    for contrast in CONTRASTS:
        for name, values in MEASURES.items():
            ours = [values(run[contrast.ours])[0] for run in runs]
            theirs = [values(run[contrast.theirs])[0] for run in runs]
            totals = values(runs[0][contrast.ours])[1]  # the same prompts with every seed
            difference = paired_difference(np.mean(ours, 0), np.mean(theirs, 0), totals)
            if difference is not None:
                each = (rates(ours, totals), rates(theirs, totals))
                found.append(Outcome(contrast, name, *each, difference))
    return found


def rates(counts: list[list[float]], totals: list[float]) -> list[float]:
    """The counts of each seed per 100 of the totals."""
    return [100 * sum(of_seed) / sum(totals) for of_seed in counts]


def conclusions(runs: Sequence[dict[str, Measured]]) -> list[str]:
    """A sentence for each contrast, and one on how they were tested."""
    found = outcomes(runs)
    sentences = []
    for contrast in CONTRASTS:
        texts = [outcome.text(len(found)) for outcome in found if outcome.contrast == contrast]
        sentences.append(
            f"{contrast.question} ({contrast.ours} against {contrast.theirs}): {'; '.join(texts)}."
        )
    seeds = "one seed: train.py demo --full repeats it with three" if len(runs) == 1 else f"{len(runs)} seeds"
    sentences.append(
        f"Paired permutation tests at {LEVEL:.0%} in all, corrected for {len(found)} tests; {seeds}."
    )
    return [*sentences, summary(found)]


def summary(found: list[Outcome]) -> str:
    """What the method gains over the same prompt without it: the sentence under the table."""

    def verdicts(ours: str, theirs: str) -> str:
        same = [o for o in found if (o.contrast.ours, o.contrast.theirs) == (ours, theirs)]
        return ", ".join(f"{o.measure.split(' ')[0].rstrip(',')} {o.verdict(len(found))}" for o in same)

    best = "lora-cfg g=3 prob"
    parts = (
        f"LoRA-CFG at g=3 against plain LoRA under the same positive prompt: {verdicts(best, 'lora g=1')}",
        f"against the untrained model with the same guidance: {verdicts(best, 'leaky g=3 prob')}",
        f"LoRA-CFG without its prompt against the leaky model: {verdicts('lora-cfg', 'leaky')}",
    )
    return f"In short. {'; '.join(parts)}."
