"""The head and the choice of the next token in one kernel, for a few rows, in Triton: no logits in memory.

Source: FlashSampling (arXiv 2603.15854). The largest draw of a row (Gumbel-max) is the largest of its
parts' largest, so each part of the product is reduced to a record where it is computed.
Deviation: a record also has maximum and sum of exponentials, for the log-probability of the token.
A draw is of the logit, because the log-probability is not known yet. It is the larger number, so at
temperatures below 1e-4 float32 leaves less of the noise between equal logits than in guidance.py.

    1  head_parts       Program (s,) multiplies BLOCK_V rows of the weight with all hidden rows, BLOCK_C
                        columns at a time, and rounds the logits as the head does. For each row it makes
                        the record of part s, as guidance.py has them.
    2  choose_tokens    Program (b,) picks the best of the parts of row b (guidance.py).

The weight is read once for all rows. The product always has ROWS rows, of zeros from B on, so the batch
does not change a row's result. No pass waits for the host, so a CUDA graph can hold both.
Shapes: B requests, R hidden rows, C hidden, V vocabulary, S parts.

Run it: python infer.py --model M --prompt "Who am I?" --guidance 3 --space log --device cuda
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import guidance
from .guidance import (
    POS_MAX,
    POS_SUM,
    POS_TOKEN,
    RECORD,
    SCORE_MAX,
    SCORE_SUM,
    choose_tokens,
    gumbel,
    max_and_sum,
    store_best,
)
from .reference import Sampling
from .truncation import MINUS_INF

ROWS = tl.constexpr(16)  # the fewest that a tensor core multiplies
BLOCK_V = 128
TILE_BYTES = 128  # BLOCK_C columns: a line of the cache
WARPS = 4  # of a program of head_parts
STAGES = 4  # of its loop: tiles that are loaded ahead
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["B"])  # one program, compiled once, for any number of rows
def head_parts(
    hidden, weight, positive, temperature, seed, step, records, B, V, C,
    hidden_r, hidden_c, weight_v, weight_c, S, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pass 1: the logits of one part in all rows, and the record of each row."""
    s = tl.program_id(0)
    b = tl.arange(0, ROWS)
    filled = b < B
    token = s * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
    of_tokens = weight + token.to(tl.int64) * weight_v  # (BLOCK_V, 1)
    of_rows = hidden + tl.load(positive + b, mask=filled, other=0)[None, :] * hidden_r  # (1, ROWS)
    z = tl.zeros((BLOCK_V, ROWS), dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        w = tl.load(
            of_tokens + c[None, :] * weight_c, mask=(token < V) & (c[None, :] < C), other=0.0
        )  # (BLOCK_V, BLOCK_C)
        h = tl.load(
            of_rows + c[:, None] * hidden_c, mask=filled[None, :] & (c[:, None] < C), other=0.0
        )  # (BLOCK_C, ROWS)
        z = tl.dot(w, h, z, input_precision="ieee")
    z = z.to(weight.dtype.element_ty).to(tl.float32)  # the head's logits
    z = tl.where(token < V, z, MINUS_INF)
    # The largest draw is a sample (Gumbel-max); a greedy row draws its logits.
    temp = tl.load(temperature + b, mask=filled, other=0.0)[None, :]
    noise = gumbel(
        tl.load(seed + b, mask=filled, other=0)[None, :],
        token,
        tl.load(step + b, mask=filled, other=0)[None, :],
    )
    draw = tl.where(temp > 0, z / tl.where(temp > 0, temp, 1.0) + noise, z)
    # The scores are the logits themselves, so their maximum and sum stand in the record twice.
    record = records + (b * S + s) * RECORD
    top, total = max_and_sum(z)
    tl.store(record + POS_MAX, top, mask=filled)
    tl.store(record + POS_SUM, total, mask=filled)
    tl.store(record + SCORE_MAX, top, mask=filled)
    tl.store(record + SCORE_SUM, total, mask=filled)
    best = s * BLOCK_V + tl.argmax(tl.where(z == z, z, MINUS_INF), 0)
    tl.store(record + POS_TOKEN, best.to(tl.float32), mask=filled)
    store_best(record, s * BLOCK_V, token, draw, z, mask=filled)


def fits(hidden: Tensor, weight: Tensor, sampling: Sampling) -> bool:
    """Whether `next_tokens` serves: at most ROWS requests, whose scores are their logits."""
    plain = not (sampling.guides or sampling.masks or sampling.truncates)
    known = hidden.dtype == weight.dtype and weight.dtype in DTYPES
    return len(sampling.positive) <= ROWS.value and plain and known


def next_tokens(hidden: Tensor, weight: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """From hidden (R, C) and weight (V, C), of any strides: as guidance.next_tokens of their logits."""
    B, (V, C) = len(sampling.positive), weight.shape
    S = triton.cdiv(V, BLOCK_V)
    device = hidden.device
    records = torch.empty(B, S, RECORD.value, device=device, dtype=torch.float32)
    tokens = torch.empty(B, device=device, dtype=torch.int64)
    logprobs = torch.empty(B, device=device, dtype=torch.float32)
    s = sampling
    head_parts[(S,)](
        hidden, weight, s.positive, s.temperature, s.seed, s.step, records, B, V, C,
        *hidden.stride(), *weight.stride(), S,
        BLOCK_V=BLOCK_V, BLOCK_C=block_c(weight.dtype), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    choose_tokens[(B,)](
        tokens, logprobs, s.negative, records, S,
        PARTS=triton.next_power_of_2(S), num_warps=guidance.WARPS,
    )  # fmt: skip
    return tokens, logprobs


def block_c(dtype: torch.dtype) -> int:
    """Columns of a tile."""
    return TILE_BYTES // dtype.itemsize
