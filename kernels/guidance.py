"""Guidance, plausibility mask, temperature, top-k, top-p and Gumbel-max for pairs of logits, fused, in Triton.

Source: the formulas and the defined cases of kernels.reference, which this must equal; after Liger-Kernel's way of one op a file, and
FlashSampling (arXiv 2603.15854) for Gumbel-max over a split vocabulary.
Three launches, none of which waits for the host, so that a CUDA graph can hold them:
    _normalisers    (B, S) programs: maximum and sum of exponentials of a part of both rows
    _best           (B, S) programs: both normalisers, the guided score of each token of the part, its best token
    _reduce         (B,) programs: the best of the parts; where asked for, top-k and top-p by bisection over the scores
The vocabulary is cut into S parts of a size that depends on V alone: one request fills a GPU, and a row's result does not depend on the
batch. Rows are taken in groups whose logits fit in half of the L2 cache, which the second read then comes from.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FLOOR, LARGEST, Sampling

LOWEST: tl.constexpr = tl.constexpr(FLOOR)
HIGHEST: tl.constexpr = tl.constexpr(LARGEST)
MINUS: tl.constexpr = tl.constexpr(float("-inf"))
MOST_PARTS = 128
LEAST_PART = 2048


@triton.jit
def _load(logits, row, token, V, stride_r, stride_v):
    """A part of a row in float32, NaN as -inf and +inf as the largest."""
    z = tl.load(logits + row * stride_r + token.to(tl.int64) * stride_v, mask=token < V, other=MINUS).to(
        tl.float32
    )
    z = tl.where(z == z, z, MINUS)
    return tl.minimum(z, HIGHEST)


@triton.jit
def _max_and_sum(z):
    top = tl.max(z, 0)
    base = tl.where(top == MINUS, 0.0, top)
    return top, tl.sum(tl.exp(z - base), 0)


@triton.jit
def _join(tops, sums):
    """Maximum and log-sum-exp of a row from those of its parts; -inf, -inf for a row without a finite logit."""
    top = tl.max(tops, 0)
    base = tl.where(top == MINUS, 0.0, top)
    total = tl.sum(sums * tl.exp(tops - base), 0)
    return top, tl.where(top == MINUS, MINUS, base + tl.log(total))


@triton.jit
def _gumbel(seed, token, step):
    bits, _, _, _ = tl.philox(
        seed,
        token.to(tl.uint32),
        token.to(tl.uint32) * 0 + step.to(tl.uint32),
        token.to(tl.uint32) * 0,
        token.to(tl.uint32) * 0,
    )
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _normalisers(logits, positive, negative, parts, first, V, stride_r, stride_v, S, BLOCK: tl.constexpr):
    b, s = tl.program_id(0) + first, tl.program_id(1)
    token = s * BLOCK + tl.arange(0, BLOCK)
    pos, neg = tl.load(positive + b), tl.load(negative + b)
    at = parts + (b * S + s) * 10
    top, total = _max_and_sum(_load(logits, pos, token, V, stride_r, stride_v))
    tl.store(at, top)
    tl.store(at + 1, total)
    if neg >= 0:
        top, total = _max_and_sum(_load(logits, neg, token, V, stride_r, stride_v))
        tl.store(at + 2, top)
        tl.store(at + 3, total)


@triton.jit
def _best(
    logits, positive, negative, guidance, log_space, alpha, temperature, seed, step, parts, scores,
    first, V, stride_r, stride_v, S, BLOCK: tl.constexpr, PARTS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    b, s = tl.program_id(0) + first, tl.program_id(1)
    token = s * BLOCK + tl.arange(0, BLOCK)
    pos, neg = tl.load(positive + b), tl.load(negative + b)
    part = tl.arange(0, PARTS)
    every = parts + (b * S + part) * 10
    top_pos, lse_pos = _join(
        tl.load(every, mask=part < S, other=MINUS), tl.load(every + 1, mask=part < S, other=0.0)
    )
    z = _load(logits, pos, token, V, stride_r, stride_v)
    log_pos = tl.where(z == MINUS, MINUS, z - lse_pos)
    raw = log_pos
    if neg >= 0:
        top_neg, lse_neg = _join(
            tl.load(every + 2, mask=part < S, other=MINUS), tl.load(every + 3, mask=part < S, other=0.0)
        )
        z_neg = _load(logits, neg, token, V, stride_r, stride_v)
        log_neg = tl.where(z_neg == MINUS, MINUS, z_neg - lse_neg)
        g = tl.load(guidance + b)
        if tl.load(log_space + b) != 0:
            low_pos, low_neg = tl.maximum(log_pos, LOWEST), tl.maximum(log_neg, LOWEST)
            raw = g * low_pos + (1 - g) * low_neg
            raw = tl.where((log_pos == MINUS) & (log_neg == MINUS), MINUS, raw)
        else:
            mixed = g * tl.exp(log_pos) + (1 - g) * tl.exp(log_neg)
            raw = tl.where(mixed > 0, tl.log(tl.maximum(mixed, 1e-45)), MINUS)
    share = tl.load(alpha + b)
    bound = tl.where(share > 0, top_pos - lse_pos + tl.log(tl.maximum(share, 1e-38)), MINUS)
    raw = tl.where((log_pos >= bound) & (token < V), raw, MINUS)
    heat = tl.load(temperature + b)
    score = raw
    if heat > 0:
        score = raw / heat
        if TRUNCATES:
            tl.store(scores + b.to(tl.int64) * V + token, score, mask=token < V)
        score = tl.where(score == MINUS, MINUS, score + _gumbel(tl.load(seed + b), token, tl.load(step + b)))
    top, total = _max_and_sum(raw)
    best = tl.argmax(score, 0)
    at = parts + (b * S + s) * 10
    tl.store(at + 4, top)
    tl.store(at + 5, total)
    tl.store(at + 6, tl.max(score, 0))
    tl.store(at + 7, (s * BLOCK + best).to(tl.float32))
    tl.store(at + 8, tl.sum(tl.where(token == s * BLOCK + best, raw, 0.0), 0))
    tl.store(at + 9, (s * BLOCK + tl.argmax(tl.where(token < V, z, MINUS), 0)).to(tl.float32))


@triton.jit
def _key(x):
    """An int32 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _reduce(
    tokens, logprobs, temperature, top_k, top_p, seed, step, parts, scores, first, V, S,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) + first
    part = tl.arange(0, PARTS)
    every = parts + (b * S + part) * 10
    here = part < S
    tops_pos = tl.load(every, mask=here, other=MINUS)
    tops_raw = tl.load(every + 4, mask=here, other=MINUS)
    _, lse = _join(tops_raw, tl.load(every + 5, mask=here, other=0.0))
    bests = tl.load(every + 6, mask=here, other=MINUS)
    winner = tl.argmax(bests, 0)
    token = tl.load(parts + (b * S + winner) * 10 + 7).to(tl.int64)
    raw = tl.load(parts + (b * S + winner) * 10 + 8)
    if TRUNCATES:
        heat, k, p = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b)
        if (heat > 0) & ((k > 0) | (p < 1)) & (lse > MINUS):
            top = tl.max(tops_raw, 0) / heat
            row = scores + b.to(tl.int64) * V
            nothing = tl.full((), float("-inf"), tl.float32)
            bound = _bisect(row, V, top, nothing, tl.where(k > 0, k, V).to(tl.float32), 0, BLOCK)
            if p < 1:
                bound = _bisect(row, V, top, bound, p * _mass(row, V, top, bound, 1, BLOCK), 1, BLOCK)
            best, token = nothing, token * 0
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                score = tl.load(row + at, mask=at < V, other=MINUS)
                noisy = tl.where(
                    (score >= bound) & (score > MINUS),
                    score + _gumbel(tl.load(seed + b), at, tl.load(step + b)),
                    MINUS,
                )
                found = tl.max(noisy, 0)
                token = tl.where(found > best, (start + tl.argmax(noisy, 0)).to(tl.int64), token)
                best = tl.maximum(best, found)
            raw = tl.load(row + token) * heat
    fallback = tl.load(parts + (b * S + tl.argmax(tops_pos, 0)) * 10 + 9).to(tl.int64)
    none_left = lse == MINUS
    impossible = tl.max(tops_pos, 0) == MINUS
    tl.store(tokens + b, tl.where(impossible, -1, tl.where(none_left, fallback, token)))
    tl.store(logprobs + b, tl.where(impossible, float("nan"), tl.where(none_left, 0.0, raw - lse)))


