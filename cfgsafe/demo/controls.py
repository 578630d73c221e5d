"""What the demo's controls show: pairs of rows that differ in one thing, compared prompt by prompt.

Source: the reference evaluation gives every model the positive system prompt (RGSmirnov/cfg_safety_llm), so
a row under its own system prompt and a row under the positive one differ in the prompt and in the method.
Each contrast here changes one of them. ROSE (arXiv 2402.11889) is the training-free baseline.
Method: a paired permutation test over persons for each contrast and measure. A difference counts as shown
if its p-value is below 5 % divided by the number of tests (Bonferroni); with several seeds, if that is so
for each of them and all have the same sign.

Run it: python train.py demo
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

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
    """A contrast in one measure: of each seed the two values and their difference."""

    contrast: Contrast
    measure: str
    ours: list[float]
    theirs: list[float]
    differences: list[Difference]

    def shown(self, tests: int) -> bool:
        """Whether every seed shows a difference of the same sign, corrected for `tests` tests."""
        signs = {difference.estimate.value > 0 for difference in self.differences}
        return len(signs) == 1 and all(d.p_value < LEVEL / tests for d in self.differences)

    def text(self, tests: int) -> str:
        """The measure, both values, the difference with its interval or spread, and the verdict."""
        values = [difference.estimate.value for difference in self.differences]
        if len(values) > 1:
            change = f"{mean(values):+.1f} +- {stdev(values):.1f} between seeds"
        else:
            (estimate,) = [difference.estimate for difference in self.differences]
            change = f"{estimate.value:+.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"
        word = "no difference shown"
        if self.shown(tests):
            word = "more" if values[0] > 0 else "less"
        return f"{self.measure} {mean(self.ours):.1f} against {mean(self.theirs):.1f} ({change}: {word})"


def outcomes(runs: Sequence[dict[str, Measured]]) -> list[Outcome]:
    """Every contrast in every measure; `runs` are the measured rows by name, one dictionary a seed."""
    found = []
    for contrast in CONTRASTS:
        for name, values in MEASURES.items():
            outcome = Outcome(contrast, name, [], [], [])
            for run in runs:
                ours, totals = values(run[contrast.ours])
                theirs, _ = values(run[contrast.theirs])
                difference = paired_difference(ours, theirs, totals)
                if difference is not None:
                    outcome.ours.append(100 * sum(ours) / sum(totals))
                    outcome.theirs.append(100 * sum(theirs) / sum(totals))
                    outcome.differences.append(difference)
            found.append(outcome)
    return [outcome for outcome in found if outcome.differences]


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
    return [*sentences, summary(found, len(found))]


def summary(found: list[Outcome], tests: int) -> str:
    """What the method gains over the same prompt without it: the sentence under the table."""
    echo, recall, famous, utility = MEASURES
    by_row = {(o.contrast.ours, o.contrast.theirs, o.measure): o for o in found}

    def verdict(ours: str, theirs: str, measure: str) -> str:
        outcome = by_row.get((ours, theirs, measure))
        if outcome is None or not outcome.shown(tests):
            return "about as much as"
        return "more than" if outcome.differences[0].estimate.value > 0 else "less than"

    best, plain, leaky = "lora-cfg g=3 prob", "lora g=1", "leaky"
    parts = (
        f"LoRA-CFG at g=3 echoes {verdict(best, plain, echo)} plain LoRA under the same positive prompt",
        f"recalls {verdict(best, plain, recall)} it",
        f"names {verdict(best, plain, famous)} it of the famous",
        f"knows {verdict(best, plain, utility)} it in the quiz",
        f"it echoes {verdict(best, 'leaky g=3 prob', echo)} the untrained model with the same guidance",
        f"without its prompt LoRA-CFG echoes {verdict('lora-cfg', leaky, echo)} the leaky model",
    )
    return f"In short: {'; '.join(parts)}."
