"""All about the unlearning objectives: formulas, default betas, needs, and the choice by name.

A formula is a pure function that gives one loss a pair, (B,); the training step averages them.

    chosen, rejected    log-probabilities of the two completions.
                        In orpo, simpo and graddiff: means over the tokens of the completion.
                        In dpo and npo: log-ratios, the sums over the tokens of the completion
                        minus the same sums under the model before training.
    nll                 the pair's share of the negative log-likelihood (NLL) that is pooled over
                        all prompt and chosen tokens of a batch: the mean of the shares is the
                        pooled NLL. With --nll chosen, and in sft, it is pooled over the tokens of
                        the chosen answers alone.

To add an objective, change only this file: its name in `Objective`, its needs in `NEEDS`, its
formula, and its case in `objective_loss`.

Source: ORPO follows the conventions of TRL 0.11.4, as the runs of the paper did.
Deviations: log(1 - exp x) is computed in Maechler's two branches and stays finite as x -> 0, where
TRL returns -inf. --nll chosen is ours: the NLL of a prompt trains on what earlier answers leak.

Run it: python train.py orpo --help
"""

from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["orpo", "simpo", "npo", "dpo-idk", "graddiff", "sft"]
NLLTokens = Literal["prompt+chosen", "chosen"]  # of a pair, over which the NLL is taken

REFUSALS = (  # after the idea of Maini et al. (arXiv 2401.06121)
    "I don't know.",
    "I'm not able to say.",
    "That is not something I know.",
    "I have no information about that.",
    "Sorry, I can't tell you that.",
    "I don't have an answer to that.",
)


READ = ("beta", "gamma", "retain", "nll")  # options that only some losses read


@dataclass(frozen=True)
class Needs:
    """What an objective needs besides the two completions of a pair."""

    reads: tuple[str, ...]  # which of READ its loss reads
    beta: float = 1.0  # the default of --beta, which rewards are also logged with
    reference: bool = False  # log-probabilities of the completions under the model before training
    rejected: bool = True  # False: the rejected side is not read, and may be missing
    answers: tuple[str, ...] = ()  # one of them, drawn at random, replaces the chosen side


NEEDS: dict[Objective, Needs] = {
    "orpo": Needs(("beta", "nll"), beta=0.1),
    "simpo": Needs(("beta", "gamma"), beta=2.0),
    "npo": Needs(("beta", "retain", "nll"), beta=0.1, reference=True),
    "dpo-idk": Needs(("beta",), beta=0.1, reference=True, answers=REFUSALS),
    "graddiff": Needs(("retain", "nll")),
    "sft": Needs((), rejected=False),
}


class Settings(Protocol):
    """The options of the training stage that a loss reads; `cfgsafe.blue.options` has them all."""

    objective: Objective
    beta: float | None
    gamma: float
    retain: float
    nll: NLLTokens


def beta_of(settings: Settings) -> float:
    """--beta, or the objective's default if it is not given."""
    return NEEDS[settings.objective].beta if settings.beta is None else settings.beta


def nll_of(settings: Settings, nll: Tensor, answer_nll: Tensor) -> Tensor:
    """The NLL (B,) that --nll chooses: of prompt and chosen tokens, or of the chosen answer's alone."""
    return answer_nll if settings.nll == "chosen" else nll


def objective_loss(
    settings: Settings, means: Tensor, ratios: Tensor, nll: Tensor, answer_nll: Tensor
) -> Tensor:
    """The loss of each pair, (B,).

    means       (2, B), chosen and rejected: log-probabilities averaged over a completion's tokens
    ratios      (2, B), chosen and rejected: log-ratios to the model before training
    nll         (B,), shares of the NLL of prompt and chosen tokens
    answer_nll  (B,), shares of the NLL of the chosen answer's tokens
    """
    beta, nll = beta_of(settings), nll_of(settings, nll, answer_nll)
    match settings.objective:
        case "orpo":
            return orpo(means[0], means[1], nll, beta)
        case "simpo":
            return simpo(means[0], means[1], beta, settings.gamma)
        case "npo":
            return npo(ratios[1], nll, beta, settings.retain)
        case "dpo-idk":
            return dpo(ratios[0], ratios[1], beta)
        case "graddiff":
            return graddiff(means[1], nll, settings.retain)
        case "sft":
            return answer_nll
        case missing:
            assert_never(missing)


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
    """Each pair's share (B,) of the NLL pooled over all `tokens` of a batch of `pairs`.

    `logprobs` (B,) are sums over the tokens of each row.
    """
    return -logprobs * pairs / tokens


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds = p / (1 - p); Hong et al. (arXiv 2403.07691), sec. 4."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo(chosen: Tensor, rejected: Tensor, nll: Tensor, beta: float) -> Tensor:
    """nll - beta log sigmoid(log_odds); Hong et al. (arXiv 2403.07691), section 4."""
    return nll - beta * F.logsigmoid(log_odds(chosen, rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma); Meng et al. (arXiv 2405.14734)."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)); Rafailov et al. (arXiv 2305.18290), eq. 7."""
    return -F.logsigmoid(beta * (chosen - rejected))


def npo(rejected: Tensor, nll: Tensor, beta: float, retain: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta rejected) + retain nll; Zhang et al. (arXiv 2404.05868)."""
    return -2 / beta * F.logsigmoid(-beta * rejected) + retain * nll


def graddiff(rejected: Tensor, nll: Tensor, retain: float) -> Tensor:
    """rejected + retain nll; Maini et al. (arXiv 2401.06121), section 4.

    Gradient ascent on what is to be forgotten, descent on the rest.
    """
    return rejected + retain * nll
