"""Training the attacker against a target: GFlowNet fine-tuning with replay, and its baselines.

Source: Lee et al. (arXiv 2405.18540). Half of each batch is replayed, half is drawn. Half of the
drawn prompts are drawn at temperature 1, half at a temperature from U[min_temperature,
max_temperature]. PPO with a bonus for novelty: Hong et al. (arXiv 2402.19464). Pruning of pairs,
and the lower limit of fluency: Stable-GFN (arXiv 2605.00553).
Deviations:
- The beginning of prompts is fixed, so log Z is one number. The first batch gives its initial value.
- Schedules count optimiser steps and reach their end value at the step that they name.
- Success is the mean of the scores of the answers, in training as in evaluation.
- The reference log-probability obeys the rules of the policy.
- An attack that could not be scored trains nothing. It is tried again when it is drawn again.
- Novelty is the relative edit distance to the nearest prompt of the buffer.

Run it: python train.py attacker --stage gfn --help
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from torch import Tensor

from cfgsafe.blue import resume
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Divisor, LogProb, Rate, Share, Weight
from cfgsafe.files import Log, read_json, read_jsonl, write_text
from cfgsafe.folders import sync
from cfgsafe.identity import file_digest
from cfgsafe.red import objectives
from cfgsafe.red.buffer import Likeness, ReplayBuffer, edit_distances
from cfgsafe.red.objectives import schedule
from cfgsafe.red.policy import Attacker, Prompt
from cfgsafe.red.records import FLOOR, Attack, Trial
from cfgsafe.red.training import Group, Trainer, Training, seed_of
from cfgsafe.remote import Meter

ON_POLICY = ("reinforce", "ppo")  # objectives without replay and exploring temperatures
Score = Callable[[list[str]], list[tuple[Trial, ...]]]  # texts -> the target's answers to each


@dataclass
class Settings(Training):
    """How the attacker explores."""

    objective: Literal["tb", "vargrad", "ctb", "reinforce", "ppo"] = "tb"
    """tb, vargrad and ctb sample in proportion to the reward; reinforce and ppo maximise it."""
    lr_log_z: Rate = 0.1
    """Learning rate of log Z (tb)."""
    beta: Divisor = 0.1
    """Weight of success in the reward: log R = log p_ref / gamma + log c / beta."""
    gamma: Divisor = 1.0
    """Weight of fluency in the reward."""
    reward_temperature: Divisor = 2.0
    """First temperature of the reward; it falls to 1 over the first fifth of the steps."""
    min_temperature: Divisor = 0.5
    """Lowest sampling temperature of exploration."""
    max_temperature: Divisor = 2.0
    """Highest sampling temperature of exploration."""
    noise: Weight = 0.0
    """ctb leaves out pairs of prompts whose log-rewards differ by this or less."""
    min_fluency: LogProb | None = None
    """A prompt fails if the mean log-probability of its least likely fifth of tokens is below this."""
    novelty: Weight = 1.0
    """Bonus (ppo) for a prompt that resembles none in the buffer, in units of the log-reward."""
    updates: Count = 4
    """Updates per step (ppo)."""
    capacity: Count = 1000
    """Maximum number of prompts in the replay buffer."""
    tolerance: Share = 0.25
    """Prompts closer than this distance are alike; only the better one is kept."""
    likeness: Likeness = "edit"
    """Distance of prompts: edits / summed length, or the cosine distance of embeddings."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        why = f"with --objective {self.objective}"
        if self.objective != "tb":
            yield why, "lr_log_z"
        if self.objective != "ctb":
            yield why, "noise"
        if self.objective != "ppo":
            yield why, "novelty", "updates"
        if self.objective in ON_POLICY:
            yield why, "min_temperature", "max_temperature"
        if self.objective == "reinforce":
            yield why, "capacity", "tolerance", "likeness"


