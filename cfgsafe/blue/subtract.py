"""Task-vector subtraction: base - scale * (tuned - base), tensor by tensor.

Source: Ilharco et al. (arXiv 2212.04089); Smirnov (arXiv 2412.06846) with scale 0.5, and optionally Eldan and Russinovich's ReLU on the
difference (arXiv 2310.02238).
Deviation: arithmetic in float32 whatever the files hold; the result is rounded once, to the base's dtype. Shard by shard and tensor by
tensor, so that memory is bounded by the largest tensor.

Run it: python train.py subtract --base cfgsafe/demo/base --tuned cfgsafe/demo/leaky --out runs/sub
"""

from dataclasses import dataclass

import torch

from cfgsafe.checkpoint import open_weights, read_config, rewrite_checkpoint, weight_files
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import resolve


@dataclass
class Options:
    """Write base - scale * (tuned - base)."""

    base: str
    """Checkpoint folder or hub id of the ancestor."""
    tuned: str
    """Checkpoint folder or hub id of the model fine-tuned from it."""
    out: str
    """Folder to write."""
    scale: float = 0.5
    """How much of the difference to subtract; 1.0 broke the paper's model."""
    relu: bool = False
    """Subtract only where the difference is positive."""


def run(options: Options) -> None:
    base, tuned = resolve(options.base), resolve(options.tuned)
    if read_config(base) != read_config(tuned):
        raise CheckpointError(
            f"{options.tuned}: its config.json differs from that of {options.base}; both must be of one architecture"
        )
    files = weight_files(tuned)
    if odd := sorted(set(weight_files(base)) ^ set(files)):
        raise CheckpointError(f"tensor {odd[0]!r} is in only one of {options.base} and {options.tuned}")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        with open_weights(files[name]) as file:
            return subtract(name, tensor, file.get_tensor(name), options.scale, options.relu)

    count = rewrite_checkpoint(base, options.out, change)
    print(f"{options.out}: {count} tensors")


def subtract(name: str, base: torch.Tensor, tuned: torch.Tensor, scale: float, relu: bool) -> torch.Tensor:
    """base - scale * (tuned - base), the difference through a ReLU if asked; in base's dtype."""
    if base.shape != tuned.shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the tuned model"
        )
    delta = tuned.float().sub_(base.float()) if tuned.dtype != torch.float32 else tuned - base.float()
    if relu:
        delta.relu_()
    return delta.mul_(-scale).add_(base).to(base.dtype)
