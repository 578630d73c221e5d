"""ORPO against hand-derived cases and float64."""

import math

import torch

from cfgsafe.losses import log1mexp, log_odds, orpo, pooled_nll


def test_log1mexp_equals_float64():
    x = -torch.logspace(-6, 2, 200, dtype=torch.float64)
    exact = torch.log1p(-torch.exp(x))
    assert torch.allclose(log1mexp(x.float()).double(), exact, rtol=2e-3, atol=1e-6)


def test_orpo_by_hand():
    """p = 1/2 and 1/4: odds 1 and 1/3, log odds ratio log 3, sigmoid of it 3/4."""
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert math.isclose(log_odds(chosen, rejected).item(), math.log(3), rel_tol=1e-5)
    assert math.isclose(
        orpo(chosen, rejected, torch.tensor([2.0]), beta=0.1).item(), 2 - 0.1 * math.log(0.75), rel_tol=1e-6
    )


def test_pooled_nll_by_hand():
    """Answers of one token at 1/2 and three at 1/4: seven halvings over four tokens, though the answers' own means are one and two."""
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
