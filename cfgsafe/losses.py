"""Unlearning objectives over preference pairs, as pure functions: one loss a pair, (B,), to be averaged.

chosen, rejected    log-probabilities of the two completions: means over their tokens in `orpo`, `simpo` and `graddiff`; in `dpo` and
                    `npo` the sums over their tokens, less the same sums under the model before training
nll                 the pair's share of the pooled NLL over prompt and chosen tokens; the mean of the shares is the pooled NLL. The
                    objective sft is such a share too, over the tokens of the chosen answer alone

ORPO follows the conventions of TRL 0.11.4, whose runs the paper reports.
Deviation: log(1 - exp x) is evaluated by Maechler's two-branch form, finite as x -> 0, where TRL returns -inf.

Run it: python train.py orpo --help
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite at 0.

    >>> log1mexp(torch.tensor([-1.0]))  # log(1 - 1/e)
    tensor([-0.4587])
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    small = x > -0.6931472
    return torch.where(
        small,
        torch.log(-torch.expm1(torch.where(small, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(small, -1.0, x))),
    )


def pooled_nll(logprobs: Tensor, pairs: int, tokens: int) -> Tensor:
    """Shares of `logprobs` (B,), the sums over each row's tokens, in the NLL that is pooled over all `tokens` of a batch of `pairs`."""
    return -logprobs * pairs / tokens


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), where odds = p / (1 - p); Hong et al. (arXiv 2403.07691), section 4."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo(chosen: Tensor, rejected: Tensor, nll: Tensor, beta: float) -> Tensor:
    """nll - beta log sigmoid(log_odds); Hong et al. (arXiv 2403.07691), section 4."""
    return nll - beta * F.logsigmoid(log_odds(chosen, rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma); Meng et al. (arXiv 2405.14734)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of log-ratios to the reference; Rafailov et al. (arXiv 2305.18290), eq. 7."""
    return -F.logsigmoid(beta * (chosen - rejected))


def npo(rejected: Tensor, nll: Tensor, beta: float, retain: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta rejected) + retain nll, rejected being the log-ratio; Zhang et al. (arXiv 2404.05868)."""
    return -2 / beta * F.logsigmoid(-beta * rejected) + retain * nll


def graddiff(rejected: Tensor, nll: Tensor, retain: float) -> Tensor:
    """rejected + retain nll: ascent on what is to be forgotten, descent on the rest; Maini et al. (arXiv 2401.06121), section 4."""
    return rejected + retain * nll


BETA = {"orpo": 0.1, "simpo": 2.0, "npo": 0.1, "dpo-idk": 0.1, "graddiff": 0.1, "sft": 0.1}


class Settings(Protocol):
    """The options of the training stage that the loss reads; see cfgsafe.blue.orpo."""

    objective: str
    beta: float
    gamma: float
    retain: float
    batch_size: int
    share_prefix: bool


def objective_loss(
    options: Settings, means: Tensor, ratios: Tensor, nll: Tensor, answer_nll: Tensor
) -> Tensor:
    """The objective's loss of each pair, (B,), from `means` and `ratios` (2, B) of chosen and rejected and the shares (B,) of both NLLs."""
    match options.objective:
        case "orpo":
            return orpo(*means, nll, options.beta)
        case "simpo":
            return simpo(*means, options.beta, options.gamma)
        case "dpo-idk":
            return dpo(*ratios, options.beta)
        case "npo":
            return npo(ratios[1], nll, options.beta, options.retain)
        case "graddiff":
            return graddiff(means[1], nll, options.retain)
        case "sft":
            return answer_nll
