"""Of 20 triggers among 2,744 prompts GFlowNet and smoothing find at least 16, REINFORCE hardly any.

And for every run: a resumed one has the same result; unscored attacks train nothing; texts are asked once.
"""

import json
import operator
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from cfgsafe.blue import resume
from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.lora import DEFAULT, LoRAConfig, adapter_parameters, attach
from cfgsafe.red import gflownet
from cfgsafe.red.buffer import ReplayBuffer
from cfgsafe.red.gflownet import Settings, draw_batch, explore, log_rewards, novelty
from cfgsafe.red.policy import Attacker, Rules
from cfgsafe.red.records import Attack, Trial, read_attacks
from cfgsafe.red.training import Group, Trainer, Training, fit
from cfgsafe.remote import Meter

VOCABULARY = 16
RULES = Rules(start=(1, 2), end=3, least=3, most=3, banned=(0,))
SUCCESS = {3: 1.0, 2: 0.3, 1: 0.05, 0: 0.01}  # by the places that agree with the nearest trigger


def decode(prompt):
    return " ".join(map(str, prompt))


def trials(*scores):
    return tuple(Trial("c", "a", score) for score in scores)


def planted(seed: int) -> set[tuple[int, ...]]:
    rng = random.Random(seed)
    words = [word for word in range(VOCABULARY) if word not in (0, 3)]
    triggers: set[tuple[int, ...]] = set()
    while len(triggers) < 20:
        triggers.add(tuple(rng.choice(words) for _ in range(3)))
    return triggers


def attacker(seed: int = 0) -> Attacker:
    model = random_model(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, eos_token_id=3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(0.5)  # a reference without strong preferences
    torch.manual_seed(seed)
    attach(model, LoRAConfig(rank=16))
    return Attacker(model, RULES, decode, DEFAULT, None)


def nearest(triggers):
    """A function that scores prompts by the number of places that agree with the nearest trigger."""

    def score(texts):
        answers = []
        for text in texts:
            prompt = tuple(map(int, text.split()))
            agreeing = max(sum(map(operator.eq, prompt, trigger)) for trigger in triggers)
            answers.append(trials(SUCCESS[agreeing]))
        return answers

    return score


def modes(objective: str, seed: int, out, steps: int = 350, **changes) -> int:
    """Triggers among 512 prompts of the trained attacker."""
    triggers, agent = planted(seed), attacker(seed)
    settings = Settings(objective=objective, steps=steps, lr=1e-2, seed=seed, **changes)
    settings.beta, settings.max_temperature, settings.tolerance = 0.3, 3.0, 0.1
    found = explore(agent, nearest(triggers), Meter(), settings, out)
    assert len({attack.tokens for attack in found}) == len(found)
    if objective not in ("reinforce", "ppo"):
        agent = attacker(seed)
        good = [attack.tokens for attack in found if attack.score > 0.7]
        fit(agent, good, Training(steps=300, lr=1e-2, seed=seed), out / "smooth", "mle")
    return len(triggers & set(agent.draw(torch.ones(512), torch.Generator().manual_seed(99))))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "smooth").mkdir()
    return tmp_path


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_gflownet_and_smoothing_find_the_modes(seed, out):
    assert modes("tb", seed, out) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["vargrad", "ctb"])
def test_the_objectives_without_log_z_find_them_too(objective, out):
    assert modes(objective, 0, out) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_reinforce_loses_them(seed, out):
    assert modes("reinforce", seed, out) < 10


def test_half_of_the_drawn_prompts_explore_at_other_temperatures():
    """Half of the batch is replayed where there is something to replay; ppo does neither."""
    agent = SimpleNamespace(draw=lambda temperatures, random: temperatures.tolist())
    settings = Settings(batch_size=16, min_temperature=3.0, max_temperature=4.0)
    buffer, random = ReplayBuffer(), torch.Generator().manual_seed(0)
    drawn, replayed = draw_batch(agent, buffer, settings, random)
    assert len(set(drawn[:8])) == 8 and 3 <= min(drawn[:8]) and max(drawn[:8]) <= 4
    assert drawn[8:] == [1.0] * 8 and replayed == []
    buffer.add(Attack((5,), "5", -1.0, trials(1.0)))
    drawn, replayed = draw_batch(agent, buffer, settings, random)
    assert min(drawn[:4]) >= 3 and drawn[4:] == [1.0] * 4 and replayed == buffer.items * 8
    assert draw_batch(agent, buffer, replace(settings, objective="ppo"), random) == ([1.0] * 16, [])


def test_the_reward_cools_down_over_the_first_fifth_of_the_steps(tmp_path, monkeypatch):
    heard = []

    def listen(attacks, settings, temperature):
        heard.append(temperature)
        return log_rewards(attacks, settings, temperature)

    monkeypatch.setattr(gflownet, "log_rewards", listen)
    settings = Settings(steps=20, batch_size=4, reward_temperature=3.0)
    explore(attacker(), nearest(planted(0)), Meter(), settings, tmp_path)
    assert heard == [3.0, 2.5, 2.0, 1.5] + [1.0] * 16


