"""From logits to the next tokens, under guidance: the Triton kernel on a GPU, else the reference.

Source: Smirnov (arXiv 2412.06846), eq. 2 and 6; the formulas are in cfgsafe/kernels/reference.py.
In log space the hidden states of a pair can be combined before the head W, because W is linear:
W (g h_pos + (1 - g) h_neg) = g z_pos + (1 - g) z_neg. That computes one row of logits, not two.
Shapes: B requests, R rows of logits, C hidden, V vocabulary.

Run it: python infer.py --model M --prompt "Who am I?" --guidance 3
"""

from torch import Tensor

from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import SPACES as SPACES  # every room above imports it from here
from cfgsafe.kernels.reference import Sampling


def next_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """From logits (R, V): the next token (B,) and its guided log-probability (B,)."""
    if logits.is_cuda:
        from cfgsafe.kernels import guidance

        return guidance.next_tokens(logits, sampling)
    return reference.next_tokens(logits, sampling)


def combine(positive: Tensor, negative: Tensor, guidance: Tensor) -> Tensor:
    """g h_pos + (1 - g) h_neg of hidden states (B, C), computed in float32 or wider; guidance (B,)."""
    wide = reference.widen(positive)
    g = guidance.to(wide.dtype)[:, None]  # (B, 1)
    mixed = g * wide + (1 - g) * reference.widen(negative)
    return mixed.to(positive.dtype)
