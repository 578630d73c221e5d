"""The objectives: hand-derived cases, float64, and that none lacks a loss, needs or a beta."""

import math
from typing import get_args

import pytest
import torch

from cfgsafe.blue.options import Options
from cfgsafe.losses import (
    NEEDS,
    READ,
    Objective,
    beta_of,
    log1mexp,
    log_odds,
    objective_loss,
    orpo,
    pooled_nll,
)


def test_every_objective_has_its_needs():
    assert set(NEEDS) == set(get_args(Objective))


@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_objective_has_a_loss_for_each_pair(objective):
    options = Options("model", "pairs", "out", objective=objective)
    means = torch.tensor([[-0.5, -1.0], [-0.7, -0.3]])
    ratios = torch.tensor([[0.2, -0.1], [-0.4, 0.3]])
    nll, answer_nll = torch.tensor([1.5, 2.0]), torch.tensor([0.5, 0.75])
    losses = objective_loss(options, means, ratios, nll, answer_nll)
    assert losses.shape == (2,) and losses.isfinite().all()


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("name", READ)
def test_needs_name_the_options_that_a_loss_reads(objective, name):
    """The command line refuses the others."""
    means, ratios = torch.tensor([[-0.5], [-0.7]]), torch.tensor([[0.2], [-0.4]])
    losses = []
    for value in ("prompt+chosen", "chosen") if name == "nll" else (0.3, 0.9):
        options = Options("model", "pairs", "out", objective=objective, **{name: value})
        losses.append(objective_loss(options, means, ratios, torch.tensor([1.5]), torch.tensor([0.5])))
    assert (losses[0] != losses[1]).item() == (name in NEEDS[objective].reads)


def test_an_unknown_objective_has_no_loss():
    options = Options("model", "pairs", "out", objective="none", beta=0.1)
    with pytest.raises(AssertionError, match="none"):
        objective_loss(options, *torch.zeros(4, 2, 2))


def test_beta_is_the_objectives_own_where_none_is_asked_for():
    assert beta_of(Options("model", "pairs", "out", objective="simpo")) == 2.0
    assert beta_of(Options("model", "pairs", "out", objective="npo")) == 0.1
    assert beta_of(Options("model", "pairs", "out", objective="simpo", beta=0.0)) == 0.0


def test_log1mexp_equals_float64():
    x = -torch.logspace(-6, 2, 200, dtype=torch.float64)
    exact = torch.log1p(-torch.exp(x))
    assert torch.allclose(log1mexp(x.float()).double(), exact, rtol=2e-3, atol=1e-6)


def test_orpo_by_hand():
    """p = 1/2 and 1/4: odds of 1 and 1/3, a log-odds ratio of log 3, with a sigmoid of 3/4."""
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert math.isclose(log_odds(chosen, rejected).item(), math.log(3), rel_tol=1e-5)
    loss = orpo(chosen, rejected, torch.tensor([2.0]), beta=0.1).item()
    assert math.isclose(loss, 2 - 0.1 * math.log(0.75), rel_tol=1e-6)


def test_pooled_nll_by_hand():
    """One token at 1/2 and three at 1/4: seven halvings over four tokens.

    The means of the two answers alone would be one and two halvings.
    """
    shares = pooled_nll(torch.tensor([0.5, 0.25**3]).log(), pairs=2, tokens=4)
    assert math.isclose(shares.mean().item(), 7 / 4 * math.log(2), rel_tol=1e-6)


def test_a_certain_completion_stays_finite_with_its_gradient():
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.tensor([-1e-9], requires_grad=True)
    loss = orpo(chosen, rejected, torch.tensor([0.0]), beta=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_gradient_equals_finite_differences():
    point = torch.tensor([-0.3, -1.7, -0.01], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.9, -0.2, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: orpo(c, rejected, torch.zeros(3), 0.1), point)
