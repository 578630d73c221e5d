"""Guidance between pairs of logits, and sampling from the result: the reference in plain PyTorch.

Source: Smirnov (arXiv 2412.06846)  eq. 2, log space:          log P = log P_neg + g (log P_pos - log P_neg)
                                    eq. 6, probability space:      P = P_neg + g (P_pos - P_neg)
        plausibility mask: Li et al., contrastive decoding (arXiv 2210.15097)
        Gumbel-max: Maddison et al. (arXiv 1411.0030)
        random numbers: Philox4x32-10, Salmon et al. (SC 2011), "Parallel random numbers: as easy as 1, 2, 3"
Deviation: the paper's code uses the result of eq. 6 as log-scores, which is right for greedy
decoding only. Here it is clamped at 0, renormalised and turned into logarithms, so that sampling is
right too.

The code that knows the formulas. A new space needs an entry in the first two places; the others are
shortcuts for one space:
    FORMULAS, below                        the table; its order gives each space its number
    guided_scores, kernels/guidance.py     the same formulas in Triton, one branch for each space
                                           (a sum over the row needs a float in the records, too)
    Sampler, cfgsafe/lockstep.py           log space: hidden states are combined before the head
    certified, cfgsafe/lockstep.py         probability space: when the negative row can be skipped

The results where the formulas are not defined:
    NaN or +inf logit       in either row: token NOT_FINITE, log-probability NaN
    P_neg = 0 or P_pos = 0  its logarithm counts as FLOOR in eq. 2; both 0: the token stays excluded
    ties                    the lowest token id; at the border of top-k and top-p all of them stay
    nothing left            (mask and clamp exclude all): the positive row's best token, log-probability 0
    positive row all -inf   token IMPOSSIBLE, log-probability NaN
Shapes: B requests, R rows of logits, V vocabulary.

Run it: python -m cfgsafe.bench guidance
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

FLOOR = -1e3  # stands for log 0
IN_CACHE = 2**16  # random numbers that a CPU computes at a time; more leave its cache, and take longer
# In place of a token:
IMPOSSIBLE = -1  # none has a probability above 0
NOT_FINITE = -2  # the logits hold NaN or +inf, so the model is broken, or its numbers overflow


def probability_space(log_pos: Tensor, log_neg: Tensor, g: Tensor) -> Tensor:
    """Eq. 6, clamped at 0; written as P_neg + g (P_pos - P_neg) it would lose digits near g = 0."""
    mixed = g * log_pos.exp() + (1 - g) * log_neg.exp()
    return mixed.clamp(min=0).log()


def log_space(log_pos: Tensor, log_neg: Tensor, g: Tensor) -> Tensor:
    """Eq. 2."""
    mixed = g * log_pos.clamp(min=FLOOR) + (1 - g) * log_neg.clamp(min=FLOOR)
    both_exclude = (log_pos == -torch.inf) & (log_neg == -torch.inf)
    return torch.where(both_exclude, -torch.inf, mixed)


# A formula turns the log-probabilities of both rows (B, V) and g (B, 1) into log-scores (B, V),
# which `normalise` turns into log-probabilities.
FORMULAS = {"prob": probability_space, "log": log_space}
SPACES = tuple(FORMULAS)


@dataclass(frozen=True)
class Sampling:
    """How each of B requests draws its next token; tensors (B,) on the device of the logits."""

    positive: Tensor  # int64: index of its positive row of logits
    negative: Tensor  # int64: index of the row to steer away from; -1: not guided
    guidance: Tensor  # float32: g; 1 gives the positive row, 0 the negative one
    space: Tensor  # int32: index of SPACES
    alpha: Tensor  # float32: keep tokens with P_pos >= alpha max P_pos; 0 keeps all
    temperature: Tensor  # float32: 0 is greedy
    top_k: Tensor  # int32: 0 keeps all
    top_p: Tensor  # float32: 1 keeps all
    seed: Tensor  # int64
    step: Tensor  # int64: number of tokens drawn before; the counter of the random numbers
    # What the host knows about all requests together. With False the reference leaves out work.
    truncates: bool = True  # some request may use top-k or top-p
    draws: bool = True  # some request may have a temperature above 0
    guides: bool = True  # some request may have a negative row
    masks: bool = True  # some request may have an alpha above 0

    @staticmethod
    def uniform(pos: Tensor, neg: Tensor, g: float, space: str, temperature: float) -> "Sampling":
        """The same settings for all pairs of rows `pos` and `neg` (B,); no mask, top-k or top-p."""
        floats = partial(torch.full_like, pos, dtype=torch.float32)
        ints = partial(torch.full_like, pos, dtype=torch.int32)
        return Sampling(
            positive=pos,
            negative=neg,
            guidance=floats(g),
            space=ints(SPACES.index(space)),
            alpha=floats(0.0),
            temperature=floats(temperature),
            top_k=ints(0),
            top_p=floats(1.0),
            seed=pos,
            step=torch.zeros_like(pos),
            truncates=False,
            draws=temperature > 0,
            masks=False,
        )


def widen(x: Tensor) -> Tensor:
    """The values in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax (B, V), at least in float32.

    A row with NaN or +inf becomes a row of NaN. A row of -inf stays a row of -inf.
    """
    z = widen(logits)
    logs = z.log_softmax(-1)
    if not z.is_cuda and not logs[:, 0].isnan().any():  # on a GPU, the host would have to wait for the answer
        return logs
    return torch.where(z.amax(-1, keepdim=True) == -torch.inf, -torch.inf, logs)


def guide(
    positive: Tensor, negative: Tensor, guidance: Tensor, space: Tensor, alpha: Tensor | None = None
) -> Tensor:
    """Guided log-probabilities (B, V) of two rows of logits (B, V) each.

    A row is NaN where one of its logits is NaN or +inf, and -inf where all positive ones are -inf.
    guidance and alpha are (B,); space (B,) holds indices of SPACES, and any other number gives NaN.
    """
    log_pos, log_neg = log_probabilities(positive), log_probabilities(negative)
    g = guidance.to(log_pos.dtype)[:, None]  # (B, 1)
    scores = torch.full_like(log_pos, torch.nan)
    for index, formula in enumerate(FORMULAS.values()):
        chosen_here = space == index  # (B,)
        if chosen_here.is_cuda or chosen_here.any():  # on a GPU, the host would have to wait for the answer
            scores = torch.where(chosen_here[:, None], formula(log_pos, log_neg, g), scores)
    return normalise(scores, log_pos, alpha)


def normalise(scores: Tensor, log_pos: Tensor, alpha: Tensor | None) -> Tensor:
    """Log-probabilities (B, V) of log-scores (B, V), restricted to the tokens that are plausible.

    A token is plausible when P_pos >= alpha max P_pos; log_pos (B, V) holds log P_pos.
    """
    best, first = log_pos.max(-1, keepdim=True)  # (B, 1)
    if alpha is not None:
        bound = best + alpha.to(log_pos.dtype)[:, None].log()  # -inf where alpha is 0
        scores = torch.where(log_pos >= bound, scores, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)  # (B, 1)
    none_left = total == -torch.inf
    logprobs = torch.where(none_left, -torch.inf, scores - total)
    of_first = torch.where(none_left, 0.0, (scores - total).gather(-1, first))
    logprobs = logprobs.scatter(-1, first, of_first)
    logprobs = torch.where(best == -torch.inf, -torch.inf, logprobs)
    return torch.where(best.isnan() | total.isnan(), torch.nan, logprobs)


def next_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """From logits (R, V): the next token (B,) int64 and its guided log-probability (B,).

    IMPOSSIBLE or NOT_FINITE and NaN where there is none. The log-probability is that before temperature,
    top-k and top-p, which act in this order.
    """
    logprobs = guided_logprobs(logits, sampling)  # (B, V)
    if not sampling.draws:
        return chosen(logprobs, logprobs.argmax(-1))
    greedy = sampling.temperature == 0  # (B,)
    scores = logprobs / torch.where(greedy, 1.0, sampling.temperature).to(logprobs)[:, None]
    if sampling.truncates:
        kept = truncate(scores, sampling.top_k, sampling.top_p)
        scores = torch.where(greedy[:, None], scores, kept)
    noise = gumbel(sampling.seed, sampling.step, logits.shape[-1]).to(scores.dtype)
    scores = torch.where(greedy[:, None], scores, scores + noise)
    return chosen(logprobs, scores.argmax(-1))


def guided_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Guided log-probabilities (B, V) of each request, from logits (R, V)."""
    positive = logits[sampling.positive]  # (B, V)
    alpha = sampling.alpha if sampling.masks else None
    if not sampling.guides:
        logprobs = log_probabilities(positive)
        return logprobs if alpha is None else normalise(logprobs, logprobs, alpha)
    # A request without a negative row is paired with itself; in probability space nothing changes.
    guided = sampling.negative >= 0  # (B,)
    negative = torch.where(guided[:, None], logits[sampling.negative.clamp(min=0)], positive)
    space = torch.where(guided, sampling.space, SPACES.index("prob"))
    return guide(positive, negative, sampling.guidance, space, alpha)


