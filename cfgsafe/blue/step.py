"""The loss of one batch of preference pairs, and the values that TRL logs with it.

Source: the losses of `cfgsafe.losses`, the logged values of TRL 0.11.4.
Deviation: a pair may have a weight. The loss of a batch of B pairs is the sum of weight * loss over its
pairs, divided by B: not by the sum of the weights, so that a batch of light pairs moves less. A pair's
share of the pooled NLL is a part of its loss; its tokens are counted whatever its weight. Logged values
besides the loss know no weights. Of a row to keep, which has no rejected side, the loss is its share of the
NLL of the answers; what compares two sides is logged as a mean over the other pairs, and 0 without any.
Several processes each compute a share of the batch. Token and pair counts are those of the whole
batch, so the shares add up to its loss.

Run it: python train.py orpo --help
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfgsafe.blue.batches import Pair, collate
from cfgsafe.blue.options import Options
from cfgsafe.llama import Llama
from cfgsafe.logprobs import head_logprobs
from cfgsafe.losses import NEEDS, beta_of, log_odds, nll_of, objective_loss, pooled_nll
from cfgsafe.parallel import World
from cfgsafe.progress import progress

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
    """Log-probabilities of B pairs: sums and means over the completions' tokens, (2, B) each, chosen
    sides first; and sums over prompt and completion of the chosen sides, (B,).
    """
    batch = collate(pairs, share=share, device=model.device)
    hidden = net(batch.ids, batch.positions, mask=batch.mask).flatten(0, 1)
    sides = head_logprobs(model, hidden[batch.reads], batch.targets).split(batch.lengths)
    completion_sums = []
    for side, answer_tokens in zip(sides, batch.answers, strict=True):
        completion_sums.append(side[len(side) - answer_tokens :].sum())
    sums = torch.stack(completion_sums).view(2, -1)
    means = sums / torch.tensor(batch.answers, device=sums.device).view(2, -1)
    chosen_sums = torch.stack([side.sum() for side in sides[: len(pairs)]])
    return sums, means, chosen_sums


def batch_loss(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Options, reference: Tensor | None, world: World
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its LOGGED values, (8,).

    Averaged over the processes, the gradients of the loss are those of the batch. `net` is `model` or
    its wrapper; `reference` (2, B) are the completions' sums before training, where needed.
    """
    own = list(range(world.rank, len(pairs), world.size))
    weight = 1 / len(pairs) if own else 0.0
    own = own or [0]  # a process without a pair computes one at weight 0, as the others wait for it
    sums, means, chosen_sums = score(net, model, [pairs[number] for number in own], options.share_prefix)

    chosen_tokens = sum(len(pair.chosen.ids) - 1 for pair in pairs)
    answer_tokens = sum(len(pair.chosen.ids) - pair.chosen.first for pair in pairs)
    nll = pooled_nll(chosen_sums, len(pairs), chosen_tokens)
    answer_nll = pooled_nll(sums[0], len(pairs), answer_tokens)
    ratios = sums if reference is None else sums - reference[:, own]
    weights = torch.tensor([pairs[number].weight for number in own], device=sums.device)
    kept = torch.tensor([pairs[number].kept for number in own], device=sums.device)
    losses = weights * torch.where(kept, answer_nll, objective_loss(options, means, ratios, nll, answer_nll))

    chosen_reward, rejected_reward = beta_of(options) * (means if reference is None else ratios)
    odds = log_odds(means[0], means[1])
    logged = (
        losses,
        nll_of(options, nll, answer_nll),
        F.logsigmoid(odds),
        odds,
        chosen_reward,
        rejected_reward,
        (chosen_reward > rejected_reward).float(),
        chosen_reward - rejected_reward,
    )
    totals = [value.detach().sum() for value in logged[:2]]
    totals += [value.detach()[~kept].sum() for value in logged[2:]]
    values = torch.stack(totals) * (weight > 0)
    return losses.sum() * weight * world.size, world.total(values).cpu() / counts(pairs).clamp(min=1)


def counts(pairs: list[Pair]) -> Tensor:
    """How many pairs each of the LOGGED values is a mean over, (8,)."""
    compared = sum(not pair.kept for pair in pairs)
    return torch.tensor([len(pairs)] * 2 + [compared] * (len(LOGGED) - 2))


@torch.no_grad()
def reference_logprobs(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Options, world: World
) -> Tensor | None:
    """Sums over both completions of all pairs before training, (2, pairs); None where not needed."""
    if not NEEDS[options.objective].reference:
        return None
    result = torch.zeros(2, len(pairs), device=world.device)
    model.eval()
    starts = range(0, len(pairs), options.batch_size)
    for start in progress(starts, desc="reference", disable=not world.main):
        end = min(start + options.batch_size, len(pairs))
        own = list(range(start + world.rank, end, world.size))
        some = [pairs[number] for number in own or [start]]
        sums, _, _ = score(net, model, some, options.share_prefix)
        result[:, own] = sums[:, : len(own)].float()
    model.train()
    return world.total(result)


@torch.no_grad()
def evaluate(
    net: nn.Module, model: Llama, pairs: list[Pair], options: Options, reference: Tensor | None, world: World
) -> dict[str, float]:
    """The LOGGED values over held-out `pairs`: means of the batches, weighted by what each is a mean over."""
    model.eval()
    totals = torch.zeros(len(LOGGED))
    for start in range(0, len(pairs), options.batch_size):
        some = slice(start, start + options.batch_size)
        before = None if reference is None else reference[:, some]
        _, values = batch_loss(net, model, pairs[some], options, before, world)
        totals += values * counts(pairs[some])
    model.train()
    return dict(zip(LOGGED, (totals / counts(pairs).clamp(min=1)).tolist(), strict=True))
