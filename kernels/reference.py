"""Guidance between pairs of logits and sampling from the result: the reference in plain PyTorch, which the Triton kernel must equal.

Source: Smirnov (arXiv 2412.06846), eq. 2, log space:         log P = log P_neg + g (log P_pos - log P_neg)
                                    eq. 6, probability space:     P = P_neg + g (P_pos - P_neg)
        plausibility mask: Li et al., contrastive decoding (arXiv 2210.15097); Gumbel-max: Maddison et al. (arXiv 1411.0030);
        random numbers: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Deviation: the paper's code hands eq. 6 on as if it were log-scores, which only works greedily. Here it is clamped at 0, renormalised and
taken to the log, so that temperature and sampling mean what they say.

What is defined where the formulas are not:
    NaN logit               as -inf: never chosen
    +inf logit              as the largest float32
    P_neg = 0 or P_pos = 0  its logarithm counts as FLOOR in eq. 2; a token that both rows exclude stays excluded
    ties                    the lowest token id; at the border of top-k and top-p all of them stay
    nothing left            (mask and clamp exclude every token): the positive row's most likely token, log-probability 0
    no finite positive logit: token -1, log-probability NaN
Shapes: B requests, R rows of logits, V vocabulary.

Run it: python -m cfgsafe.bench guidance
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

FLOOR = -1e3  # log of a probability that is 0
LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class Sampling:
    """How each of B requests draws its next token; tensors (B,) on the device of the logits, so that changing them costs no host sync."""

    positive: Tensor  # int64: its row of the logits
    negative: Tensor  # int64: the row to steer away from; -1: not guided
    guidance: Tensor  # float32: g; 1 is the positive row, 0 the negative one
    log_space: Tensor  # bool: eq. 2, else eq. 6
    alpha: Tensor  # float32: keep tokens with P_pos >= alpha max P_pos; 0 keeps all
    temperature: Tensor  # float32: 0 is greedy
    top_k: Tensor  # int32: 0 keeps all
    top_p: Tensor  # float32: 1 keeps all
    seed: Tensor  # int64
    step: Tensor  # int64: tokens drawn before, the counter of the random numbers
    # Known on the host: whether any request may use top_k or top_p, a temperature, a negative row, alpha.
    truncates: bool = True
    draws: bool = True
    guides: bool = True
    masks: bool = True

    def to(self, device: torch.device | str) -> "Sampling":
        """On another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sampling(
            **{
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in tensors.items()
            }
        )


def widen(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax (B, V) after NaN became -inf and +inf the largest float32, at least in float32; a row of -inf stays one."""
    z = widen(logits)
    if (
        not z.is_cuda and not (logs := z.log_softmax(-1))[:, 0].isnan().any()
    ):  # nothing to mend; on a GPU one would have to wait to know
        return logs
    z = z.nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
    return z.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def guide(
    positive: Tensor, negative: Tensor, guidance: Tensor, log_space: Tensor, alpha: Tensor | None = None
) -> Tensor:
    """Guided log-probabilities (B, V) of two rows of logits (B, V) each; guidance, alpha (B,), log_space (B,) bool."""
    pos, neg = log_probabilities(positive), log_probabilities(negative)
    g, spaces = guidance.to(pos.dtype)[:, None], log_space[:, None]
    asked = lambda rows: rows.is_cuda or rows.any()  # on a GPU one would have to wait to know
    raw = pos
    if asked(spaces):
        low_pos, low_neg = pos.clamp(min=FLOOR), neg.clamp(min=FLOOR)
        raw = torch.where(
            (pos == -torch.inf) & (neg == -torch.inf), -torch.inf, g * low_pos + (1 - g) * low_neg
        )
    if asked(~spaces):
        probs = (
            (g * pos.exp() + (1 - g) * neg.exp()).clamp(min=0).log()
        )  # P_neg + g (P_pos - P_neg) would cancel near g = 0
        raw = torch.where(spaces, raw, probs)
    return normalise(raw, pos, alpha)


def normalise(raw: Tensor, pos: Tensor, alpha: Tensor | None) -> Tensor:
    """Log-probabilities (B, V) of the scores `raw` among the tokens that are plausible by `pos`, the positive row's log-probabilities."""
    best, first = pos.max(-1, keepdim=True)
    if alpha is not None:
        bound = best + alpha.to(pos.dtype)[:, None].log()  # -inf where alpha is 0
        raw = torch.where(pos >= bound, raw, -torch.inf)
    total = raw.logsumexp(-1, keepdim=True)
    none_left = total == -torch.inf
    guided = torch.where(none_left, -torch.inf, raw - total).scatter(
        -1, first, torch.where(none_left, 0.0, (raw - total).gather(-1, first))
    )
    return torch.where(best > -torch.inf, guided, torch.nan)


def next_tokens(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token (B,) int64 of each request and its guided log-probability (B,), from logits (R, V).

    Temperature, then top-k, then top-p act on the guided distribution; the log-probability is that of the guided distribution before them.
    """
    positive = logits[sampling.positive]
    if sampling.guides:
        guided = sampling.negative >= 0
        negative = torch.where(guided[:, None], logits[sampling.negative.clamp(min=0)], positive)
        logprobs = guide(
            positive,
            negative,
            sampling.guidance,
            sampling.log_space & guided,
            sampling.alpha if sampling.masks else None,
        )
    else:
        logprobs = log_probabilities(positive)
        if sampling.masks:
            logprobs = normalise(logprobs, logprobs, sampling.alpha)
    if not sampling.draws:
        return chosen(logprobs, logprobs.argmax(-1))
    greedy = sampling.temperature == 0
    scores = logprobs / torch.where(greedy, 1.0, sampling.temperature).to(logprobs)[:, None]
    if sampling.truncates:
        scores = torch.where(greedy[:, None], scores, truncate(scores, sampling.top_k, sampling.top_p))
    noise = gumbel(sampling.seed, sampling.step, logits.shape[-1]).to(scores.dtype)
    scores = torch.where(greedy[:, None], scores, scores + noise)
    return chosen(logprobs, scores.argmax(-1))


def chosen(logprobs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens (B,) and their log-probabilities (B,); -1 and NaN where the token has no probability."""
    values = logprobs.gather(-1, tokens[:, None])[:, 0]
    possible = values > -torch.inf  # false for NaN, too
    return torch.where(possible, tokens, -1), torch.where(possible, values, torch.nan)


def truncate(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Scores (B, V) with -inf for all but the top_k (B,) best and, of those, the fewest that hold the share top_p (B,) of the mass."""
    ordered = scores.sort(-1, descending=True).values
    k = torch.where(top_k > 0, top_k, scores.shape[-1]).clamp(max=scores.shape[-1])
    kth = ordered.gather(-1, k.long()[:, None] - 1)
    mass = torch.where(ordered >= kth, ordered, -torch.inf).softmax(-1).cumsum(-1)
    reached = (mass < top_p.to(mass)[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    pth = torch.where((top_p < 1)[:, None], ordered.gather(-1, reached), -torch.inf)
    return torch.where(scores >= torch.maximum(kth, pth), scores, -torch.inf)


def gumbel(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise (B, size), a function of seed (B,), step (B,) and token alone."""
    bits = philox(seed[:, None], torch.arange(size, device=seed.device)[None, :], step[:, None])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """The first 32 bits of Philox4x32-10 for a 64-bit key and the counter (c0, c1, 0, 0), as int64."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1 = torch.broadcast_tensors(c0 & low, c1 & low)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits, wrapping; the shift's sign bits are masked off
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0