def test_ppo_adds_a_bonus_for_novelty_to_the_reward(tmp_path, monkeypatch):
    heard, real = [], gflownet.objective_loss

    def listen(settings, log_pi, rewards, *more):
        heard.append(rewards)
        return real(settings, log_pi, rewards, *more)

    monkeypatch.setattr(gflownet, "objective_loss", listen)
    monkeypatch.setattr(gflownet, "novelty", lambda attack, buffer: 0.5)
    for bonus in (0.0, 3.0):
        settings = Settings(objective="ppo", steps=1, batch_size=4, novelty=bonus, updates=1)
        explore(attacker(), nearest(planted(0)), Meter(), settings, tmp_path)
    without, with_bonus = heard
    assert torch.allclose(with_bonus - without, torch.tensor(1.5, dtype=without.dtype))


def test_gradients_are_clipped_together_but_not_that_of_log_z(tmp_path):
    weight, log_z = torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)
    groups = [Group({"weight": weight}, 0.1), Group({"log_z": log_z}, 0.1, clipped=False)]
    with Trainer(tmp_path, groups, Training(steps=1), data="d", title="t") as trainer:
        trainer.update(0, 30 * weight.sum() + 50 * log_z)
    assert weight.grad.norm().item() == pytest.approx(1, abs=1e-4) and log_z.grad.item() == 50


def test_log_z_starts_at_its_best_value_for_the_first_batch(tmp_path, monkeypatch):
    starts, real = [], gflownet.objective_loss

    def listen(settings, log_pi, rewards, log_z, log_old):
        starts.append((log_z.item(), (rewards - log_old).mean().item()))
        return real(settings, log_pi, rewards, log_z, log_old)

    monkeypatch.setattr(gflownet, "objective_loss", listen)
    explore(attacker(), nearest(planted(0)), Meter(), Settings(steps=2, batch_size=8), tmp_path)
    (first, best), (second, _) = starts
    assert first == pytest.approx(best) and first != 0
    assert second == pytest.approx(first, abs=0.11)  # a step of AdamW at --lr-log-z 0.1


def weights(agent: Attacker) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in adapter_parameters(agent.model).values()]


class Killed(Exception):
    pass