def chosen(logprobs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probabilities (B,); NaN for what stands in place of a token."""
    values = logprobs.gather(-1, tokens[:, None])[:, 0]
    tokens = torch.where(values == -torch.inf, IMPOSSIBLE, tokens)
    tokens = torch.where(values.isnan(), NOT_FINITE, tokens)
    return tokens, torch.where(tokens < 0, torch.nan, values)


def truncate(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Scores (B, V) with -inf for all but the top_k (B,) best and, of those, the nucleus.

    The nucleus is the fewest tokens that hold the share top_p (B,) of the mass.
    """
    V = scores.shape[-1]
    ordered = scores.sort(-1, descending=True).values  # (B, V)
    k = torch.where(top_k > 0, top_k, V).clamp(max=V)
    kth = ordered.gather(-1, k.long()[:, None] - 1)  # (B, 1): the lowest score that top-k keeps
    mass = torch.where(ordered >= kth, ordered, -torch.inf).softmax(-1).cumsum(-1)
    reached = (mass < top_p.to(mass)[:, None]).sum(-1, keepdim=True).clamp(max=V - 1)
    pth = torch.where((top_p < 1)[:, None], ordered.gather(-1, reached), -torch.inf)
    return torch.where(scores >= torch.maximum(kth, pth), scores, -torch.inf)


def gumbel(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise (B, size): a function of seed (B,), step (B,) and token id alone."""
    width = size if seed.is_cuda else max(1, IN_CACHE // len(seed))
    noise = []
    for token in torch.arange(size, device=seed.device).split(width):
        bits = philox(seed[:, None], token[None, :], step[:, None])  # (B, width)
        uniform = (bits.bitwise_right_shift_(9).float() + 0.5) * 2.0**-23  # 23 bits: never 0, never 1
        noise.append(uniform.log_().neg_().log_().neg_())
    return torch.cat(noise, dim=-1)


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """The first 32 bits of Philox4x32-10, as int64, for the key `seed` and the counter (c0, c1, 0, 0)."""
    low = 0xFFFFFFFF  # the low 32 bits
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1 = torch.broadcast_tensors(c0 & low, c1 & low)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap at 64 bits; `low` drops copies of the sign
        # In place, as each pass over a tensor of the vocabulary's size counts.
        c0 = (b >> 32).bitwise_and_(low).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(low).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(low), a.bitwise_and_(low)
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0
