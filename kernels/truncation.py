"""The least score that top-k and top-p keep, found a digit at a time from histograms, in Triton.

Source: radix selection by histograms, as in Alabi et al., "Fast k-selection algorithms for graphics
processing units" (JEA 2012); what top-k and top-p mean is reference.truncate.
Deviation: masses are whole numbers, 2^44 for the best token. Whole numbers have the same sum in any
order, so the programs of a row can add to one histogram, and a result depends neither on the batch
nor on chance.

The bits of a score become a key of 32 bits that orders as the scores do. The bound is found from its
highest bits to its lowest:

    level       0               1                            2
    digit       11 bits         11 bits                      10 bits
    histogram   of all scores   of those whose higher digits are the bound's

Each row has a histogram for each level, of the tokens for top-k, and of the mass of those that top-k
keeps for top-p. guidance.count_digits fills it, and `narrow` then finds the digit.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

import triton
import triton.language as tl

MINUS_INF = tl.constexpr(float("-inf"))
LEVELS = tl.constexpr(3)
BINS = tl.constexpr(2048)  # of a histogram
ONE = tl.constexpr(float(2**44))  # mass of the best token; that of 2^18 tokens is below 2^63
COUNT = tl.constexpr(0)  # kinds of histograms: the tokens with a digit
MASS = tl.constexpr(1)  # and their mass
KINDS = tl.constexpr(2)


@triton.jit
def key_of(x):
    """A uint32 that orders as the float32 x does.

    The bits of floats, read as integers, are in order, and those of negative ones in reverse order:
    these are flipped, and the others get the highest bit, so that they are above.
    """
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)


@triton.jit
def float_of(key):
    """The float32 with this key."""
    return tl.where((key >> 31) == 1, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@triton.jit
def add_digits(score, weight, bound, histogram, LEVEL: tl.constexpr):
    """Add the weights of scores to a histogram; the key `bound` has the digits of the levels before."""
    key = key_of(score)
    counted = weight > 0
    if LEVEL == 0:
        digit = key >> 21
    elif LEVEL == 1:
        digit = (key >> 10) & 0x7FF
        counted &= (key >> 21) == (bound >> 21)
    else:
        digit = key & 0x3FF
        counted &= (key >> 10) == (bound >> 10)
    tl.atomic_add(histogram + digit, weight, mask=counted)


@triton.jit
def narrow(top_k, top_p, histograms, bounds, targets, KIND: tl.constexpr, LEVEL: tl.constexpr):
    """From the histogram of a kind and level: the bound's digit there, into its key in `bounds`.

    The bound is the greatest score for which it and all above have top_k tokens (COUNT), or the share
    top_p of the mass (MASS); at least one token stays. `targets` is what the next level's digits must
    still reach.
    """
    b = tl.program_id(0)
    bins = tl.arange(0, BINS)
    held = tl.load(histogram_of(histograms, b, KIND, LEVEL) + bins)
    state = b * KINDS + KIND
    bound = tl.full((), 0, tl.uint32)
    if LEVEL == 0:
        total = tl.sum(held, 0)
        if KIND == COUNT:
            target = tl.minimum(tl.load(top_k + b).to(tl.int64), total)
        else:
            target = tl.ceil(tl.load(top_p + b).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        target = tl.maximum(target, 1)
    else:
        bound = tl.load(bounds + state)
        target = tl.load(targets + state)
    reached = tl.cumsum(held, 0, reverse=True)
    digit = tl.max(tl.where(reached >= target, bins, 0), 0)
    place = 21 if LEVEL == 0 else (10 if LEVEL == 1 else 0)
    tl.store(bounds + state, bound | (digit.to(tl.uint32) << place))
    tl.store(targets + state, target - tl.sum(tl.where(bins > digit, held, 0), 0))


@triton.jit
def histogram_of(histograms, b, KIND: tl.constexpr, LEVEL: tl.constexpr):
    """Where a histogram of row b begins."""
    return histograms + ((b.to(tl.int64) * KINDS + KIND) * LEVELS + LEVEL) * BINS


@triton.jit
def least_kept(bounds, b, k, p):
    """The least score that top-k and top-p keep, after all levels; -inf where neither is asked for."""
    bound = tl.full((), float("-inf"), tl.float32)
    if p < 1:
        bound = float_of(tl.load(bounds + b * KINDS + MASS))
    elif k > 0:
        bound = float_of(tl.load(bounds + b * KINDS + COUNT))
    return bound
