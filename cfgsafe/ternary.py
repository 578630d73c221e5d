"""Ternary weights for tiny adapters ("Bit-LoRA"): absmean quantisation, two bits a weight on disk.

Source: Ma et al., BitNet b1.58 (arXiv 2402.17764), eq. 1-3:
    gamma = mean |W|, W' = gamma * round(clip(W / gamma, -1, 1))
The gradient passes straight through the rounding.

Run it: python train.py orpo --lora-bits 1.58 --help
"""

import torch
from torch import Tensor

BITS = 1.58


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The trits {-1, 0, 1} of `weight`, int8, and the scale gamma, a scalar.

    A weight that is ternary already keeps its trits and its scale to the bit, so that a stored
    adapter loads exactly.

    >>> quantise(torch.tensor([0.0, 0.2, -2.0, 1.8]))
    (tensor([ 0,  0, -1,  1], dtype=torch.int8), tensor(1.))
    """
    size = weight.abs()
    largest = size.max()
    already = ((size == largest) | (size == 0)).all()
    scale = torch.where(already, largest, size.mean())
    trits = (weight / scale.clamp_min(1e-12)).clamp(-1, 1).round().to(torch.int8)
    return trits, scale


def ternary(weight: Tensor) -> Tensor:
    """The quantised weight; its gradient is passed on to `weight` unchanged (straight-through)."""
    trits, scale = quantise(weight.detach())
    return trits * scale + (weight - weight.detach())


def pack(key: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors on disk: `key`.ternary with four weights in a byte, and `key`.scale."""
    trits, scale = quantise(weight)
    codes = (trits.flatten() + 1).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 4)).view(-1, 4)
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    return {f"{key}.ternary": packed, f"{key}.scale": scale.reshape(1)}


def is_packed(packed: Tensor) -> bool:
    """Whether each two bits hold a trit: three of the four codes are used."""
    return not bool((packed & packed >> 1 & 0b01010101).any())


def unpack(packed: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
    """The ternary weight of that shape, from what `pack` has stored for it."""
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).flatten()
    trits = codes[: shape.numel()].to(torch.float32) - 1
    return trits.view(shape) * scale
