"""Objectives that train the attacker.

GFlowNet objectives make the policy sample prompts in proportion to a reward R; the baselines
REINFORCE and PPO maximise the reward.

Source: trajectory balance, Malkin et al. (arXiv 2201.13259), as Lee et al. (arXiv 2405.18540) use
it; VarGrad, Richter et al. (arXiv 2010.10436) and Zhang et al. (arXiv 2302.05446); contrastive
balance with pruning, Stable-GFN (arXiv 2605.00553); REINFORCE, Williams (1992); PPO, Schulman et
al. (arXiv 1707.06347).
Shapes: a batch has N prompts; `log_pi` (N,) is the log-probability of each under the policy, end
token included, and `log_reward` (N,) is log R of each.

Run it: python -m pytest tests/test_objectives.py
"""

import torch
from torch import Tensor


def trajectory_balance(log_pi: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """mean (log Z + log pi - log R)^2; `log_z`, a scalar or (N,), is learned at its own rate."""
    return (log_z + log_pi - log_reward).square().mean()


def vargrad(log_pi: Tensor, log_reward: Tensor) -> Tensor:
    """Variance of log pi - log R over the batch: trajectory balance at its best log Z."""
    return trajectory_balance(log_pi, log_reward, (log_reward - log_pi).mean().detach())


def contrastive_balance(log_pi: Tensor, log_reward: Tensor, noise: float = 0.0) -> Tensor:
    """Mean of (d_i - d_j)^2 / 2 over pairs i < j, d = log pi - log R; 0 where no pair is left.

    With `noise` above 0, only pairs count that have |log R_i - log R_j| > noise.
    Over all pairs of N prompts the result is N / (N - 1) times `vargrad`.
    """
    first, second = torch.triu_indices(len(log_pi), len(log_pi), offset=1, device=log_pi.device)
    counts = torch.ones_like(first, dtype=torch.bool)
    if noise > 0:
        counts = (log_reward[first] - log_reward[second]).abs() > noise
    difference = log_pi - log_reward
    squares = (difference[first] - difference[second]).square() / 2
    return (squares * counts).sum() / counts.sum().clamp(min=1)


def reinforce(log_pi: Tensor, log_reward: Tensor) -> Tensor:
    """-mean (log R - mean log R) log pi: minus the gradient of the expected log-reward."""
    return -((log_reward - log_reward.mean()).detach() * log_pi).mean()


def ppo(log_pi: Tensor, log_old: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """-mean min(r A, clamp(r, 1 - clip, 1 + clip) A), r = pi / pi_old, A = `advantage` (N,)."""
    ratio = (log_pi - log_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def log_reward(
    log_reference: Tensor, log_score: Tensor, *, gamma: float, beta: float, temperature: float = 1.0
) -> Tensor:
    """(log p_ref / gamma + log c / beta) / T, (N,): high for fluent prompts that succeed.

    `log_score` is the logarithm of the mean score of the answers. Lee et al. take the mean of the
    logarithms, where one safe answer outweighs any number of leaks.
    """
    return (log_reference / gamma + log_score / beta) / temperature


def schedule(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at step `steps`; `end` after that."""
    return end if step >= steps else start + (end - start) * step / steps
