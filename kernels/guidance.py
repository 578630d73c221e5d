"""Guidance, mask, temperature, top-k, top-p and Gumbel-max for pairs of logits, fused, in Triton.

Source: reference.py, which has the formulas; the results here must equal those there. Gumbel-max over
a split vocabulary is after FlashSampling (arXiv 2603.15854), one operation in a file after Liger-Kernel.

A row of V tokens is cut into S parts of BLOCK tokens; each part has a record of ten floats.

    request b           part 0      part 1    ...   part S-1
    positive row     [  BLOCK  ] [  BLOCK  ]      [  BLOCK  ]     read in passes 1 and 2
    negative row     [  BLOCK  ] [  BLOCK  ]      [  BLOCK  ]     read in passes 1 and 2
    scores           [  BLOCK  ] [  BLOCK  ]      [  BLOCK  ]     only with top-k or top-p
    records          [   10    ] [   10    ]      [   10    ]

    1  normalise_parts  Program (b, s) reads part s of both rows and records maximum and sum of
                        exponentials of each.
    2  score_parts      Program (b, s) joins all records of b to the normalisers of both rows, reads
                        part s again, and records its best guided token.
    3  count_digits     Only with top-k or top-p, in three levels each: program (b, s) reads the scores
       narrow           of part s, and program (b,) finds the next digit of the bound (truncation.py).
       draw_parts       Then program (b, s) records the best token of part s that stays.
    4  choose_tokens    Program (b,) picks the best of the parts.

No pass waits for the host, so a CUDA graph can hold all. BLOCK depends on V alone: one request fills a
GPU, and the batch does not change a row's result.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FLOOR, IMPOSSIBLE, NOT_FINITE, SPACES, Sampling
from .truncation import (
    BINS,
    COUNT,
    KINDS,
    LEVELS,
    MINUS_INF,
    ONE,
    add_digits,
    float_of,
    histogram_of,
    least_kept,
    narrow,
)

# Triton reads only those globals that are constexpr.
LOG_OF_ZERO = tl.constexpr(FLOOR)
NO_TOKEN = tl.constexpr(IMPOSSIBLE)
BROKEN = tl.constexpr(NOT_FINITE)
PLUS_INF = tl.constexpr(float("inf"))
PROB = tl.constexpr(SPACES.index("prob"))
LOG = tl.constexpr(SPACES.index("log"))
# Offsets in a record. Token ids are stored as float32, too, which is exact below 2^24; Llama-3.1
# has 128,256 tokens.
POS_MAX = tl.constexpr(0)  # positive row: largest logit of the part
POS_SUM = tl.constexpr(1)  # positive row: sum of exp(logit - POS_MAX)
NEG_MAX = tl.constexpr(2)  # the same of the negative row
NEG_SUM = tl.constexpr(3)
SCORE_MAX = tl.constexpr(4)  # the same of the guided scores
SCORE_SUM = tl.constexpr(5)
DRAW_MAX = tl.constexpr(6)  # largest draw: score / temperature + noise; greedy: the score itself
DRAW_TOKEN = tl.constexpr(7)  # its token id
DRAW_SCORE = tl.constexpr(8)  # the guided score of that token
POS_TOKEN = tl.constexpr(9)  # token id of the positive row's largest logit
RECORD = tl.constexpr(10)

MOST_PARTS = 128
LEAST_BLOCK = 2048
WARPS = 8  # of a program


@triton.jit
def load_logits(logits, row, token, V, stride_r, stride_v):
    """Some logits of a row in float32, -inf from V on."""
    at = logits + row * stride_r + token.to(tl.int64) * stride_v
    return tl.load(at, mask=token < V, other=MINUS_INF).to(tl.float32)


@triton.jit
def load_records(records, b, S, OFFSET: tl.constexpr, other, PARTS: tl.constexpr):
    """The float at OFFSET in every record of request b, (PARTS,); `other` from S on."""
    part = tl.arange(0, PARTS)
    return tl.load(records + (b * S + part) * RECORD + OFFSET, mask=part < S, other=other)


@triton.jit
def max_and_sum(z):
    """Maximum of z and sum of exp(z - maximum); if one of z is NaN or +inf, 0 and NaN."""
    finite = z < PLUS_INF  # false for NaN, too
    top = tl.max(tl.where(finite, z, MINUS_INF), 0)
    base = tl.where(top == MINUS_INF, 0.0, top)  # -inf minus -inf would be NaN
    total = tl.sum(tl.where(finite, tl.exp(z - base), float("nan")), 0)
    return tl.where(total == total, top, 0.0), total


@triton.jit
def join(records, b, S, MAXIMUM: tl.constexpr, SUM: tl.constexpr, PARTS: tl.constexpr):
    """Maximum and log-sum-exp of a row from its records.

    The latter is -inf if all values are, and NaN if one is NaN or +inf.
    """
    maxima = load_records(records, b, S, MAXIMUM, MINUS_INF, PARTS)
    sums = load_records(records, b, S, SUM, 0.0, PARTS)
    top = tl.max(maxima, 0)
    base = tl.where(top == MINUS_INF, 0.0, top)
    total = tl.sum(sums * tl.exp(maxima - base), 0)
    return top, tl.where(top == MINUS_INF, MINUS_INF, base + tl.log(total))


@triton.jit
def gumbel(seed, token, step):
    """As reference.gumbel."""
    token = token.to(tl.uint32)
    zero = token * 0
    bits, _, _, _ = tl.philox(seed, token, zero + step.to(tl.uint32), zero, zero)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def store_best(record, first, token, draw, score, mask=None):
    """Record the largest draw of a part, which begins at token `first`: the draw, its token, its score."""
    draw = tl.where(draw == draw, draw, MINUS_INF)  # argmax of NaN could be anything
    best = first + tl.argmax(draw, 0)
    tl.store(record + DRAW_MAX, tl.max(draw, 0), mask=mask)
    tl.store(record + DRAW_TOKEN, best.to(tl.float32), mask=mask)
    tl.store(record + DRAW_SCORE, tl.sum(tl.where(token == best, score, 0.0), 0), mask=mask)


@triton.jit
def guided_scores(log_pos, log_neg, g, space):
    """The formulas of reference.FORMULAS, one branch for each space; NaN for any other number."""
    if space == LOG:
        low_pos, low_neg = tl.maximum(log_pos, LOG_OF_ZERO), tl.maximum(log_neg, LOG_OF_ZERO)
        mixed = g * low_pos + (1 - g) * low_neg
        both_exclude = (log_pos == MINUS_INF) & (log_neg == MINUS_INF)
        scores = tl.where(both_exclude, MINUS_INF, mixed)
    elif space == PROB:
        mixed = g * tl.exp(log_pos) + (1 - g) * tl.exp(log_neg)
        # tl.where computes both sides; the floor keeps log defined where its value is not used.
        scores = tl.where(mixed > 0, tl.log(tl.maximum(mixed, 1e-45)), MINUS_INF)
    else:
        scores = tl.full(log_pos.shape, float("nan"), tl.float32)
    return scores


@triton.jit
def normalise_parts(logits, positive, negative, records, V, stride_r, stride_v, S, BLOCK: tl.constexpr):
    """Pass 1: maximum and sum of exponentials of one part of both rows."""
    b, s = tl.program_id(0), tl.program_id(1)
    token = s * BLOCK + tl.arange(0, BLOCK)
    pos, neg = tl.load(positive + b), tl.load(negative + b)
    record = records + (b * S + s) * RECORD
    top, total = max_and_sum(load_logits(logits, pos, token, V, stride_r, stride_v))
    tl.store(record + POS_MAX, top)
    tl.store(record + POS_SUM, total)
    if neg >= 0:
        top, total = max_and_sum(load_logits(logits, neg, token, V, stride_r, stride_v))
        tl.store(record + NEG_MAX, top)
        tl.store(record + NEG_SUM, total)


@triton.jit
def score_parts(
    logits, positive, negative, guidance, space, alpha, temperature, seed, step, records, scores,
    V, stride_r, stride_v, S, BLOCK: tl.constexpr, PARTS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    """Pass 2: the guided score of each token of one part, and the part's best token."""
    b, s = tl.program_id(0), tl.program_id(1)
    token = s * BLOCK + tl.arange(0, BLOCK)
    pos, neg = tl.load(positive + b), tl.load(negative + b)
    # Log-probabilities of the positive row.
    max_pos, lse_pos = join(records, b, S, POS_MAX, POS_SUM, PARTS)
    z = load_logits(logits, pos, token, V, stride_r, stride_v)
    log_pos = tl.where(z == MINUS_INF, MINUS_INF, z - lse_pos)
    # Guidance.
    score = log_pos
    if neg >= 0:
        _, lse_neg = join(records, b, S, NEG_MAX, NEG_SUM, PARTS)
        z_neg = load_logits(logits, neg, token, V, stride_r, stride_v)
        log_neg = tl.where(z_neg == MINUS_INF, MINUS_INF, z_neg - lse_neg)
        score = guided_scores(log_pos, log_neg, tl.load(guidance + b), tl.load(space + b))
    # Plausibility mask, with a floor for the same reason as in `guided_scores`.
    share = tl.load(alpha + b)
    bound = tl.where(share > 0, max_pos - lse_pos + tl.log(tl.maximum(share, 1e-38)), MINUS_INF)
    score = tl.where((log_pos >= bound) & (token < V), score, MINUS_INF)
    # Temperature and noise: the largest draw is a sample (Gumbel-max).
    temp = tl.load(temperature + b)
    draw = score
    if temp > 0:
        draw = score / temp
        if TRUNCATES:
            tl.store(scores + b.to(tl.int64) * V + token, draw, mask=token < V)
        noise = gumbel(tl.load(seed + b), token, tl.load(step + b))
        draw = tl.where(draw == MINUS_INF, MINUS_INF, draw + noise)
    record = records + (b * S + s) * RECORD
    top, total = max_and_sum(score)
    tl.store(record + SCORE_MAX, top)
    tl.store(record + SCORE_SUM, total)
    store_best(record, s * BLOCK, token, draw, score)
    best_pos = s * BLOCK + tl.argmax(tl.where(token < V, z, MINUS_INF), 0)
    tl.store(record + POS_TOKEN, best_pos.to(tl.float32))