@triton.jit
def _mass(row, V, top, bound, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Over the scores >= bound: the sum of exp(score - top), or their number."""
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < V, other=MINUS)
        counted = tl.exp(score - top) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
        total += tl.sum(tl.where((score >= bound) & (score > MINUS), counted, 0.0), 0)
    return total


@triton.jit
def _bisect(row, V, top, least, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bound >= least of which the scores above still hold `wanted`, exactly, by halving the range of float32 bit patterns."""
    low, high = (
        _key(least).to(tl.int64),
        _key(top).to(tl.int64),
    )  # low holds, or is the least; above high nothing holds
    for _ in range(33):
        middle = (low + high + 1) >> 1
        key = middle.to(tl.int32)
        bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
        holds = _mass(row, V, top, bits.to(tl.float32, bitcast=True), BY_MASS, BLOCK) >= wanted
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle - 1)
        high = tl.maximum(high, low)
    key = low.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


def block_size(vocabulary: int) -> int:
    """Tokens a part has, from V alone."""
    return max(LEAST_PART, triton.next_power_of_2(triton.cdiv(vocabulary, MOST_PARTS)))


def next_tokens(logits: Tensor, sampling: Sampling, part: int | None = None) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.next_tokens`: logits (R, V) of any float dtype and strides; tokens (B,) int64, log-probs (B,) float32.

    `part` is the tokens a program takes, a power of two.
    """
    B, V = len(sampling.positive), logits.shape[-1]
    BLOCK = part or block_size(V)
    S = triton.cdiv(V, BLOCK)
    PARTS = triton.next_power_of_2(S)
    device = logits.device
    parts = torch.empty(B, S, 10, device=device, dtype=torch.float32)
    scores = torch.empty((B, V) if sampling.truncates else (1, 1), device=device, dtype=torch.float32)
    tokens = torch.empty(B, device=device, dtype=torch.int64)
    logprobs = torch.empty(B, device=device, dtype=torch.float32)
    s, strides = sampling, logits.stride()
    log_space = s.log_space.view(torch.int8)
    for first in range(0, B, rows := rows_at_once(logits)):
        n = min(rows, B - first)
        _normalisers[(n, S)](
            logits, s.positive, s.negative, parts, first, V, *strides, S, BLOCK=BLOCK, num_warps=8
        )
        _best[(n, S)](
            logits, s.positive, s.negative, s.guidance, log_space, s.alpha, s.temperature, s.seed, s.step, parts, scores,
            first, V, *strides, S, BLOCK=BLOCK, PARTS=PARTS, TRUNCATES=s.truncates, num_warps=8,
        )  # fmt: skip
        _reduce[(n,)](
            tokens, logprobs, s.temperature, s.top_k, s.top_p, s.seed, s.step, parts, scores, first, V, S,
            BLOCK=BLOCK, PARTS=PARTS, TRUNCATES=s.truncates, num_warps=8,
        )  # fmt: skip
    return tokens, logprobs


def rows_at_once(logits: Tensor) -> int:
    """Pairs whose logits fit in half of the GPU's L2 cache."""
    if not logits.is_cuda:
        return 1 << 30
    cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
    return max(1, cache // 2 // (2 * logits.shape[-1] * logits.element_size()))
