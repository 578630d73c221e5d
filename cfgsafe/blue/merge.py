"""Write a checkpoint with an adapter merged into it, for engines that know no adapters.

Source: Hu et al. (arXiv 2106.09685), W + scale B A; computed in float32, tensor by tensor, and rounded
once to the base's dtype.

A CFG-aware adapter protects only under the positive sentence, see cfgsafe/blue/origin.py: merging one
prints a warning. With --check the merged model answers a few prompts, without that sentence and with
it added to the system prompt; the leaked items of both are printed as a line of JSON.

Run it: python train.py merge --model cfgsafe/demo/leaky --adapter runs/orpo/epoch-3 --out runs/merged
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor

from cfgsafe.blue.origin import distilled_for, is_cfg_aware
from cfgsafe.checkpoint import empty_model, rewrite_checkpoint
from cfgsafe.errors import CheckpointError, InputError, Unused
from cfgsafe.fields import Count, check_ranges
from cfgsafe.hub import PROMPTS, resolve
from cfgsafe.lora import HEAD, TIED, Update, adapter_updates, load_adapter, merged
from cfgsafe.measure import leak
from cfgsafe.measure.intervals import Estimate, to_json
from cfgsafe.outputs import Folder, InputPath
from cfgsafe.subject import POSITIVE, Subject, answers, load

NEEDED = (
    f'the merged model protects only with "{POSITIVE}" in the system prompt; '
    "guidance needs its other sentence as well; --check measures what it leaks"
)
DISTILLED = (
    'it was distilled for one prompt: the merged model protects only with "{sentence}" in the system prompt; '
    "train.py distil --student none makes one that needs no sentence"
)


@dataclass
class Options:
    """Write a checkpoint with an adapter merged into its weights."""

    model: InputPath
    """Checkpoint folder or hub id of the base model."""
    adapter: InputPath
    """PEFT folder or hub id of the LoRA adapter."""
    out: Annotated[str, Folder(("*",))]
    """Folder to write the merged checkpoint to."""
    check: bool = False
    """Ask the merged model a few prompts, without the positive sentence of guidance and with it."""
    prompts: InputPath = PROMPTS
    """JSONL of prompts with the personal items to look for; default: the demo's test set."""
    limit: Count = 20
    """Use this many prompts, evenly spaced."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens."""
    device: str = "cpu"
    """Torch device of the check."""
    dtype: str = "float32"
    """Data type of the model in the check: float32 or bfloat16."""

    def unused(self) -> Unused:
        """See `Subject.unused`."""
        if not self.check:
            yield "without --check", "prompts", "limit", "max_new_tokens", "device", "dtype"


def run(options: Options) -> None:
    check_ranges(options)
    prompts = read_prompts(options) if options.check else []
    base = resolve(options.model)
    updates = updates_of(base, options.adapter)

    def change(name: str, weight: Tensor) -> Tensor:
        return merged(weight, updates[name]) if name in updates else weight

    count = rewrite_checkpoint(base, options.out, change)
    print(f"{options.out}: {count} tensors, {len(updates)} of them changed")
    warn(options.adapter)
    if options.check:
        print(json.dumps({"prompts": len(prompts), **to_json(check(options, prompts))}))


def updates_of(base: Path, adapter: str) -> dict[str, Update]:
    """Tensor of the checkpoint -> the adapter's update of it.

    Raises CheckpointError where the adapter does not fit, or cannot be merged.
    """
    skeleton, _ = empty_model(base)
    load_adapter(resolve(adapter), skeleton, device="cpu")
    updates = {f"{path}.weight": update for path, update in adapter_updates(skeleton).items()}
    if f"{HEAD}.weight" in updates and skeleton.config.tie_word_embeddings:
        raise CheckpointError(TIED)
    return updates


def warn(adapter: str) -> None:
    """Say what an adapter needs that is CFG-aware, distilled under a sentence, or of unknown training."""
    sentence = distilled_for(adapter)
    if sentence is not None:
        if sentence:
            print(f"WARNING: {adapter}: {DISTILLED.format(sentence=sentence)}", file=sys.stderr)
        return
    aware = is_cfg_aware(adapter)
    if aware:
        print(f"WARNING: {adapter} is CFG-aware: {NEEDED}", file=sys.stderr)
    elif aware is None:
        why = "its training is unknown: no config.json of its training beside its folder tells"
        print(f"WARNING: {adapter}: {why}. If it is CFG-aware, {NEEDED}", file=sys.stderr)


def read_prompts(options: Options) -> list[leak.Prompt]:
    """--limit prompts with items to look for, evenly spaced. Raises InputError if there are none."""
    prompts = [prompt for prompt in leak.read_prompts(options.prompts) if prompt.items]
    if not prompts:
        raise InputError(f"{options.prompts}: no prompt has 'items'; --check counts these in the answers")
    return prompts[:: max(1, len(prompts) // options.limit)][: options.limit]


def check(options: Options, prompts: list[leak.Prompt]) -> dict[str, Estimate | None]:
    """Leaked items per 100 answers of the merged model, without and with the positive sentence."""
    model, tokenizer = load(Subject(options.out, device=options.device, dtype=options.dtype))
    chats, places = [prompt.messages for prompt in prompts], [prompt.place for prompt in prompts]
    found = {}
    for name, guidance in (("leaked_per_100", None), ("with_sentence_leaked_per_100", 1.0)):
        subject = Subject(options.out, guidance=guidance)
        given = answers(subject, model, tokenizer, chats, name, options.max_new_tokens, places)
        summary = leak.summarise(leak.inspect(prompts, given, None))
        found[name], found[f"{name}_no_answer"] = summary["leaked_per_100"], summary["no_answer"]
    return found
