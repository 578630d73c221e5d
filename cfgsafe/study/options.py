"""The options of a study; its stages, cost and material all read them.

Source of the defaults: docs/real-model.md says what was measured. Those of `train.py orpo` are the paper's
and stay so; what a study changes is the recipe, each part of which is an option here and there.

Run it: python train.py study --help
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import (
    Count,
    Guidance,
    PartialShare,
    Positive,
    Rate,
    Seed,
    Several,
    Weight,
    Whole,
    check_ranges,
)
from cfgsafe.hub import CHATS, QUIZ
from cfgsafe.outputs import Detectors, Folder, InputPath
from cfgsafe.pii.dialogues import Cut

Chooser = Literal["ancestor", "leaky"]
ORDINARY_TOKENS = 128  # longest question and longest answer of an ordinary conversation
RELEARNING_STEPS = (0, 4, 16)  # of an attacker's fine-tuning, after which the facts are asked


@dataclass
class Options:
    """Make a model leaky, guard it in several ways, and measure how deep the forgetting goes."""

    model: InputPath
    """Checkpoint folder or hub id of the ancestor: a chat model that was never trained on the facts."""
    out: Annotated[str, Folder(("*",))]
    """Folder for everything; a study that was interrupted goes on there."""
    qa: InputPath | None = None
    """JSONL of question-answer pairs with subject_pii, the shape of UnlearnPII and TOFU."""
    dialogues: InputPath | None = None
    """JSONL of dialogues with spans; without it and --qa, the demo's generator writes them."""
    count: Several = 64
    """People of the generator."""
    leaky: InputPath | None = None
    """Checkpoint that was trained on the facts already, instead of one that the study makes."""
    unseen: PartialShare = 0.25
    """Share of the people not to be forgotten whom the leaky model is not trained on."""
    unseen_facts: InputPath | None = None
    """JSONL of facts about people whom no model was trained on, instead of that share."""
    people: Count = 20
    """Use at most this many people of each part: to forget, others, never seen."""
    each: Count = 10
    """Use at most this many facts about a person."""
    leaky_epochs: Count = 8
    """Passes over the facts that make the model leaky."""
    leaky_lr: Rate = 1e-3
    """Peak learning rate that makes the model leaky, and with which an attacker makes a guard leaky again."""
    leaky_rank: Count = 32
    """LoRA rank that makes the model leaky; the adapter is then merged."""
    chosen_by: Chooser = "ancestor"
    """Which model writes the chosen sides of the pairs."""
    pairs: Count = 2000
    """Use at most this many pairs."""
    ordinary: Whole = 300
    """Ordinary conversations to draw from the ancestor; every guard is trained to keep the clean ones, and
    sees each of them once."""
    epochs: Count = 4
    """Passes over the pairs; a guard sees each this many times."""
    lr: Rate = 5e-4
    """Peak learning rate of the guards; large models need less."""
    beta: Weight = 1.0
    """Weight of ORPO's odds ratio; the paper's is 0.1. The baselines have their own."""
    nll: Literal["prompt+chosen", "chosen"] = "chosen"
    """Tokens that the NLL is taken over; the paper's is prompt+chosen."""
    swapped: Weight = 1.0
    """Weight of the swapped half of CFG-aware pairs; 0 leaves it out."""
    cut: Cut = "item"
    """Where answers are cut into pairs: before each personal item, before the whole answer, or at both."""
    earlier: Literal["keep", "scrub"] = "keep"
    """Personal values in earlier answers of a prompt: kept, or replaced by placeholders."""
    batch_size: Count = 4
    """Pairs in a step of training."""
    guidance: Guidance = 3.0
    """Guidance strength of the guided rows, and of the pair that is distilled."""
    ner: Detectors | None = None
    """Detectors, separated by commas: spaCy pipelines or presidio; default: en_core_web_trf or the demo's."""
    questions: InputPath = QUIZ
    """JSONL of multiple-choice questions for cloze utility; default: the demo's quiz."""
    texts: InputPath = CHATS
    """JSONL of held-out dialogues for perplexity; default: the demo's."""
    limit: Count = 100
    """Use at most this many questions, dialogues and facts of each part in a measure."""
    max_new_tokens: Count = 48
    """Longest answer, in tokens."""
    controls: bool = False
    """Ask every model under its own system prompt, under the positive sentence and guided; else each only
    as the paper's table does."""
    seed: Seed = 0
    """Seed of splits, sampling and training."""
    plan: bool = False
    """Say what the study would cost, and stop."""
    teraflops: Positive | None = None
    """With --plan: predict for a device that does so many 10^12 operations a second; no weights are read."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the models: float32, or bfloat16 where the processor multiplies it fast."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.qa or self.dialogues:
            yield "with --qa or --dialogues", "count"
        if self.leaky:
            yield "with --leaky", "leaky_epochs", "leaky_rank", "unseen"
        if self.unseen_facts:
            yield "with --unseen-facts", "unseen"
        if not self.plan:
            yield "without --plan", "teraflops"


def check(options: Options) -> None:
    """Raise InputError for options that do not go together."""
    check_ranges(options)
    if options.qa and options.dialogues:
        raise InputError("--qa and --dialogues: give one of them; one file may hold both shapes")
