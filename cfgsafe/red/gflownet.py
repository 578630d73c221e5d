"""Training the attacker: GFlowNet fine-tuning with replay, its reward-maximising baselines, and maximum likelihood.

Source: Lee et al. (arXiv 2405.18540). Half of each batch is replayed, half drawn; of the drawn half, half at temperature 1 and half at one
from U[`coldest`, `hottest`]. Rewards are tempered from `heat` to 1. Smoothing fits the collected prompts that succeeded, each once.
PPO with a bonus for novelty: Hong et al. (arXiv 2402.19464). Pruning of pairs and the fluency floor: Stable-GFN (arXiv 2605.00553).
Deviations: the beginning of prompts is fixed, so that log Z is one number, which starts at the first batch's best; the schedules count
optimiser steps and end where they say; success is the arithmetic mean of the answers' scores in training as in evaluation; the reference
log-probability obeys the policy's rules; an attack that could not be scored trains nothing and is tried again when drawn again.
Novelty is the relative edit distance to the nearest prompt of the buffer.

Run it: python train.py attacker --stage gfn --help
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cfgsafe.blue import resume
from cfgsafe.files import read_json, read_jsonl, write_text
from cfgsafe.lora import adapter_parameters
from cfgsafe.red.buffer import Likeness, ReplayBuffer, edit_distances
from cfgsafe.red.objectives import (
    contrastive_balance,
    log_reward,
    ppo,
    reinforce,
    schedule,
    trajectory_balance,
    vargrad,
)
from cfgsafe.red.policy import Attacker, Prompt
from cfgsafe.red.records import FLOOR, Attack, Trial
from cfgsafe.red.training import Group, Step, Training, optimise
from cfgsafe.remote import Meter

ON_POLICY = ("reinforce", "ppo")  # nothing is replayed
Scorer = Callable[[list[str]], list[tuple[Trial, ...]]]  # prompts -> the target's answers to each, scored


@dataclass
class Settings(Training):
    """How the attacker explores."""

    objective: Literal["tb", "vargrad", "ctb", "reinforce", "ppo"] = "tb"
    """tb, vargrad and ctb sample in proportion to the reward; reinforce and ppo maximise it, ppo with a bonus for novelty."""
    lr_log_z: float = 0.1
    """Learning rate of log Z (tb)."""
    beta: float = 0.1
    """Weight of success in the reward: log R = log p_ref / gamma + log c / beta."""
    gamma: float = 1.0
    """Weight of fluency in the reward."""
    heat: float = 2.0
    """The reward's temperature at the beginning; it falls to 1 over the first fifth of the steps."""
    coldest: float = 0.5
    """Lowest temperature of exploring draws."""
    hottest: float = 2.0
    """Highest temperature of exploring draws."""
    noise: float = 0.0
    """ctb leaves out pairs whose log-rewards differ by no more."""
    min_fluency: float | None = None
    """A prompt whose least likely fifth of tokens has a lower mean log-probability than this gets the reward of a failure."""
    novelty: float = 1.0
    """ppo's bonus for a prompt unlike all in the buffer, in units of the log-reward."""
    updates: int = 4
    """ppo's updates a step."""
    capacity: int = 1000
    """Prompts in the replay buffer."""
    tolerance: float = 0.25
    """Prompts whose distance is below it are alike, and only the better is kept."""
    likeness: Likeness = "edit"
    """Their distance: edits as a share of the summed length, or the cosine distance of the texts' embeddings."""


