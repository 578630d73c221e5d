"""Weights rounded to 8 or 4 bits in groups of 32, as engines on small machines hold them.

Source: Q8_0 and Q4_0 of GGUF (the reference quantisers of ggml): the numbers of a row in groups
of 32 with one scale d each, which is stored in half precision; round to nearest.
    8 bits: d = max |w| / 127,                      w' = d * round(w / d)
    4 bits: d = -e / 8, e the number of largest |w|, w' = d * clip(floor(w / d + 1/2), -8, 7)
So 4 bits have eight steps on the side of the largest number, and seven on the other. The error is
at most d / 2 but for what is clipped there, where it is at most d, and but for the rounding of d.
Deviation: the last group of a row whose length is no multiple of 32 is shorter; GGUF leaves such
a tensor in half precision.

Run it: python train.py quantise --model cfgsafe/demo/leaky --bits 4 --out runs/int4
"""

from typing import Literal

import torch
from torch import Tensor

GROUP = 32
Bits = Literal[8, 4]


def quantised(weight: Tensor, bits: Bits) -> Tensor:
    """`weight` (..., N) with each number as its level times its group's scale, in the weight's data type.

    Rounding again changes nothing in float32. In bfloat16, which holds 8 digits of a product, each number
    has a relative error of 1/512 more.

    >>> quantised(torch.tensor([-4.0, 0.2, 0.3, 1.0, 4.0]), 4)
    tensor([-4.0000,  0.0000,  0.5000,  1.0000,  3.5000])
    """
    width = weight.shape[-1]
    padded = torch.nn.functional.pad(weight.float(), (0, -width % GROUP))  # zeros are never the largest
    groups = padded.unflatten(-1, (-1, GROUP))
    extremes = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = extremes.abs() / 127 if bits == 8 else extremes / -8
    steps = groups / torch.where(scales == 0, 1.0, scales)
    if bits == 8:
        levels = (steps.abs() + 0.5).floor() * steps.sign()  # halves go away from 0
    else:
        levels = (steps + 0.5).floor().clamp(-8, 7)
    rounded = levels * scales.half().float()
    return rounded.flatten(-2)[..., :width].to(weight.dtype)
