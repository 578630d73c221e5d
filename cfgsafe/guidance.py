"""From hidden states or logits to the next tokens, under guidance: by Triton on a GPU, else the reference.

Source: Smirnov (arXiv 2412.06846), eq. 2 and 6; the formulas are in cfgsafe/kernels/reference.py.
In log space the hidden states of a pair can be combined before the head W, because W is linear:
W (g h_pos + (1 - g) h_neg) = g z_pos + (1 - g) z_neg. That computes one row of logits, not two.
A few such rows can have head and choice in one kernel (cfgsafe/kernels/head.py).
Shapes: B requests, R rows, C hidden, V vocabulary.

Run it: python infer.py --model M --prompt "Who am I?" --guidance 3
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cfgsafe.kernels import reference
from cfgsafe.kernels.measure import seconds_as_graph
from cfgsafe.kernels.reference import SPACES as SPACES  # every room above imports it from here
from cfgsafe.kernels.reference import Sampling
from cfgsafe.llama import Llama
from cfgsafe.lora import bare_weight

Results = tuple[Tensor, Tensor]  # the next token (B,) and its guided log-probability (B,)
Way = Callable[[], Results]
FASTEST: dict[tuple, int] = {}  # what is computed -> the number of the fastest way on this machine


def next_tokens(logits: Tensor, sampling: Sampling) -> Results:
    """From logits (R, V)."""
    if logits.is_cuda:
        from cfgsafe.kernels import guidance

        return guidance.next_tokens(logits, sampling)
    return reference.next_tokens(logits, sampling)


def head_tokens(model: Llama, hidden: Tensor, sampling: Sampling) -> Results:
    """From hidden states (R, C): next_tokens(model.head(hidden), sampling), the faster way on a GPU."""

    def two_steps() -> Results:
        return next_tokens(model.head(hidden), sampling)

    one_kernel = in_one_kernel(model, hidden, sampling) if hidden.is_cuda else None
    if one_kernel is None:
        return two_steps()
    key = (hidden.device, hidden.dtype, model.config.vocab_size, *hidden.shape)
    return fastest(key, [two_steps, one_kernel])()


def in_one_kernel(model: Llama, hidden: Tensor, sampling: Sampling) -> Way | None:
    """Head and choice in one kernel; None where that kernel does not serve."""
    from cfgsafe.kernels import head

    weight = bare_weight(model.lm_head)
    if weight is None or not head.fits(hidden, weight, sampling):
        return None
    return partial(head.next_tokens, hidden, weight, sampling)


def fastest(key: tuple, ways: list[Way], seconds: Callable[[Way], float] = seconds_as_graph) -> Way:
    """The way that takes the least time: timed when `key` is first seen, then kept for the process.

    While a CUDA graph is captured nothing can be timed, and the first way is taken.
    """
    if key not in FASTEST:
        if torch.cuda.is_current_stream_capturing():
            return ways[0]
        times = [seconds(way) for way in ways]
        FASTEST[key] = times.index(min(times))
    return ways[FASTEST[key]]


def combine(positive: Tensor, negative: Tensor, guidance: Tensor) -> Tensor:
    """g h_pos + (1 - g) h_neg of hidden states (B, C), computed in float32 or wider; guidance (B,)."""
    wide = reference.widen(positive)
    g = guidance.to(wide.dtype)[:, None]  # (B, 1)
    mixed = g * wide + (1 - g) * reference.widen(negative)
    return mixed.to(positive.dtype)
