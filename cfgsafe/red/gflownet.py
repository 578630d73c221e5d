"""Training the attacker: GFlowNet fine-tuning with replay, its reward-maximising baseline, and maximum-likelihood smoothing.

Source: Lee et al. (arXiv 2405.18540). Half of each batch is replayed, half drawn; of the drawn half, half at temperature 1 and half at one
from U[`coldest`, `hottest`]. Rewards are tempered from `heat` to 1. Smoothing fits the collected prompts that succeeded, each once.
Deviations: the schedules count optimiser steps and end where they say; success is the arithmetic mean of the score in training as in
evaluation; the reference log-probability obeys the policy's rules.

Run it: python -m pytest tests/test_attacker.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT, choose
from cfgsafe.red.buffer import Found, ReplayBuffer
from cfgsafe.red.objectives import contrastive_balance, log_reward, reinforce, schedule, trajectory_balance, vargrad
from cfgsafe.red.policy import Rules, draw, log_probability


@dataclass
class Settings:
    """How the attacker is trained."""

    objective: str = "tb"
    """tb, vargrad or ctb sample in proportion to the reward; reinforce maximises it."""
    steps: int = 500
    """Optimiser steps."""
    batch: int = 32
    """Prompts a step, drawn and replayed."""
    lr: float = 1e-4
    """Of the adapter; it falls linearly to 0."""
    lr_log_z: float = 0.1
    """Of log Z (tb)."""
    beta: float = 0.1
    """Weight of the score in the reward: log R = log p_ref / gamma + log c / beta."""
    gamma: float = 1.0
    """Weight of fluency in the reward."""
    heat: float = 2.0
    """The reward's temperature at the beginning; it falls to 1 over the first fifth of the steps."""
    coldest: float = 0.5
    """Lowest temperature of exploring draws."""
    hottest: float = 2.0
    """Highest temperature of exploring draws."""
    noise: float = 0.0
    """ctb leaves out pairs whose rewards differ by no more."""
    capacity: int = 1000
    """Prompts in the replay buffer."""
    tolerance: float = 0.25
    """Prompts whose edit distance is below this share of their summed length are alike, and only the better is kept."""
    seed: int = 0
    """Of draws and replay."""


Scorer = Callable[[list[tuple[int, ...]]], list[tuple[float, float]]]  # prompts -> (success in [0, 1], its log with a floor) of each


def explore(model: Llama, rules: Rules, score: Scorer, settings: Settings, what: str) -> list[Found]:
    """Train the adapter on `model` against `score`; returns every prompt that was drawn, in order, each once, with its scores."""
    random = torch.Generator().manual_seed(settings.seed)
    buffer = ReplayBuffer(settings.capacity, settings.tolerance, settings.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    log_z = torch.zeros((), device=model.device, requires_grad=True)
    optimiser = torch.optim.AdamW(
        [{"params": parameters, "lr": settings.lr}, {"params": [log_z], "lr": settings.lr_log_z}], weight_decay=0.0
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    known: dict[tuple[int, ...], Found] = {}
    for step in tqdm(range(settings.steps), desc=what, leave=False):
        replayed = [] if settings.objective == "reinforce" or not len(buffer) else buffer.sample(settings.batch // 2)
        count = settings.batch - len(replayed)
        temperatures = torch.ones(count)
        if settings.objective != "reinforce":
            span = settings.hottest - settings.coldest
            temperatures[: count // 2] = settings.coldest + span * torch.rand(count // 2, generator=random)
        prompts = draw(model, rules, temperatures, random)
        evaluate(model, rules, score, [prompt for prompt in dict.fromkeys(prompts) if prompt not in known], known)
        for prompt in prompts:
            buffer.add(known[prompt])
        batch = [known[prompt] for prompt in prompts] + replayed
        heat = schedule(step, settings.heat, 1.0, max(1, settings.steps // 5))
        rewards = log_reward(
            torch.tensor([item.log_reference for item in batch]),
            torch.tensor([item.log_score for item in batch]),
            gamma=settings.gamma,
            beta=settings.beta,
            temperature=heat,
        ).to(model.device)
        log_pi = log_probability(model, rules, [item.tokens for item in batch])
        loss = objective_loss(settings, log_pi, rewards, log_z)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = schedule(step, rate, 0.0, settings.steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    return list(known.values())


def objective_loss(settings: Settings, log_pi: Tensor, rewards: Tensor, log_z: Tensor) -> Tensor:
    """The batch's loss under the chosen objective."""
    match settings.objective:
        case "tb":
            return trajectory_balance(log_pi, rewards, log_z)
        case "vargrad":
            return vargrad(log_pi, rewards)
        case "ctb":
            return contrastive_balance(log_pi, rewards, settings.noise)
        case "reinforce":
            return reinforce(log_pi, rewards)
    raise ValueError(f"no objective {settings.objective!r}")


def evaluate(model: Llama, rules: Rules, score: Scorer, prompts: list[tuple[int, ...]], known: dict[tuple[int, ...], Found]) -> None:
    """Put what is known of new `prompts` into `known`: their scores, and their likelihood under the model without its adapter."""
    if not prompts:
        return
    choose(model, [None])
    with torch.no_grad():
        reference = log_probability(model, rules, prompts).tolist()
    choose(model, [DEFAULT])
    for prompt, (success, log_score), log_reference in zip(prompts, score(prompts), reference, strict=True):
        known[prompt] = Found(prompt, "", success, log_score, log_reference)


def smooth(model: Llama, rules: Rules, found: list[Found], *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Fit the fresh adapter on `model` to the prompts `found`, each as often as the others, by maximum likelihood."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    random = torch.Generator().manual_seed(seed)
    prompts = list(dict.fromkeys(item.tokens for item in found))
    for step in range(steps):
        picked = torch.randint(len(prompts), (batch,), generator=random).tolist()
        for group in optimiser.param_groups:
            group["lr"] = schedule(step, lr, 0.0, steps)
        optimiser.zero_grad()
        (-log_probability(model, rules, [prompts[number] for number in picked]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
