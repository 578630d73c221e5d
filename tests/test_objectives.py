"""The objectives on a target that can be enumerated: the 340 sequences of up to 4 out of 4 words.

Their distribution must become R / Z. It is computed exactly, prefix by prefix, not sampled. Three planted
mutants must miss the target.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cfgsafe.red.objectives import (
    contrastive_balance,
    log_reward,
    ppo,
    reinforce,
    schedule,
    trajectory_balance,
    vargrad,
)

WORDS, LONGEST, END = 4, 4, 4
SEQUENCES: list[tuple[int, ...]] = []
for length in range(1, LONGEST + 1):
    SEQUENCES += itertools.product(range(WORDS), repeat=length)
PREFIXES = {(): 0}  # prefix -> its number
for sequence in SEQUENCES:
    if len(sequence) < LONGEST:
        PREFIXES[sequence] = len(PREFIXES)


class Policy:
    """A row of logits for each prefix: the next word, or the end after at least one.

    The longest sequences end by themselves.
    """

    def __init__(self):
        self.logits = torch.zeros(len(PREFIXES), WORDS + 1, requires_grad=True)
        self.blocked = torch.zeros(len(PREFIXES), WORDS + 1)
        self.blocked[0, END] = -torch.inf
        self.places = torch.zeros(len(SEQUENCES), LONGEST + 1, dtype=torch.long)
        self.taken = torch.zeros(len(SEQUENCES), LONGEST + 1)
        for number, s in enumerate(SEQUENCES):
            for n, action in enumerate((*s, END)[:LONGEST]):
                self.places[number, n] = PREFIXES[s[:n]] * (WORDS + 1) + action
                self.taken[number, n] = 1

    def log_pi(self) -> Tensor:
        """log pi of every sequence."""
        logs = (self.logits + self.blocked).log_softmax(-1).flatten()
        return torch.where(self.taken > 0, logs[self.places], 0.0).sum(1)


def target(beta: float = 0.5) -> Tensor:
    """A rugged log-reward, of a random reference log-probability and a random score."""
    torch.manual_seed(0)
    reference = -torch.tensor([1.4 * len(s) for s in SEQUENCES]) - torch.rand(len(SEQUENCES))
    score = (torch.rand(len(SEQUENCES)) ** 3).clamp(min=0.05).log()
    return log_reward(reference, score, gamma=1.0, beta=beta)


def train(objective: str, *, rewards: Tensor, steps: int = 3000, mutant: str = "") -> tuple[float, float]:
    """Train a policy; returns its total variation to R / Z, and the error of log Z."""
    torch.manual_seed(1)
    policy, log_z = Policy(), torch.zeros((), requires_grad=True)
    groups = [
        {"params": [policy.logits], "lr": 0.05},
        {"params": [log_z], "lr": 0.0 if mutant == "frozen Z" else 0.1},
    ]
    optimiser = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, 1.0, 0.0, steps))
    for _ in range(steps):
        logs = policy.log_pi()
        drawn = torch.multinomial(logs.detach().exp() * 0.9 + 0.1 / len(SEQUENCES), 64, replacement=True)
        log_pi, reward = logs[drawn], rewards[drawn]
        if mutant == "wrong beta":
            reward = target(beta=0.4)[drawn]
        if mutant == "detached":
            log_pi = log_pi.detach() + 0 * log_pi
        match objective:
            case "tb":
                loss = trajectory_balance(log_pi, reward, log_z)
            case "vargrad":
                loss = vargrad(log_pi, reward)
            case "ctb":
                loss = contrastive_balance(log_pi, reward)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    learned = policy.log_pi().detach()
    assert math.isclose(learned.exp().sum().item(), 1, rel_tol=1e-4)
    z = rewards.logsumexp(0)
    estimate = log_z.detach() if objective == "tb" else (rewards - learned).mean()
    return 0.5 * (learned.exp() - (rewards - z).exp()).abs().sum().item(), abs(estimate - z).item()


@pytest.mark.parametrize("objective", ["tb", "vargrad", "ctb"])
def test_the_policy_becomes_the_target(objective):
    variation, error = train(objective, rewards=target())
    assert variation < 0.01 and error < 0.05


@pytest.mark.parametrize("mutant", ["wrong beta", "detached", "frozen Z"])
def test_planted_mutants_miss_it(mutant):
    variation, error = train("tb", rewards=target(), mutant=mutant, steps=1500)
    assert variation > 0.01 or error > 0.05
    assert variation > 0.03 or mutant == "frozen Z"


def test_uniform_sequences_are_far_from_it():
    wanted = target().softmax(0)
    assert 0.5 * (wanted - 1 / len(SEQUENCES)).abs().sum() > 0.3


def test_vargrad_is_trajectory_balance_at_the_best_log_z():
    torch.manual_seed(0)
    log_pi, rewards = torch.randn(7, requires_grad=True), torch.randn(7)
    best = (rewards - log_pi).mean().detach()
    assert torch.isclose(vargrad(log_pi, rewards), trajectory_balance(log_pi, rewards, best))
    for shift in (-0.1, 0.1):
        assert trajectory_balance(log_pi, rewards, best + shift) > vargrad(log_pi, rewards)
    assert torch.isclose(contrastive_balance(log_pi, rewards), vargrad(log_pi, rewards) * 7 / 6)
    # The gradient of the mean itself cancels.
    (through,) = torch.autograd.grad((log_pi - rewards).var(unbiased=False), log_pi)
    (ours,) = torch.autograd.grad(vargrad(log_pi, rewards), log_pi)
    assert torch.allclose(ours, through, atol=1e-6)


def test_pairs_within_the_noise_are_pruned():
    log_pi, rewards = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.0, 0.05, 3.0])
    kept = [((0 - 0) - (5.0 - 3.0)) ** 2 / 2, ((1.0 - 0.05) - (5.0 - 3.0)) ** 2 / 2]
    assert math.isclose(contrastive_balance(log_pi, rewards, noise=0.1).item(), sum(kept) / 2, rel_tol=1e-6)
    assert contrastive_balance(log_pi[:2], rewards[:2], noise=0.1) == 0


def test_reinforce_and_ppo_by_hand():
    log_pi = torch.tensor([-1.0, -2.0], requires_grad=True)
    (slopes,) = torch.autograd.grad(reinforce(log_pi, torch.tensor([3.0, 1.0])), log_pi)
    assert torch.allclose(slopes, torch.tensor([-0.5, 0.5]))
    ratios, advantage = torch.tensor([1.5, 0.5]), torch.tensor([1.0, -1.0])
    assert torch.isclose(ppo(ratios.log(), torch.zeros(2), advantage), -torch.tensor((1.2 - 0.8) / 2))


def test_schedules_and_rewards_in_closed_form():
    assert [schedule(step, 2.0, 1.0, 4) for step in (0, 1, 2, 4, 9)] == [2.0, 1.75, 1.5, 1.0, 1.0]
    value = log_reward(torch.tensor([-6.0]), torch.tensor([-0.2]), gamma=1.2, beta=0.1, temperature=2.0)
    assert math.isclose(value.item(), (-5.0 - 2.0) / 2, rel_tol=1e-6)