def explore(attacker: Attacker, score: Score, meter: Meter, settings: Settings, out: Path) -> list[Attack]:
    """Train the policy against `score`, until all steps are done or `meter` is spent.

    Returns every attack that has a score, in order, each once.

    Writes OUT/attacks.jsonl, all attacks put to the target, and OUT/metrics.jsonl, a line a step:
        success     mean score of the drawn prompts that have a score; 0 where none has
        known       different prompts with a score so far
        unscorable  attacks without a score so far
        log_z       log Z before the update (tb)
        loss        loss of the last update; left out for a batch of fewer than two prompts
    """
    archive = Archive(out / "attacks.jsonl", attacker, score)
    buffer = ReplayBuffer(settings.capacity, settings.tolerance, settings.seed, settings.likeness)
    memory = Exploration(archive, buffer, meter)
    log_z = torch.zeros((), device=attacker.model.device, requires_grad=True)
    groups = [Group(attacker.parameters(), settings.lr)]
    if settings.objective == "tb":
        groups.append(Group({"log_z": log_z}, settings.lr_log_z, clipped=False))
    updates = settings.updates if settings.objective == "ppo" else 1
    title = f"{settings.objective} {out.name}"

    with Trainer(out, groups, settings, data=settings.objective, title=title, memory=memory) as trainer:
        for step in trainer.steps():
            if meter.spent:
                break

            # Draw prompts from the policy, replay others, and put to the target those that are new.
            random = torch.Generator().manual_seed(seed_of(settings.seed, step))
            prompts, replayed = draw_batch(attacker, memory.buffer, settings, random)
            asked = archive.look_up(prompts, step + 1)
            drawn = [attack for attack in asked if attack.score is not None]
            batch = drawn + replayed
            scores = [attack.known_score for attack in drawn]
            metrics = {
                "success": sum(scores) / len(scores) if scores else 0.0,
                "known": len(archive.known),
                "unscorable": archive.unscorable,
            }

            # Compute their rewards, then add them to the buffer.
            cooling = max(1, settings.steps // 5)  # steps
            temperature = schedule(step, settings.reward_temperature, 1.0, cooling)
            rewards = log_rewards(batch, settings, temperature)
            if settings.objective == "ppo":
                bonus = [novelty(attack, memory.buffer) for attack in batch]
                rewards = rewards + settings.novelty * torch.tensor(bonus)  # float64, as novelty() is NumPy's
            rewards = rewards.to(log_z.device)
            for attack in drawn:
                memory.buffer.add(attack)

            # Update the policy.
            if len(batch) >= 2:
                tokens = [attack.tokens for attack in batch]
                log_pi = attacker.log_policy(tokens)
                log_old = log_pi.detach()
                if settings.objective == "tb":
                    if step == 0:
                        log_z.data = (rewards - log_old).mean()
                    metrics["log_z"] = log_z.item()
                for update in range(updates):
                    if update > 0:
                        log_pi = attacker.log_policy(tokens)
                    loss = objective_loss(settings, log_pi, rewards, log_z, log_old)
                    metrics["loss"] = trainer.update(step, loss)
            trainer.finish_step(step, metrics)
    return list(archive.known.values())


def draw_batch(
    attacker: Attacker, buffer: ReplayBuffer, settings: Settings, random: torch.Generator
) -> tuple[list[Prompt], list[Attack]]:
    """Prompts drawn from the policy, and attacks replayed from the buffer.

    The objectives of ON_POLICY replay none and draw all prompts at temperature 1.
    """
    if settings.objective in ON_POLICY:
        return attacker.draw(torch.ones(settings.batch_size), random), []
    replayed = buffer.sample(settings.batch_size // 2) if len(buffer) else []
    temperatures = torch.ones(settings.batch_size - len(replayed))
    half = len(temperatures) // 2
    low, high = settings.min_temperature, settings.max_temperature
    temperatures[:half] = low + (high - low) * torch.rand(half, generator=random)
    return attacker.draw(temperatures, random), replayed


def log_rewards(attacks: list[Attack], settings: Settings, temperature: float) -> Tensor:
    """log R of each attack, (N,); one that is not fluent enough counts as a failure."""
    failure = torch.tensor(FLOOR).log().item()
    scores = []
    for attack in attacks:
        fluent = settings.min_fluency is None or attack.least_likely >= settings.min_fluency
        scores.append(attack.log_score if fluent else failure)
    references = torch.tensor([attack.log_reference for attack in attacks])
    return objectives.log_reward(
        references, torch.tensor(scores), gamma=settings.gamma, beta=settings.beta, temperature=temperature
    )


def novelty(attack: Attack, buffer: ReplayBuffer) -> float:
    """Edit distance to the nearest prompt of the buffer / length of the longer of the two.

    0 for a prompt that is in the buffer, 1 for one that has nothing in common with any there.
    """
    if not len(buffer):
        return 1.0
    others = [other.tokens for other in buffer.items]
    lengths = [max(len(attack.tokens), len(other)) for other in others]
    return (edit_distances(attack.tokens, others) / lengths).min()


def objective_loss(
    settings: Settings, log_pi: Tensor, rewards: Tensor, log_z: Tensor, log_old: Tensor
) -> Tensor:
    """The loss of the batch; `log_old` is log pi before the first update of the step (ppo)."""
    match settings.objective:
        case "tb":
            return objectives.trajectory_balance(log_pi, rewards, log_z)
        case "vargrad":
            return objectives.vargrad(log_pi, rewards)
        case "ctb":
            return objectives.contrastive_balance(log_pi, rewards, settings.noise)
        case "reinforce":
            return objectives.reinforce(log_pi, rewards)
        case "ppo":
            advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            return objectives.ppo(log_pi, log_old, advantage)
        case _:
            assert_never(settings.objective)


class Archive:
    """Every attack that was put to the target, in order: in memory, and in the file `path`."""

    def __init__(self, path: Path, attacker: Attacker, score: Score):
        self.path, self.attacker, self.score = path, attacker, score
        self.known: dict[Prompt, Attack] = {}  # attacks with a score
        self.unscorable = 0  # attacks without one

    def load(self, done: int) -> list[Attack]:
        """Go back to what the file held after step `done`, and return that; later lines are dropped."""
        resume.keep_steps(self.path, "step", done)
        rows = list(read_jsonl(self.path)) if self.path.exists() else []
        attacks = [Attack.from_json(row, place) for place, row in rows]
        self.known = {attack.tokens: attack for attack in attacks if attack.score is not None}
        self.unscorable = len(attacks) - len(self.known)
        return attacks

    def look_up(self, prompts: list[Prompt], step: int) -> list[Attack]:
        """The attack of each prompt; those without a known score are put to the target."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        unscored: dict[Prompt, Attack] = {}
        asked = self._ask(new) if new else []
        with Log(self.path) as log:
            for attack in asked:
                log.add({"step": step, **attack.to_json()})
                found = unscored if attack.score is None else self.known
                found[attack.tokens] = attack
        self.unscorable += len(unscored)
        return [self.known.get(prompt) or unscored[prompt] for prompt in prompts]

    def _ask(self, prompts: list[Prompt]) -> list[Attack]:
        """Put prompts to the target; those with the same text are asked once."""
        texts = [self.attacker.decode(prompt) for prompt in prompts]
        different = list(dict.fromkeys(texts))
        trials = dict(zip(different, self.score(different), strict=True))
        attacks = []
        for prompt, text, fluency in zip(prompts, texts, self.attacker.fluency(prompts), strict=True):
            likely, least = fluency
            attacks.append(Attack(prompt, text, likely, trials[text], least))
        return attacks


@dataclass
class Exploration:
    """What `explore` keeps between steps besides parameters."""

    archive: Archive
    buffer: ReplayBuffer
    meter: Meter

    def save(self, folder: Path) -> None:
        """Write buffer.jsonl and calls.json; attacks.jsonl is there already, and its digest is noted."""
        self.buffer.save(folder / "buffer.jsonl")
        sync(self.archive.path)
        facts = {"calls": self.meter.made, "attacks": file_digest(self.archive.path)}
        write_text(folder / "calls.json", json.dumps(facts) + "\n")

    def load(self, folder: Path | None, done: int) -> None:
        """As training.Memory.load. Raises InputError when attacks.jsonl has been changed."""
        self.archive.load(done)
        if folder:
            facts = read_json(folder / "calls.json")
            self.buffer, self.meter.made = ReplayBuffer.load(folder / "buffer.jsonl"), facts["calls"]
            path = self.archive.path
            if not path.exists() or file_digest(path) != facts["attacks"]:
                raise InputError(
                    f"{path}: its attacks up to step {done} are not those of the run; "
                    "restore it, or start anew without --resume"
                )
