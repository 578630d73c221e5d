"""The ORPO loss and what it is made of, as pure functions.

Source: Hong et al., "ORPO" (arXiv 2403.07691), with the conventions of TRL 0.11.4, whose runs the paper reports:
    log_odds = (lc - lr) - (log1mexp(lc) - log1mexp(lr)),   loss = NLL - beta * mean(logsigmoid(log_odds))
lc, lr: mean log-probability of the chosen and rejected completion; NLL: pooled over prompt and chosen tokens.
Deviation: log(1 - exp x) is evaluated by Maechler's two-branch form, finite as x -> 0, where TRL returns -inf.

Run it: python train.py orpo --help
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` (...) under `logits` (..., V), in float32."""
    return -F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite at 0.

    >>> log1mexp(torch.tensor([-1.0]))  # log(1 - 1/e)
    tensor([-0.4587])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    small = x > -0.6931472
    return torch.where(small, torch.log(-torch.expm1(torch.where(small, x, -1.0))), torch.log1p(-torch.exp(torch.where(small, -1.0, x))))


@dataclass(frozen=True)
class ORPO:
    """The loss, a scalar, and what TRL logs with it; the vectors are (B,), one entry a pair."""

    loss: Tensor
    nll: Tensor
    log_odds: Tensor
    log_odds_ratio: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def orpo(chosen: Tensor, rejected: Tensor, nll: Tensor, beta: float) -> ORPO:
    """ORPO of mean completion log-probs `chosen`, `rejected` (B,) and the pooled NLL, a scalar."""
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = F.logsigmoid(log_odds)
    return ORPO(nll - beta * ratio.mean(), nll, log_odds, ratio, beta * chosen, beta * rejected)
