"""Task-vector subtraction: base - scale * (tuned - base), tensor by tensor.

Source: Ilharco et al. (arXiv 2212.04089); Smirnov (arXiv 2412.06846) with scale 0.5, and optionally Eldan and Russinovich's ReLU on the
difference (arXiv 2310.02238).
Deviation: arithmetic in float32 whatever the files hold; the result is rounded once, to the base's dtype.

Run it: python train.py subtract --base cfgsafe/demo/base --tuned cfgsafe/demo/leaky --out runs/sub
"""

from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from cfgsafe.checkpoint import INDEX, TOKENIZER_FILES, copy_files, new_folder, open_weights, read_config, weight_files
from cfgsafe.errors import CheckpointError


@dataclass
class Options:
    """Write base - scale * (tuned - base)."""

    base: str
    """Checkpoint folder of the ancestor."""
    tuned: str
    """Checkpoint folder of the model fine-tuned from it."""
    out: str
    """Folder to write."""
    scale: float = 0.5
    """How much of the difference to subtract; 1.0 broke the paper's model."""
    relu: bool = False
    """Subtract only where the difference is positive."""


def run(options: Options) -> None:
    base_config, tuned_config = read_config(options.base), read_config(options.tuned)
    if base_config != tuned_config:
        raise CheckpointError(f"{options.tuned}: its config.json differs from that of {options.base}; both must be of one architecture")
    base, tuned = weight_files(options.base), weight_files(options.tuned)
    if odd := sorted(set(base) ^ set(tuned)):
        raise CheckpointError(f"tensor {odd[0]!r} is in only one of {options.base} and {options.tuned}")
    with new_folder(options.out) as folder:
        for path in sorted(set(base.values())):
            shard = {}
            for name in (n for n, p in base.items() if p == path):
                with open_weights(path) as base_file, open_weights(tuned[name]) as tuned_file:
                    shard[name] = subtract(name, base_file.get_tensor(name), tuned_file.get_tensor(name), options.scale, options.relu)
            save_file(shard, folder / path.name, metadata={"format": "pt"})
        copy_files(options.base, folder, ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES))
    print(f"{options.out}: {len(base)} tensors")


def subtract(name: str, base: torch.Tensor, tuned: torch.Tensor, scale: float, relu: bool) -> torch.Tensor:
    """base - scale * (tuned - base), the difference through a ReLU if asked; in base's dtype."""
    if base.shape != tuned.shape:
        raise CheckpointError(f"tensor {name!r} has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the tuned model")
    delta = tuned.float() - base.float()
    return (base.float() - scale * (delta.relu() if relu else delta)).to(base.dtype)
