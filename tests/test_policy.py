"""The attacker's policy: draws obey the rules, with the log-probabilities that are computed for them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import random_model

from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.red.policy import Attacker, Rules, draw, log_probability, token_log_probabilities

RULES = Rules(start=(1, 2), end=3, least=2, most=5, banned=(0, 4))


@pytest.fixture(scope="module")
def tiny():
    return random_model(vocab_size=8, hidden_size=16, num_hidden_layers=1, eos_token_id=3)


def all_prompts(rules: Rules, vocabulary: int):
    words = [word for word in range(vocabulary) if word != rules.end and word not in rules.banned]
    prompts = []
    for length in range(rules.least, rules.most + 1):
        prompts += itertools.product(words, repeat=length)
    return prompts


def test_the_probabilities_of_all_prompts_sum_to_one(tiny):
    """3,900 prompts of 2 to 5 words. A forced end that counted, or an early end, would break the sum."""
    prompts = all_prompts(RULES, 8)
    with torch.no_grad():
        total = log_probability(tiny, RULES, prompts).double().exp().sum().item()
    assert math.isclose(total, 1, rel_tol=1e-4)


def test_prompts_are_drawn_as_often_as_they_are_likely(tiny):
    prompts = all_prompts(RULES, 8)
    drawn = draw(tiny, RULES, torch.ones(20_000), torch.Generator().manual_seed(0))
    assert all(2 <= len(prompt) <= 5 and not set(prompt) & {0, 3, 4} for prompt in drawn)
    with torch.no_grad():
        wanted = log_probability(tiny, RULES, prompts).exp()
    place = {prompt: number for number, prompt in enumerate(prompts)}
    counts = torch.bincount(torch.tensor([place[prompt] for prompt in drawn]), minlength=len(prompts))
    top = wanted.topk(40).indices
    assert ((counts[top] / 20_000 - wanted[top]).abs() < 5 * (wanted[top] / 20_000).sqrt()).all()


def test_replayed_log_probabilities_are_those_of_the_draw(tiny):
    """Alone, padded, and cut at the most tokens: the same within 1e-5, and as a sum token by token."""
    drawn = draw(tiny, RULES, torch.full((40,), 1.5), torch.Generator().manual_seed(1))
    assert {len(prompt) for prompt in drawn} >= {2, 5}
    with torch.no_grad():
        together = log_probability(tiny, RULES, drawn)
        for number, prompt in enumerate(drawn):
            assert abs(log_probability(tiny, RULES, [prompt])[0] - together[number]) < 1e-5
            total, ids = 0.0, list(RULES.start)
            for place, token in enumerate([*prompt, RULES.end][: RULES.most]):
                logits = tiny.head(tiny(torch.tensor([ids])))[0, -1]
                logits[[0, 4]] = -torch.inf
                if place < RULES.least:
                    logits[RULES.end] = -torch.inf
                total += logits.log_softmax(-1)[token].item()
                ids.append(token)
            assert abs(total - together[number]) < 1e-5


def test_all_tokens_of_a_prompt_longer_than_the_rules_allow_are_counted(tiny):
    """Attacks of a run with a larger --most are scored by adapt before it leaves them out."""
    longer = (5, 6, 7, 5, 6, 7, 5)
    with torch.no_grad():
        found = log_probability(tiny, RULES, [longer, (5, 6)])[0]
        expected = log_probability(tiny, replace(RULES, most=7), [longer])[0]
    assert abs(found - expected) < 1e-5


def test_fluency_is_that_of_the_reference():
    """The policy's adapter does not change it; the least likely fifth of eight tokens are two."""
    rules, prompt = replace(RULES, most=8), (5, 6, 7, 5, 6, 7, 5)
    model = random_model(vocab_size=8, hidden_size=16, num_hidden_layers=1, eos_token_id=3)
    log_probs = token_log_probabilities(model, rules, [prompt])[0][0]
    for parameter in attach(model, LoRAConfig(4), "policy"):
        torch.nn.init.normal_(parameter, std=0.5)
    (found,) = Attacker(model, rules, str, "policy", None).fluency([prompt])
    assert found.log_reference == pytest.approx(log_probs.sum().item(), abs=1e-4)
    assert found.least_likely == pytest.approx(log_probs.sort().values[:2].mean().item(), abs=1e-4)


def test_a_cold_draw_is_greedy_and_the_generator_decides(tiny):
    cold = draw(tiny, RULES, torch.full((5,), 1e-3), torch.Generator().manual_seed(2))
    assert len(set(cold)) == 1
    warm = [draw(tiny, RULES, torch.ones(8), torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert warm[0] == warm[1] != warm[2]


def test_the_log_probability_trains_an_adapter(tiny):
    model = random_model(vocab_size=8, hidden_size=16, num_hidden_layers=1, eos_token_id=3)
    optimiser = torch.optim.Adam(attach(model, LoRAConfig(rank=4)), lr=0.02)
    wanted = [(5, 6, 7)]
    before = log_probability(model, RULES, wanted).item()
    for _ in range(30):
        optimiser.zero_grad()
        (-log_probability(model, RULES, wanted).sum()).backward()
        optimiser.step()
    assert log_probability(model, RULES, wanted).item() > before + 1
