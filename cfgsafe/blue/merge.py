"""Writes a checkpoint with an adapter merged into it, tensor by tensor, for engines that know no adapters.

Source: Hu et al. (arXiv 2106.09685), W + scale B A; computed in float32, rounded once to the base's dtype.

Run it: python train.py merge --model cfgsafe/demo/leaky --adapter runs/orpo/epoch-3 --out runs/merged
"""

from dataclasses import dataclass

import torch

from cfgsafe.checkpoint import read_config, rewrite_checkpoint
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import HEAD, TIED, adapter_updates, load_adapter, merged


@dataclass
class Options:
    """Write a checkpoint with an adapter merged into its weights."""

    model: str
    """Checkpoint folder or hub id."""
    adapter: str
    """PEFT folder or hub id of a LoRA adapter."""
    out: str
    """Folder to write."""


def run(options: Options) -> None:
    base = resolve(options.model)
    with torch.device("meta"):  # the shapes alone
        skeleton = Llama(read_config(base))
    load_adapter(resolve(options.adapter), skeleton, device="cpu")
    updates = {f"{path}.weight": update for path, update in adapter_updates(skeleton).items()}
    if f"{HEAD}.weight" in updates and skeleton.config.tie_word_embeddings:
        raise CheckpointError(TIED)
    count = rewrite_checkpoint(
        base, options.out, lambda name, tensor: merged(tensor, updates[name]) if name in updates else tensor
    )
    print(f"{options.out}: {count} tensors, {len(updates)} of them changed")
