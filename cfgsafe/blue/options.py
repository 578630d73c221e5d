"""The options of the training stage; its batches, steps, memory formula and loop all read them.

Source of the defaults: Smirnov (arXiv 2412.06846) for learning rate and lengths, else TRL 0.11.4.

Run it: python train.py orpo --help
"""

import os
from dataclasses import dataclass
from typing import Annotated

from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, PartialShare, Positive, Rate, Seed, Share, Weight, Whole, check_ranges
from cfgsafe.lora_config import TARGETS
from cfgsafe.losses import NEEDS, READ, NLLTokens, Objective
from cfgsafe.outputs import Folder, InputPath

# A resumed run may change these.
FREE = ("pairs", "eval_pairs", "out", "recompute", "save_every", "resume", "tensorboard", "fsdp", "device")


# What the stage writes to --out.
WRITES = ("epoch-*", "state-*", "metrics.jsonl", "eval.jsonl", "config.json", "tensorboard")


@dataclass
class Options:
    """Train a LoRA adapter on preference pairs."""

    model: InputPath
    """Checkpoint folder or hub id of the model to unlearn."""
    pairs: InputPath
    """JSONL file of pairs: prompt, chosen, rejected, and where a pair counts more or less than others its
    weight. Where rejected is null, the answer is only to be kept. sft does not need rejected."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for the adapters, metrics.jsonl and config.json."""
    eval_pairs: InputPath | None = None
    """JSONL file of held-out pairs to evaluate on after each epoch."""
    objective: Objective = "orpo"
    """Loss to minimise; see cfgsafe/losses.py. dpo-idk prefers its own refusals to the rejected side;
    sft learns the chosen answers alone."""
    init_adapter: InputPath | None = None
    """PEFT folder or hub id of an adapter to start from; its rank, alpha, layers and bits are used."""
    rank: Count = 16
    """LoRA rank."""
    alpha: Positive = 32.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that get an adapter; lm_head is also possible."""
    lora_dropout: PartialShare = 0.0
    """Dropout on the input of the adapter, also of --init-adapter."""
    lora_bits: Positive | None = None
    """1.58 trains ternary adapter weights (BitNet b1.58), stored in two bits each."""
    lr: Rate = 1e-4
    """Peak learning rate; it falls along a cosine."""
    lr_min_ratio: Share = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    beta: Weight | None = None
    """Weight of the odds ratio in orpo, or the beta of another objective; each has its own default."""
    gamma: Weight = 0.5
    """Target margin between the two sides, in simpo."""
    retain: Weight = 1.0
    """Weight of the NLL, in npo and graddiff."""
    nll: NLLTokens = "prompt+chosen"
    """Tokens of a pair that the NLL of orpo, npo and graddiff is taken over. chosen leaves out the prompt,
    whose earlier answers may hold personal data."""
    batch_size: Count = 2
    """Pairs in a forward pass, over all processes."""
    grad_accum: Count = 1
    """Forward passes in a step of the optimiser."""
    epochs: Count = 3
    """Passes over the pairs."""
    max_length: Count = 2048
    """Longest prompt and answer together, in tokens."""
    max_prompt_length: Count = 1900
    """Tokens kept of a prompt, the last ones, where prompt and answer exceed --max-length."""
    shuffle: bool = True
    """Put the pairs in a new order each epoch, drawn from the seed."""
    group_by_length: bool = False
    """Form batches of pairs of similar length, which need less padding."""
    share_prefix: bool = True
    """Compute once what both sides of a pair begin with; the result is the same."""
    recompute: Whole | None = None
    """Blocks to recompute in the backward pass; by default as few as the GPU's memory allows."""
    compile: bool = False
    """Run each block through torch.compile."""
    max_grad_norm: Weight = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. 0: no limit."""
    seed: Seed = 0
    """Seed of the adapter's initial weights and of the order of the pairs."""
    save_every: Count = 100
    """Steps between two saved states, which --resume starts from."""
    resume: bool = False
    """Continue the run in --out from its last saved state."""
    tensorboard: bool = False
    """Also write TensorBoard event files, to OUT/tensorboard."""
    fsdp: bool = False
    """Under torchrun, split the base model over the processes (FSDP2) instead of copying it (DDP)."""
    device: str = "cpu"
    """Torch device; under torchrun, cuda means one GPU for each process."""
    dtype: str = "float32"
    """Data type of the frozen base model: float32 or bfloat16. The adapter is always float32."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.init_adapter is not None:
            yield "with --init-adapter, which has its own", "rank", "alpha", "targets", "lora_bits"
        yield f"on the loss of --objective {self.objective}", *unread(self)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield "in a single process, without torchrun", "fsdp"


def unread(options: Options) -> list[str]:
    """The options of losses that this objective's loss does not read."""
    return [name for name in READ if name not in NEEDS[options.objective].reads]


def check(options: Options) -> None:
    """Raise InputError for values that cannot work."""
    check_ranges(options)
    if options.beta == 0 and options.objective != "orpo":
        raise InputError(f"--beta 0.0: must be above 0 with --objective {options.objective}")
    if options.group_by_length and not options.shuffle:
        raise InputError("--group-by-length changes the order of the pairs; leave out it or --no-shuffle")
    if options.max_prompt_length >= options.max_length:
        raise InputError(
            f"--max-prompt-length {options.max_prompt_length}: must be below "
            f"--max-length {options.max_length}"
        )