class Archive:
    """Every attack that was scored, in order: in memory, and a line each in attacks.jsonl."""

    def __init__(
        self, path: Path, attacker: Attacker, score: Scorer, meter: Meter, buffer: ReplayBuffer | None = None
    ):
        self.path, self.attacker, self.score, self.meter, self.buffer = path, attacker, score, meter, buffer
        self.known: dict[Prompt, Attack] = {}
        self.unscorable = 0

    def save(self, folder: Path) -> None:
        self.buffer.save(folder / "buffer.jsonl")
        write_text(folder / "calls.json", json.dumps({"calls": self.meter.made}) + "\n")

    def load(self, folder: Path | None, done: int) -> None:
        if folder:
            self.buffer = ReplayBuffer.load(folder / "buffer.jsonl")
            self.meter.made = read_json(folder / "calls.json")["calls"]
        resume.keep_steps(self.path, "step", done)
        rows = list(read_jsonl(self.path)) if self.path.exists() else []
        attacks = [Attack.from_json(row, place) for place, row in rows]
        self.known = {attack.tokens: attack for attack in attacks if attack.score is not None}
        self.unscorable = len(attacks) - len(self.known)

    def look_up(self, prompts: list[Prompt], step: int) -> list[Attack]:
        """The attacks with `prompts`; those without a known score are put to the target."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        texts = [self.attacker.spell(prompt) for prompt in new]
        answered = (
            dict(zip(dict.fromkeys(texts), self.score(list(dict.fromkeys(texts))), strict=True))
            if new
            else {}
        )
        unscored: dict[Prompt, Attack] = {}
        with open(self.path, "a", encoding="utf-8") as log:
            for prompt, text, fluency in zip(
                new, texts, self.attacker.log_reference(new) if new else (), strict=True
            ):
                attack = Attack(prompt, text, fluency[0], answered[text], fluency[1])
                log.write(json.dumps({"step": step, **attack.to_json()}) + "\n")
                (unscored if attack.score is None else self.known)[prompt] = attack
        self.unscorable += len(unscored)
        return [self.known.get(prompt) or unscored[prompt] for prompt in prompts]


def explore(attacker: Attacker, score: Scorer, meter: Meter, settings: Settings, out: Path) -> list[Attack]:
    """Train the policy's adapter against `score`, until its `meter` is spent; returns every attack that was scored, in order, each once.

    Writes attacks.jsonl and metrics.jsonl to `out`.
    """
    buffer = ReplayBuffer(settings.capacity, settings.tolerance, settings.seed, settings.likeness)
    archive = Archive(out / "attacks.jsonl", attacker, score, meter, buffer)
    log_z = torch.zeros((), device=attacker.model.device, requires_grad=True)
    balanced = settings.objective == "tb"
    groups = [Group(adapter_parameters(attacker.model, attacker.policy), settings.lr)]
    groups += [Group({"log_z": log_z}, settings.lr_log_z, clipped=False)] if balanced else []

    def take(step: int) -> Step | None:
        if meter.spent:
            return None
        random = torch.Generator().manual_seed(seed_of(settings.seed, step))
        prompts, replayed = draw_batch(attacker, archive.buffer, settings, random)
        drawn = [attack for attack in archive.look_up(prompts, step + 1) if attack.score is not None]
        batch = drawn + replayed
        line = {
            "success": mean([attack.score for attack in drawn]),
            "known": len(archive.known),
            "unscorable": archive.unscorable,
        }
        heat = schedule(step, settings.heat, 1.0, max(1, settings.steps // 5))
        rewards = rewards_of(batch, settings, heat).to(log_z.device) if batch else torch.zeros(0)
        if settings.objective == "ppo":
            rewards = rewards + settings.novelty * torch.tensor(
                [novelty(attack, archive.buffer) for attack in batch], device=log_z.device
            )
        for attack in drawn:
            archive.buffer.add(attack)
        if len(batch) < 2:
            return Step(None, line)
        tokens = [attack.tokens for attack in batch]
        before = (
            attacker.log_policy(tokens).detach()
            if settings.objective == "ppo" or (balanced and step == 0)
            else None
        )
        if balanced and step == 0:
            log_z.data = (rewards - before).mean()
        loss = lambda: objective_loss(settings, attacker.log_policy(tokens), rewards, log_z, before)
        return Step(
            loss,
            line | ({"log_z": log_z.item()} if balanced else {}),
            settings.updates if settings.objective == "ppo" else 1,
        )

    optimise(out, groups, settings, take, settings.objective, f"{settings.objective} {out.name}", archive)
    return list(archive.known.values())


def draw_batch(
    attacker: Attacker, buffer: ReplayBuffer, settings: Settings, random: torch.Generator
) -> tuple[list[Prompt], list[Attack]]:
    """Prompts drawn from the policy, and attacks replayed; the objectives that maximise draw all of them at temperature 1."""
    greedy = settings.objective in ON_POLICY
    replayed = [] if greedy or not len(buffer) else buffer.sample(settings.batch_size // 2)
    temperatures = torch.ones(settings.batch_size - len(replayed))
    if not greedy:
        half = len(temperatures) // 2
        temperatures[:half] = settings.coldest + (settings.hottest - settings.coldest) * torch.rand(
            half, generator=random
        )
    return attacker.draw(temperatures, random), replayed


def rewards_of(attacks: list[Attack], settings: Settings, heat: float) -> Tensor:
    """log R of each, (N,), at temperature `heat`."""
    fails = lambda attack: settings.min_fluency is not None and attack.least_likely < settings.min_fluency
    scores = torch.tensor(
        [torch.tensor(FLOOR).log() if fails(attack) else attack.log_score for attack in attacks]
    )
    reference = torch.tensor([attack.log_reference for attack in attacks])
    return log_reward(reference, scores, gamma=settings.gamma, beta=settings.beta, temperature=heat)


def novelty(attack: Attack, buffer: ReplayBuffer) -> float:
    """From 0 for a prompt that stands in the buffer to 1 for one without anything in common with any there."""
    distances = edit_distances(attack.tokens, [other.tokens for other in buffer.items])
    lengths = [max(len(attack.tokens), len(other.tokens)) for other in buffer.items]
    return min((distance / length for distance, length in zip(distances, lengths, strict=True)), default=1.0)


def objective_loss(
    settings: Settings, log_pi: Tensor, rewards: Tensor, log_z: Tensor, before: Tensor | None
) -> Tensor:
    """The batch's loss under the chosen objective; `before` is log pi at the step's beginning (ppo)."""
    match settings.objective:
        case "tb":
            return trajectory_balance(log_pi, rewards, log_z)
        case "vargrad":
            return vargrad(log_pi, rewards)
        case "ctb":
            return contrastive_balance(log_pi, rewards, settings.noise)
        case "reinforce":
            return reinforce(log_pi, rewards)
        case "ppo":
            return ppo(log_pi, before, (rewards - rewards.mean()) / (rewards.std() + 1e-6))


def fit(attacker: Attacker, prompts: list[Prompt], training: Training, out: Path, what: str) -> None:
    """Fit the policy's adapter to `prompts`, each as often as the others, by maximum likelihood: SFT, smoothing, adaptation."""
    prompts = list(dict.fromkeys(prompts))

    def take(step: int) -> Step:
        random = torch.Generator().manual_seed(seed_of(training.seed, step))
        picked = torch.randint(len(prompts), (training.batch_size,), generator=random).tolist()
        return Step(lambda: -attacker.log_policy([prompts[number] for number in picked]).mean(), {})

    data = hashlib.sha256(repr(prompts).encode()).hexdigest()
    optimise(
        out,
        [Group(adapter_parameters(attacker.model, attacker.policy), training.lr)],
        training,
        take,
        data,
        f"{what} {out.name}",
    )


def seed_of(seed: int, step: int) -> int:
    """A seed for each step, so that a resumed run draws what the whole one would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
