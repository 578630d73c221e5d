"""Planted modes: of 20 triggers among 2,744 prompts GFlowNet and smoothing find at least 16, REINFORCE with the same budget hardly any."""

import math
import random

import pytest
import torch
from conftest import random_model

from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.red.gflownet import Settings, explore, smooth
from cfgsafe.red.policy import Rules, draw

VOCABULARY = 16
RULES = Rules(start=(1, 2), end=3, least=3, most=3, banned=(0,))
SUCCESS = {3: 1.0, 2: 0.3, 1: 0.05, 0: 0.01}  # by the places that agree with the nearest trigger


def planted(seed: int) -> set[tuple[int, ...]]:
    rng = random.Random(seed)
    triggers: set[tuple[int, ...]] = set()
    while len(triggers) < 20:
        triggers.add(tuple(rng.choice([word for word in range(VOCABULARY) if word not in (0, 3)]) for _ in range(3)))
    return triggers


def attacker(seed: int):
    model = random_model(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, eos_token_id=3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(0.5)  # a reference without strong habits
    torch.manual_seed(seed)
    attach(model, LoRAConfig(rank=16))
    return model


def modes(objective: str, seed: int, steps: int = 350) -> int:
    """Triggers among 512 prompts of the trained attacker."""
    triggers = planted(seed)

    def score(prompts):
        values = [SUCCESS[max(sum(a == b for a, b in zip(prompt, t, strict=True)) for t in triggers)] for prompt in prompts]
        return [(value, math.log(value)) for value in values]

    model = attacker(seed)
    settings = Settings(objective=objective, steps=steps, lr=1e-2, beta=0.3, hottest=3.0, tolerance=0.1, seed=seed)
    found = explore(model, RULES, score, settings, objective)
    assert len({item.tokens for item in found}) == len(found)
    if objective != "reinforce":
        model = attacker(seed)
        smooth(model, RULES, [item for item in found if item.score > 0.7], steps=300, batch=32, lr=1e-2, seed=seed)
    return len(triggers & set(draw(model, RULES, torch.ones(512), torch.Generator().manual_seed(99))))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_gflownet_and_smoothing_find_the_modes(seed):
    assert modes("tb", seed) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_reinforce_loses_them(seed):
    assert modes("reinforce", seed) < 10


def test_the_same_seed_finds_the_same_prompts():
    runs = []
    for _ in range(2):
        settings = Settings(objective="vargrad", steps=5, lr=1e-2, tolerance=0.1, seed=3)
        runs.append(explore(attacker(0), RULES, lambda prompts: [(0.5, math.log(0.5))] * len(prompts), settings, "test"))
    assert runs[0] == runs[1]
