"""The loss of one batch of preference pairs, and what TRL logs with it.

Source: as `cfgsafe.losses`, with the logged values of TRL 0.11.4.
Under several processes each computes a share of the batch; counts of tokens and pairs are the whole batch's, so that the shares add up.

Run it: python train.py orpo --help
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cfgsafe.blue.batches import Pair, collate
from cfgsafe.llama import Llama
from cfgsafe.logprobs import head_logprobs
from cfgsafe.losses import Settings, log_odds, objective_loss, pooled_nll
from cfgsafe.parallel import World

LOGGED = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards_chosen",
    "rewards_rejected",
    "rewards_accuracy",
    "rewards_margin",
)


def score(net: nn.Module, model: Llama, pairs: list[Pair], share: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of B pairs: of chosen and rejected completions, summed and averaged over their tokens, (2, B) twice; of prompt
    and chosen tokens together, (B,)."""
    batch = collate(pairs, share=share, device=model.device)
    hidden = net(batch.ids, batch.positions, mask=batch.mask).flatten(0, 1)
    parts = head_logprobs(model, hidden[batch.reads], batch.targets).split(batch.lengths)
    sums = torch.stack(
        [part[len(part) - answer :].sum() for part, answer in zip(parts, batch.answers, strict=True)]
    ).view(2, -1)
    means = sums / torch.tensor(batch.answers, device=sums.device).view(2, -1)
    return sums, means, torch.stack([part.sum() for part in parts[: len(pairs)]])


def batch_loss(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Settings, reference: Tensor | None, world: World
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, whose gradients average over the processes to the batch's own, and its LOGGED values, (8,).

    `net` is `model` or its wrapper; `reference` (2, B) are the completions' summed log-probabilities before training.
    """
    mine = list(range(len(pairs)))[world.rank :: world.size]
    share = bool(mine) / len(pairs)
    mine = mine or [0]  # a process without a pair computes one for nothing, because the others wait for it
    sums, means, everything = score(net, model, [pairs[number] for number in mine], options.share_prefix)
    nll = pooled_nll(everything, len(pairs), sum(len(pair.chosen.ids) - 1 for pair in pairs))
    answer_nll = pooled_nll(
        sums[0], len(pairs), sum(len(pair.chosen.ids) - pair.chosen.first for pair in pairs)
    )
    ratios = sums if reference is None else sums - reference[:, mine]
    losses = objective_loss(options, means, ratios, nll, answer_nll)
    rewards = options.beta * (means if reference is None else ratios)
    odds = log_odds(*means)
    logged = (
        losses,
        nll,
        F.logsigmoid(odds),
        odds,
        *rewards,
        (rewards[0] > rewards[1]).float(),
        rewards[0] - rewards[1],
    )
    values = world.total(torch.stack([value.detach().sum() for value in logged]) * share).cpu()
    return losses.sum() * share * world.size, values


@torch.no_grad()
def reference_logprobs(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Settings, world: World
) -> Tensor | None:
    """Summed log-probabilities of both completions of all pairs, (2, pairs), before training; None where the objective reads none."""
    if options.objective not in ("npo", "dpo-idk"):
        return None
    result = torch.zeros(2, len(pairs), device=world.device)
    model.eval()
    for start in tqdm(
        range(0, len(pairs), options.batch_size), desc="reference", leave=False, disable=not world.main
    ):
        mine = list(range(start, min(start + options.batch_size, len(pairs))))[world.rank :: world.size]
        sums, _, _ = score(net, model, [pairs[number] for number in mine or [start]], options.share_prefix)
        result[:, mine] = sums[:, : len(mine)].float()
    model.train()
    return world.total(result)


@torch.no_grad()
def evaluate(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Settings, reference: Tensor | None, world: World
) -> dict[str, float]:
    """The LOGGED values over held-out `pairs`: the mean of their batches, weighted by the pairs in them."""
    model.eval()
    totals = torch.zeros(len(LOGGED))
    for start in range(0, len(pairs), options.batch_size):
        some = slice(start, start + options.batch_size)
        known = None if reference is None else reference[:, some]
        totals += (
            batch_loss(net, model, pairs[some], options, known, world)[1] * len(pairs[some]) / len(pairs)
        )
    model.train()
    return dict(zip(LOGGED, totals.tolist(), strict=True))
