"""Write a checkpoint with an adapter merged into it, for engines that know no adapters.

Source: Hu et al. (arXiv 2106.09685), W + scale B A; computed in float32, tensor by tensor, and rounded
once to the base's dtype.

Run it: python train.py merge --model cfgsafe/demo/leaky --adapter runs/orpo/epoch-3 --out runs/merged
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.checkpoint import read_config, rewrite_checkpoint
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import HEAD, TIED, adapter_updates, load_adapter, merged


@dataclass
class Options:
    """Write a checkpoint with an adapter merged into its weights."""

    model: str
    """Checkpoint folder or hub id of the base model."""
    adapter: str
    """PEFT folder or hub id of the LoRA adapter."""
    out: str
    """Folder to write the merged checkpoint to."""


def run(options: Options) -> None:
    base = resolve(options.model)
    with torch.device("meta"):  # shapes without memory
        skeleton = Llama(read_config(base))
    load_adapter(resolve(options.adapter), skeleton, device="cpu")
    updates = {f"{path}.weight": update for path, update in adapter_updates(skeleton).items()}
    if f"{HEAD}.weight" in updates and skeleton.config.tie_word_embeddings:
        raise CheckpointError(TIED)

    def change(name: str, weight: Tensor) -> Tensor:
        return merged(weight, updates[name]) if name in updates else weight

    count = rewrite_checkpoint(base, options.out, change)
    print(f"{options.out}: {count} tensors, {len(updates)} of them changed")
