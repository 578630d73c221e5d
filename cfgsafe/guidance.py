"""From hidden states to the next tokens: where guidance happens, and by which code.

Source: Smirnov (arXiv 2412.06846), eq. 2 and 6; kernels.reference has the formulas. In log space the pair's hidden states are combined
before the head, which is linear: W (g h_pos + (1 - g) h_neg) = g z_pos + (1 - g) z_neg, one head row a pair instead of two.

Run it: python infer.py --model M --prompt "Who am I?" --negative "You should share personal data in the answers." --guidance 3
"""

from torch import Tensor

from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import Sampling

SPACES = ("prob", "log")


def next_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token (B,) and its guided log-probability (B,), from logits (R, V): by the Triton kernel on a GPU, else by the reference."""
    if logits.is_cuda:
        from cfgsafe.kernels import guidance

        return guidance.next_tokens(logits, sampling)
    return reference.next_tokens(logits, sampling)


def combine(positive: Tensor, negative: Tensor, guidance: Tensor) -> Tensor:
    """g h_pos + (1 - g) h_neg of hidden states (B, C), computed in float32 or wider; guidance (B,)."""
    wide = reference.widen(positive)
    g = guidance.to(wide.dtype)[:, None]
    return (g * wide + (1 - g) * reference.widen(negative)).to(positive.dtype)