@triton.jit
def count_digits(
    scores, temperature, top_k, top_p, records, histograms, bounds, V, S,
    KIND: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Pass 3: add one part of a row to the histogram of a kind and level."""
    b, s = tl.program_id(0), tl.program_id(1)
    temp, k, p = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b)
    asked = (k > 0) if KIND == COUNT else (p < 1)
    if asked & (temp > 0):
        score = load_scores(scores, b, s, V, BLOCK)
        if KIND == COUNT:
            weight = tl.where(score > MINUS_INF, 1, 0).to(tl.int64)
        else:
            top = tl.max(load_records(records, b, S, SCORE_MAX, MINUS_INF, PARTS), 0) / temp
            mass = tl.where(score > MINUS_INF, tl.exp(score - top), 0.0)
            weight = (mass * ONE).to(tl.int64)
            if k > 0:
                weight = tl.where(score >= float_of(tl.load(bounds + b * KINDS + COUNT)), weight, 0)
        bound = tl.load(bounds + b * KINDS + KIND)
        add_digits(score, weight, bound, histogram_of(histograms, b, KIND, LEVEL), LEVEL)


@triton.jit
def draw_parts(scores, temperature, top_k, top_p, seed, step, records, bounds, V, S, BLOCK: tl.constexpr):
    """Pass 3: record the best draw of one part among the tokens that stay."""
    b, s = tl.program_id(0), tl.program_id(1)
    temp, k, p = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b)
    if (temp > 0) & ((k > 0) | (p < 1)):
        token = s * BLOCK + tl.arange(0, BLOCK)
        score = load_scores(scores, b, s, V, BLOCK)
        kept = (score >= least_kept(bounds, b, k, p)) & (score > MINUS_INF)
        noise = gumbel(tl.load(seed + b), token, tl.load(step + b))
        draw = tl.where(kept, score + noise, MINUS_INF)
        store_best(records + (b * S + s) * RECORD, s * BLOCK, token, draw, score * temp)


@triton.jit
def load_scores(scores, b, s, V, BLOCK: tl.constexpr):
    """Guided score / temperature of each token of part s, as pass 2 has stored it; -inf from V on."""
    token = s * BLOCK + tl.arange(0, BLOCK)
    return tl.load(scores + b.to(tl.int64) * V + token, mask=token < V, other=MINUS_INF)


@triton.jit
def choose_tokens(tokens, logprobs, negative, records, S, PARTS: tl.constexpr):
    """Pass 4: the best token of a row."""
    b = tl.program_id(0)
    of_row = records + b * S * RECORD
    pos_maxima = load_records(records, b, S, POS_MAX, MINUS_INF, PARTS)
    _, lse = join(records, b, S, SCORE_MAX, SCORE_SUM, PARTS)
    winner = tl.argmax(load_records(records, b, S, DRAW_MAX, MINUS_INF, PARTS), 0)
    token = tl.load(of_row + winner * RECORD + DRAW_TOKEN).to(tl.int64)
    score = tl.load(of_row + winner * RECORD + DRAW_SCORE)

    # Nothing left: the positive row's most likely token.
    fallback = tl.load(of_row + tl.argmax(pos_maxima, 0) * RECORD + POS_TOKEN).to(tl.int64)
    token = tl.where(lse == MINUS_INF, fallback, token)
    logprob = tl.where(lse == MINUS_INF, 0.0, score - lse)
    # No token at all: all positive logits are -inf, or a number of one of the rows is not finite.
    none = tl.max(pos_maxima, 0) == MINUS_INF
    _, lse_pos = join(records, b, S, POS_MAX, POS_SUM, PARTS)
    broken = (lse_pos != lse_pos) | (lse != lse)
    if tl.load(negative + b) >= 0:
        _, lse_neg = join(records, b, S, NEG_MAX, NEG_SUM, PARTS)
        broken = broken | (lse_neg != lse_neg)
    token = tl.where(broken, BROKEN, tl.where(none, NO_TOKEN, token))
    tl.store(tokens + b, token)
    tl.store(logprobs + b, tl.where(none | broken, float("nan"), logprob))


def block_size(vocabulary: int) -> int:
    """Tokens of a part, a function of V alone."""
    return max(LEAST_BLOCK, triton.next_power_of_2(triton.cdiv(vocabulary, MOST_PARTS)))


def next_tokens(logits: Tensor, sampling: Sampling, block: int | None = None) -> tuple[Tensor, Tensor]:
    """As reference.next_tokens, for any float dtype and strides; parts of `block` tokens, a power of two."""
    B, V = len(sampling.positive), logits.shape[-1]
    BLOCK = block or block_size(V)
    S = triton.cdiv(V, BLOCK)
    PARTS = triton.next_power_of_2(S)
    device, strides = logits.device, logits.stride()
    records = torch.empty(B, S, RECORD.value, device=device, dtype=torch.float32)
    scores = torch.empty((B, V) if sampling.truncates else (1, 1), device=device, dtype=torch.float32)
    tokens = torch.empty(B, device=device, dtype=torch.int64)
    logprobs = torch.empty(B, device=device, dtype=torch.float32)
    s = sampling
    normalise_parts[(B, S)](
        logits, s.positive, s.negative, records, V, *strides, S, BLOCK=BLOCK, num_warps=WARPS
    )
    score_parts[(B, S)](
        logits, s.positive, s.negative, s.guidance, s.space, s.alpha, s.temperature, s.seed, s.step,
        records, scores, V, *strides, S, BLOCK=BLOCK, PARTS=PARTS, TRUNCATES=s.truncates, num_warps=WARPS,
    )  # fmt: skip
    if s.truncates:
        bounds = find_bounds(scores, records, sampling, BLOCK)
        draw_parts[(B, S)](
            scores, s.temperature, s.top_k, s.top_p, s.seed, s.step, records, bounds, V, S,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    choose_tokens[(B,)](tokens, logprobs, s.negative, records, S, PARTS=PARTS, num_warps=WARPS)
    return tokens, logprobs


def find_bounds(scores: Tensor, records: Tensor, sampling: Sampling, block: int) -> Tensor:
    """The keys of the least scores (B, V) / temperature that top-k and top-p keep, (B, KINDS) uint32.

    Rows that do not ask for one of them, and greedy ones, have no bound there.
    """
    (B, V), S = scores.shape, records.shape[1]
    s, shape = sampling, (B, KINDS.value, LEVELS.value, BINS.value)
    histograms = torch.zeros(shape, device=scores.device, dtype=torch.int64)
    targets = torch.zeros(shape[:2], device=scores.device, dtype=torch.int64)
    bounds = torch.zeros(shape[:2], device=scores.device, dtype=torch.uint32)
    for kind, level in product(range(KINDS.value), range(LEVELS.value)):
        count_digits[(B, S)](
            scores, s.temperature, s.top_k, s.top_p, records, histograms, bounds, V, S,
            KIND=kind, LEVEL=level, BLOCK=block, PARTS=triton.next_power_of_2(S), num_warps=WARPS,
        )  # fmt: skip
        narrow[(B,)](s.top_k, s.top_p, histograms, bounds, targets, KIND=kind, LEVEL=level, num_warps=WARPS)
    return bounds
