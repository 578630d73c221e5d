"""Guidance, mask, temperature, top-k, top-p and Gumbel-max for pairs of logits, fused, in Triton.

Source: reference.py, which has the formulas; the results here must equal those there. Gumbel-max over
a split vocabulary is after FlashSampling (arXiv 2603.15854), one operation in a file after Liger-Kernel.

A row of V tokens is cut into S parts of BLOCK tokens; each part has a record of ten floats.

    request b           part 0      part 1    ...   part S-1
    positive row     [  BLOCK  ] [  BLOCK  ]      [  BLOCK  ]     read in passes 1 and 2
    negative row     [  BLOCK  ] [  BLOCK  ]      [  BLOCK  ]     read in passes 1 and 2
    records          [   10    ] [   10    ]      [   10    ]

    Pass 1 of 3  normalise_parts  Program (b, s) reads part s of both rows and records maximum and
                                  sum of exponentials of each.
    Pass 2 of 3  score_parts      Program (b, s) joins all records of b to the normalisers of both
                                  rows, reads part s again, and records its best guided token.
    Pass 3 of 3  choose_tokens    Program (b,) picks the best of the parts. For top-k and top-p it
                                  searches the V scores of its row, which pass 2 has stored.

No pass waits for the host, so a CUDA graph can hold all three. BLOCK depends on V alone: one request
fills a GPU, and the batch does not change a row's result. Requests go in groups whose logits fit in
half of the L2 cache, from which pass 2 then reads.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import FLOOR, IMPOSSIBLE, NOT_FINITE, SPACES, Sampling

# Triton reads only those globals that are constexpr.
LOG_OF_ZERO = tl.constexpr(FLOOR)
NO_TOKEN = tl.constexpr(IMPOSSIBLE)
BROKEN = tl.constexpr(NOT_FINITE)
MINUS_INF = tl.constexpr(float("-inf"))
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
def normalise_parts(
    logits, positive, negative, records, first, V, stride_r, stride_v, S, BLOCK: tl.constexpr
):
    """Pass 1 of 3: maximum and sum of exponentials of one part of both rows."""
    b, s = tl.program_id(0) + first, tl.program_id(1)
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
    first, V, stride_r, stride_v, S, BLOCK: tl.constexpr, PARTS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    """Pass 2 of 3: the guided score of each token of one part, and the part's best token."""
    b, s = tl.program_id(0) + first, tl.program_id(1)
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
    draw = tl.where(draw == draw, draw, MINUS_INF)  # argmax of NaN could be anything
    record = records + (b * S + s) * RECORD
    top, total = max_and_sum(score)
    tl.store(record + SCORE_MAX, top)
    tl.store(record + SCORE_SUM, total)
    best = s * BLOCK + tl.argmax(draw, 0)
    tl.store(record + DRAW_MAX, tl.max(draw, 0))
    tl.store(record + DRAW_TOKEN, best.to(tl.float32))
    tl.store(record + DRAW_SCORE, tl.sum(tl.where(token == best, score, 0.0), 0))
    best_pos = s * BLOCK + tl.argmax(tl.where(token < V, z, MINUS_INF), 0)
    tl.store(record + POS_TOKEN, best_pos.to(tl.float32))


@triton.jit
def choose_tokens(
    tokens, logprobs, negative, temperature, top_k, top_p, seed, step, records, scores, first, V, S,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    """Pass 3 of 3: the best token of a row, after top-k and top-p if the request asks for them."""
    b = tl.program_id(0) + first
    of_row = records + b * S * RECORD
    pos_maxima = load_records(records, b, S, POS_MAX, MINUS_INF, PARTS)
    max_score, lse = join(records, b, S, SCORE_MAX, SCORE_SUM, PARTS)
    winner = tl.argmax(load_records(records, b, S, DRAW_MAX, MINUS_INF, PARTS), 0)
    token = tl.load(of_row + winner * RECORD + DRAW_TOKEN).to(tl.int64)
    score = tl.load(of_row + winner * RECORD + DRAW_SCORE)

    if TRUNCATES:
        temp, k, p = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b)
        if (temp > 0) & ((k > 0) | (p < 1)) & (lse > MINUS_INF):
            row = scores + b.to(tl.int64) * V  # guided scores / temperature
            top = max_score / temp
            nothing = tl.full((), float("-inf"), tl.float32)
            count = tl.where(k > 0, k, V).to(tl.float32)
            bound = bisect(row, V, top, nothing, count, 0, BLOCK)
            if p < 1:
                bound = bisect(row, V, top, bound, p * mass(row, V, top, bound, 1, BLOCK), 1, BLOCK)
            best, token = nothing, token * 0
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                kept = tl.load(row + at, mask=at < V, other=MINUS_INF)
                noise = gumbel(tl.load(seed + b), at, tl.load(step + b))
                draw = tl.where((kept >= bound) & (kept > MINUS_INF), kept + noise, MINUS_INF)
                largest = tl.max(draw, 0)
                token = tl.where(largest > best, (start + tl.argmax(draw, 0)).to(tl.int64), token)
                best = tl.maximum(best, largest)
            score = tl.load(row + token) * temp

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


@triton.jit
def mass(row, V, top, bound, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Over the scores >= bound: the sum of exp(score - top) if BY_MASS, else their number."""
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(row + at, mask=at < V, other=MINUS_INF)
        counted = tl.exp(score - top) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
        total += tl.sum(tl.where((score >= bound) & (score > MINUS_INF), counted, 0.0), 0)
    return total


@triton.jit
def key_of(x):
    """An int32 that orders as the float32 x does.

    The bits of positive floats, read as integers, are in order. Those of negative floats are in
    reverse order, so all but the sign are flipped; the same flip leads back, in `float_of`.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of(key):
    """The float32 with this key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def bisect(row, V, top, least, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bound >= least for which `mass` of the scores >= bound is at least `wanted`.

    It halves the range of keys, not of values: there are 2^32 keys, so 33 rounds end at one float32.
    """
    low, high = key_of(least).to(tl.int64), key_of(top).to(tl.int64)  # the answer is within
    for _ in range(33):
        middle = (low + high + 1) >> 1
        holds = mass(row, V, top, float_of(middle.to(tl.int32)), BY_MASS, BLOCK) >= wanted
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle - 1)
        high = tl.maximum(high, low)
    return float_of(low.to(tl.int32))


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
    s, group = sampling, rows_at_once(logits)
    for first in range(0, B, group):
        n = min(group, B - first)
        normalise_parts[(n, S)](
            logits, s.positive, s.negative, records, first, V, *strides, S, BLOCK=BLOCK, num_warps=8
        )
        score_parts[(n, S)](
            logits, s.positive, s.negative, s.guidance, s.space, s.alpha, s.temperature, s.seed, s.step,
            records, scores, first, V, *strides, S,
            BLOCK=BLOCK, PARTS=PARTS, TRUNCATES=s.truncates, num_warps=8,
        )  # fmt: skip
        choose_tokens[(n,)](
            tokens, logprobs, s.negative, s.temperature, s.top_k, s.top_p, s.seed, s.step, records, scores,
            first, V, S, BLOCK=BLOCK, PARTS=PARTS, TRUNCATES=s.truncates, num_warps=8,
        )  # fmt: skip
    return tokens, logprobs


def rows_at_once(logits: Tensor) -> int:
    """Number of requests whose logits fit in half of the GPU's L2 cache."""
    if not logits.is_cuda:
        return 1 << 30
    cache = torch.cuda.get_device_properties(logits.device).L2_cache_size
    return max(1, cache // 2 // (2 * logits.shape[-1] * logits.element_size()))
