"""Task-vector subtraction: base - scale * (tuned - base), tensor by tensor.

Source: Ilharco et al. (arXiv 2212.04089); Smirnov (arXiv 2412.06846) with scale 0.5; optionally Eldan
and Russinovich's ReLU on the difference (arXiv 2310.02238).
Deviation: arithmetic is in float32 for files of any dtype, and the result is rounded once to the
base's dtype. One tensor is read at a time, so memory is bounded by the largest one.

Run it: python train.py subtract --base cfgsafe/demo/base --tuned cfgsafe/demo/leaky --out runs/sub
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from cfgsafe.checkpoint import rewrite_checkpoint, stored_tensors
from cfgsafe.config import read_config
from cfgsafe.errors import CheckpointError
from cfgsafe.fields import Range, check_ranges
from cfgsafe.hub import resolve
from cfgsafe.outputs import Folder, InputPath
from cfgsafe.weights import check_finite, check_floats, read_tensors


@dataclass
class Options:
    """Write base - scale * (tuned - base)."""

    base: InputPath
    """Checkpoint folder or hub id of the base model."""
    tuned: InputPath
    """Checkpoint folder or hub id of a model fine-tuned from the base model."""
    out: Annotated[str, Folder(("*",))]
    """Folder to write the new checkpoint to."""
    scale: Annotated[float, Range(least=-1000, most=1000)] = 0.5
    """Factor of the difference that is subtracted; 1.0 broke the paper's model."""
    relu: bool = False
    """Subtract only where the tuned weight is above the base weight."""


def run(options: Options) -> None:
    check_ranges(options)
    base, tuned = resolve(options.base), resolve(options.tuned)
    if read_config(base) != read_config(tuned):
        raise CheckpointError(
            f"{options.tuned}: its config.json differs from that of {options.base}; "
            "both must be of one architecture"
        )
    stored = stored_tensors(tuned)
    check_floats(stored)
    unmatched = sorted(set(stored_tensors(base)) ^ set(stored))
    if unmatched:
        raise CheckpointError(f"tensor {unmatched[0]!r} is in only one of {options.base} and {options.tuned}")

    def change(name: str, tensor: Tensor) -> Tensor:
        ((_, other),) = read_tensors({name: stored[name]})
        check_finite(name, other, stored[name].path)
        return subtract(name, tensor, other, options.scale, options.relu)

    count = rewrite_checkpoint(base, options.out, change)
    print(f"{options.out}: {count} tensors")


def subtract(name: str, base: Tensor, tuned: Tensor, scale: float, relu: bool) -> Tensor:
    """base - scale * (tuned - base) in base's dtype; with `relu`, of the positive differences only."""
    if base.shape != tuned.shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(base.shape)} in the base "
            f"and {tuple(tuned.shape)} in the tuned model"
        )
    if tuned.dtype == torch.float32:
        difference = tuned - base.float()
    else:
        difference = tuned.float().sub_(base.float())  # in place, on the float32 copy
    if relu:
        difference.relu_()
    return difference.mul_(-scale).add_(base).to(base.dtype)