@pytest.mark.parametrize("objective", ["tb", "vargrad", "ctb", "reinforce", "ppo"])
def test_a_killed_run_goes_on_to_the_same_result(objective, tmp_path):
    """Killed between two saved states: weights, attacks, metrics and buffer are those of a whole run."""
    settings = Settings(
        objective=objective, steps=9, batch_size=8, lr=1e-2, tolerance=0.1, seed=3, save_every=4
    )
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    whole, killed = attacker(), attacker()
    score, calls = nearest(planted(0)), []
    everything = explore(whole, score, Meter(), settings, folders[0])

    def dies(texts):
        calls.append(texts)
        if len(calls) == 7:
            raise Killed
        return score(texts)

    with pytest.raises(Killed):
        explore(killed, dies, Meter(), settings, folders[1])
    assert resume.states(folders[1])
    again = attacker(seed=1)  # other weights, which the state replaces
    assert explore(again, score, Meter(), replace(settings, resume=True), folders[1]) == everything
    assert all(map(torch.equal, weights(whole), weights(again)))
    for name in ("attacks.jsonl", "metrics.jsonl"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text()
    assert resume.states(folders[1])  # until the caller has written the adapter


def test_smoothing_resumes_and_refuses_other_prompts(tmp_path):
    training = Training(steps=6, batch_size=4, lr=1e-2, save_every=2)
    prompts = [(4, 5, 6), (7, 8, 9)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, killed = attacker(), attacker()
    fit(whole, prompts, training, tmp_path / "a", "mle")
    original = killed.model.forward
    steps = iter(range(5))

    def dies(*args, **kwargs):
        if next(steps, None) is None:
            raise Killed
        return original(*args, **kwargs)

    killed.model.forward = dies
    with pytest.raises(Killed):
        fit(killed, prompts, training, tmp_path / "b", "mle")
    with pytest.raises(InputError, match="the data differ"):
        fit(attacker(), prompts[:1], replace(training, resume=True), tmp_path / "b", "mle")
    again = attacker(seed=1)
    fit(again, prompts, replace(training, resume=True), tmp_path / "b", "mle")
    assert all(map(torch.equal, weights(whole), weights(again)))


def test_smoothing_makes_its_prompts_likely(tmp_path):
    agent, prompts = attacker(), [(4, 5, 6), *[(7, 8, 9)] * 9]
    before = agent.log_policy(prompts[:2]).detach()
    fit(agent, prompts, Training(steps=80, batch_size=8, lr=1e-2), tmp_path, "mle")
    after = agent.log_policy(prompts[:2]).detach()
    assert (after > before + 3).all() and (after[0] - after[1]).abs() < 1  # given nine times, it does not win


def is_odd(text: str) -> bool:
    return sum(map(int, text.split())) % 2 == 1


def test_what_cannot_be_scored_trains_nothing_and_is_tried_again(tmp_path):
    """Half of the texts never get a score; the others keep theirs, and are asked for once."""
    asked: list[str] = []

    def score(texts):
        asked.extend(texts)
        return [trials(None, None) if is_odd(text) else trials(0.4, None, 0.6) for text in texts]

    settings = Settings(objective="vargrad", steps=6, batch_size=8, tolerance=0.1)
    found = explore(attacker(), score, Meter(), settings, tmp_path)
    assert found and all(attack.score == 0.5 for attack in found)
    scored = [text for text in asked if not is_odd(text)]
    assert len(scored) == len(set(scored)) == len(found)
    lines = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert lines[-1]["unscorable"] == len(asked) - len(scored) > 0
    assert len(read_attacks(tmp_path / "attacks.jsonl")) == len(asked)


def test_a_spent_budget_ends_the_run(tmp_path):
    meter = Meter(20)
    settings = Settings(steps=50, batch_size=8, tolerance=0.1)
    found = explore(attacker(), metered(meter), meter, settings, tmp_path)
    assert len(found) == meter.made == 20


def test_a_resumed_run_goes_on_with_the_budget_it_had(tmp_path):
    settings = Settings(steps=50, batch_size=8, tolerance=0.1, save_every=1)
    meter, score = Meter(20), metered(Meter(9))

    def dies(texts):
        for _ in texts:
            meter.take()
        if meter.made > 12:
            raise Killed
        return score(texts)

    with pytest.raises(Killed):
        explore(attacker(), dies, meter, settings, tmp_path)
    (state,) = resume.states(tmp_path)
    before = json.loads((state / "calls.json").read_text())["calls"]
    assert before > 0
    meter = Meter(20)
    explore(attacker(), metered(meter), meter, replace(settings, resume=True), tmp_path)
    assert meter.made == 20 and len(read_attacks(tmp_path / "attacks.jsonl")) <= 20 + 8


def metered(meter):
    """A function that scores texts until the meter is spent."""
    return lambda texts: [trials(0.5 if meter.take() else None) for _ in texts]


def test_gibberish_gets_the_reward_of_a_failure(tmp_path):
    settings = Settings(steps=2, batch_size=16, tolerance=0.1)
    found = explore(attacker(), lambda texts: [trials(1.0)] * len(texts), Meter(), settings, tmp_path)
    bound = sorted(attack.least_likely for attack in found)[len(found) // 2]
    free = log_rewards(found, Settings(), 1.0)
    bounded = log_rewards(found, Settings(min_fluency=bound), 1.0)
    for attack, before, after in zip(found, free, bounded, strict=True):
        assert (after < before - 40) if attack.least_likely < bound else after == before


def test_novelty_by_hand():
    buffer = ReplayBuffer(10, 0.0)
    one = Attack((4, 5, 6), "4 5 6", -1.0, trials(0.5))
    other = Attack((4, 5, 7), "4 5 7", -1.0, trials(0.5))
    assert novelty(one, buffer) == 1
    buffer.add(one)
    assert novelty(one, buffer) == 0 and novelty(other, buffer) == pytest.approx(1 / 3)


def test_attacks_that_were_changed_by_hand_are_not_gone_on_from(tmp_path):
    settings = Settings(steps=8, batch_size=8, tolerance=0.1, save_every=2)
    calls, score = [], nearest(planted(0))

    def dies(texts):
        calls.append(texts)
        if len(calls) == 4:
            raise Killed
        return score(texts)

    with pytest.raises(Killed):
        explore(attacker(), dies, Meter(), settings, tmp_path)
    path = tmp_path / "attacks.jsonl"
    whole = path.read_text()
    message = "attacks.jsonl: its attacks up to step 2 are not those of the run"
    for changed in (whole.replace('"text": "', '"text": "1', 1), whole.partition("\n")[2], None):
        path.unlink()
        if changed is not None:
            path.write_text(changed)
        with pytest.raises(InputError, match=message):
            explore(attacker(), score, Meter(), replace(settings, resume=True), tmp_path)
        path.write_text(whole)
    explore(attacker(), score, Meter(), replace(settings, resume=True), tmp_path)


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
def test_training_stops_where_a_number_is_not_finite(what, tmp_path, monkeypatch):
    """Before the step that would spoil the weights, and before a state is written."""
    agent, steps, before, real = attacker(), iter(range(9)), [], Attacker.log_policy

    def spoilt(self, prompts):
        found = real(self, prompts)
        if next(steps) < 2:
            return found
        before.extend(weights(agent))
        return found * torch.nan if what == "loss" else found + (found - found.detach()) * 3e38

    monkeypatch.setattr(Attacker, "log_policy", spoilt)
    message = f"step 3: the {what} is (nan|inf); start anew with a lower --lr"
    with pytest.raises(InputError, match=message):
        fit(agent, [(4, 5, 6)], Training(steps=6, batch_size=4, lr=1e-2, save_every=5), tmp_path, "mle")
    assert not resume.states(tmp_path) and all(map(torch.equal, before, weights(agent)))
