"""What trains the attacker: GFlowNet objectives, which sample prompts in proportion to a reward, and the baselines that maximise it.

Source: trajectory balance, Malkin et al. (arXiv 2201.13259), as Lee et al. (arXiv 2405.18540) use it; VarGrad, Richter et al. (arXiv
2010.10436) and Zhang et al. (arXiv 2302.05446); contrastive balance with pruning, Stable-GFN (arXiv 2605.00553); REINFORCE, Williams
(1992); PPO, Schulman et al. (arXiv 1707.06347).
All read a batch of N sequences: `log_pi` (N,), the log-probability of each under the policy, its end token included, and `log_reward` (N,).

Run it: python -m pytest tests/test_gflownet.py
"""

import torch
from torch import Tensor


def trajectory_balance(log_pi: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """mean (log Z + log pi - log R)^2; `log_z`, a scalar or (N,), is learned, at a larger rate than the policy."""
    return (log_z + log_pi - log_reward).square().mean()


def vargrad(log_pi: Tensor, log_reward: Tensor) -> Tensor:
    """The variance of log pi - log R over the batch: trajectory balance at the log Z that is best for it."""
    return trajectory_balance(log_pi, log_reward, (log_reward - log_pi).mean().detach())


def contrastive_balance(log_pi: Tensor, log_reward: Tensor, noise: float = 0.0) -> Tensor:
    """Half the mean of (d_i - d_j)^2, d = log pi - log R, over the pairs whose rewards differ by more than `noise`.

    Over all pairs of N sequences it is N / (N - 1) times `vargrad`. 0 where no pair is left.
    """
    first, second = torch.triu_indices(len(log_pi), len(log_pi), offset=1, device=log_pi.device)
    told_apart = (
        (log_reward[first] - log_reward[second]).abs() > noise
        if noise > 0
        else torch.ones_like(first, dtype=torch.bool)
    )
    difference = log_pi - log_reward
    squares = (difference[first] - difference[second]).square() / 2
    return (squares * told_apart).sum() / told_apart.sum().clamp(min=1)


def reinforce(log_pi: Tensor, log_reward: Tensor) -> Tensor:
    """-mean (log R - its mean) log pi: its gradient is that of the expected log-reward."""
    return -((log_reward - log_reward.mean()).detach() * log_pi).mean()


def ppo(log_pi: Tensor, log_old: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """The clipped surrogate: -mean min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = pi / pi_old."""
    ratio = (log_pi - log_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def log_reward(
    log_reference: Tensor, log_score: Tensor, *, gamma: float, beta: float, temperature: float = 1.0
) -> Tensor:
    """(log p_ref / gamma + log c / beta) / T, (N,): fluent prompts that succeed; Lee et al.

    `log_score` is the logarithm of the mean score of the answers, where Lee et al. take the mean of the logarithms: one safe answer
    would then outweigh any number of leaks. It has a floor, so that it cannot be -inf.
    """
    return (log_reference / gamma + log_score / beta) / temperature


def schedule(step: int, start: float, end: float, steps: int) -> float:
    """Linear from `start` at step 0 to `end` at step `steps`, and `end` from there on."""
    return end if step >= steps else start + (end - start) * step / steps
