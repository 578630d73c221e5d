"""The training that all stages share: optimiser, log, saved states; and the simplest one, `fit`.

Source: as in `cfgsafe.blue.orpo`; the learning rate falls linearly to 0 after the last step, and
gradients are clipped at norm 1 (Lee et al., arXiv 2405.18540).
Deviation from their code: schedules count optimiser steps, and a saved state holds everything that
a step reads, the replay buffer included, so that a killed run goes on to the same result.

Run it: python train.py attacker --resume ...
"""

import hashlib
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cfgsafe.blue import resume
from cfgsafe.errors import InputError
from cfgsafe.fields import Count, Rate, Seed
from cfgsafe.files import Log
from cfgsafe.parallel import World
from cfgsafe.progress import progress
from cfgsafe.red.objectives import schedule
from cfgsafe.red.policy import Attacker, Prompt

CLIP = 1.0  # largest norm of a gradient


@dataclass
class Training:
    """How long and how fast a stage trains."""

    steps: Count = 500
    """Optimiser steps."""
    batch_size: Count = 32
    """Prompts per step, drawn and replayed."""
    lr: Rate = 1e-4
    """Learning rate of the adapter; it falls linearly to 0."""
    seed: Seed = 0
    """Seed of all random draws."""
    save_every: Count = 100
    """Steps between saved states."""
    resume: bool = False
    """Go on with the run in --out from its last saved state."""


@dataclass
class Group:
    """Parameters by name, with their learning rate; `clipped`: their gradients are clipped."""

    parameters: Mapping[str, Tensor]
    lr: float
    clipped: bool = True


class Memory(Protocol):
    """What a stage keeps between steps besides its parameters."""

    def save(self, folder: Path) -> None:
        """Write files into the folder of a saved state."""

    def load(self, folder: Path | None, done: int) -> None:
        """Restore the state after `done` steps from `folder`; None: the run starts from the beginning."""


class Trainer:
    """The optimiser of a stage, its log metrics.jsonl, and its saved states, in the folder `out`.

        with Trainer(...) as trainer:
            for step in trainer.steps():
                value = trainer.update(step, loss)
                trainer.finish_step(step, {"loss": value})

    `data` identifies the data of a run. A run that is resumed with other data raises InputError.
    When the results are written, call `resume.delete_states(out)`.
    """

    def __init__(
        self,
        out: Path,
        groups: list[Group],
        settings: Training,
        *,
        data: str,
        title: str,
        memory: Memory | None = None,
    ):
        self.out, self.groups, self.settings = out, groups, settings
        self.data, self.title, self.memory = data, title, memory
        self.parameters: dict[str, Tensor] = {}
        self.clipped: list[Tensor] = []
        for group in groups:
            self.parameters |= group.parameters
            if group.clipped:
                self.clipped += group.parameters.values()
        self.optimiser = torch.optim.AdamW(
            [{"params": list(group.parameters.values()), "lr": group.lr} for group in groups],
            weight_decay=0.0,
        )
        self.world = World(0, 1, str(next(iter(self.parameters.values())).device))
        self.done = 0
        if settings.resume:
            self.done = resume.load(out, self.parameters, self.optimiser, data, self.world)
        if memory:
            memory.load(resume.states(out)[-1] if self.done else None, self.done)
        if not self.done:
            resume.delete_states(out)  # of an earlier run into this folder
        resume.keep_steps(out / "metrics.jsonl", "step", self.done)

    def __enter__(self) -> "Trainer":
        self._open = ExitStack()
        bar = progress(total=self.settings.steps, initial=self.done, desc=self.title)
        self._bar = self._open.enter_context(bar)
        self._signals = self._open.enter_context(resume.signals())
        self._log = self._open.enter_context(Log(self.out / "metrics.jsonl"))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def steps(self) -> range:
        """Numbers, from 0, of the steps that are left."""
        return range(self.done, self.settings.steps)

    def update(self, step: int, loss: Tensor) -> float:
        """One step of the optimiser on `loss`; returns its value.

        Raises InputError, before any weight has changed, when the loss or its gradient is not finite.
        """
        for group, own in zip(self.optimiser.param_groups, self.groups, strict=True):
            group["lr"] = schedule(step, own.lr, 0.0, self.settings.steps)
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.clipped, CLIP)
        for what, value in (("loss", loss.item()), ("gradient's norm", norm.item())):
            if not math.isfinite(value):
                raise InputError(f"step {step + 1}: the {what} is {value}; start anew with a lower --lr")
        self.optimiser.step()
        return loss.item()

    def finish_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step, and save the state where it is time to.

        Raises resume.Stopped after SIGINT or SIGTERM, unless this was the last step.
        """
        done, steps = step + 1, self.settings.steps
        self._log.add({"step": done, **metrics})
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
        self._bar.update()
        stop = bool(self._signals)
        if done == steps or not (stop or done % self.settings.save_every == 0):
            return
        save_memory = self.memory.save if self.memory else None
        resume.save(self.out, done, self.parameters, self.optimiser, self.data, self.world, save_memory)
        if stop:
            raise resume.Stopped(f"stopped after step {done} of {steps}, which is saved; go on with --resume")


def fit(attacker: Attacker, prompts: list[Prompt], training: Training, out: Path, title: str) -> None:
    """Fit the policy to `prompts`, each as often as the others, by maximum likelihood.

    Writes OUT/metrics.jsonl: loss = mean of -log pi over the prompts of the step.
    """
    prompts = list(dict.fromkeys(prompts))
    groups = [Group(attacker.parameters(), training.lr)]
    data = hashlib.sha256(repr(prompts).encode()).hexdigest()
    with Trainer(out, groups, training, data=data, title=f"{title} {out.name}") as trainer:
        for step in trainer.steps():
            random = torch.Generator().manual_seed(seed_of(training.seed, step))
            picked = torch.randint(len(prompts), (training.batch_size,), generator=random).tolist()
            loss = -attacker.log_policy([prompts[number] for number in picked]).mean()
            value = trainer.update(step, loss)
            trainer.finish_step(step, {"loss": value})


def seed_of(seed: int, step: int) -> int:
    """A seed for each step, so that a resumed run draws what the whole run would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7])
