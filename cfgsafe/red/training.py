"""The loop that every stage of the attacker runs: steps, logs, saved states, and a killed run that goes on to the same result.

Source: as in `cfgsafe.blue.orpo`; the learning rate falls linearly to 0 at the last step, gradients are clipped at 1 (Lee et al., arXiv
2405.18540).
Deviation from their code: schedules count optimiser steps, and a saved state holds everything a step reads, the replay buffer included.

Run it: python train.py attacker --resume ...
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cfgsafe.blue import resume
from cfgsafe.parallel import World
from cfgsafe.red.objectives import schedule

CLIP = 1.0


@dataclass
class Training:
    """How long and how fast a stage trains."""

    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 32
    """Prompts a step, drawn and replayed."""
    lr: float = 1e-4
    """Learning rate of the adapter; it falls linearly to 0."""
    seed: int = 0
    """Of everything that is drawn."""
    save_every: int = 100
    """Steps between saved states."""
    resume: bool = False
    """Go on with the run in --out where its last saved state left it."""


@dataclass
class Step:
    """What one step minimises, `updates` times over, or nothing; and its line of metrics.jsonl."""

    loss: Callable[[], Tensor] | None
    line: dict[str, float]
    updates: int = 1


class Memory(Protocol):
    """What a stage keeps between steps beside its weights."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path | None, done: int) -> None:
        """Go back to what it was after `done` steps; without a folder there were none."""


@dataclass
class Group:
    """Parameters by name, and their learning rate."""

    parameters: dict[str, nn.Parameter | Tensor]
    lr: float
    clipped: bool = True


def optimise(
    out: Path,
    groups: list[Group],
    training: Training,
    take: Callable[[int], Step | None],
    data: str,
    what: str,
    memory: Memory | None = None,
) -> None:
    """Minimise what `take(step)` gives, for all steps or until it gives None. `data` names what a resumed run must find unchanged.

    Raises InputError when it did change, and resume.Stopped after SIGINT or SIGTERM.
    """
    every = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    optimiser = torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr": group.lr} for group in groups], weight_decay=0.0
    )
    world = World(0, 1, str(next(iter(every.values())).device))
    done = resume.load(out, every, optimiser, data, world) if training.resume else 0
    if memory:
        memory.load(resume.states(out)[-1] if done else None, done)
    for stale in resume.states(out) if not done else ():
        shutil.rmtree(stale)
    resume.keep_steps(out / "metrics.jsonl", "step", done)
    save = lambda count: resume.save(
        out, count, every, optimiser, data, world, memory.save if memory else None
    )
    bar = tqdm(total=training.steps, initial=done, desc=what, leave=False)
    with bar, resume.signals() as arrived, open(out / "metrics.jsonl", "a") as log:
        for step in range(done, training.steps):
            taken = take(step)
            if taken is None:
                break
            for group, settings in zip(optimiser.param_groups, groups, strict=True):
                group["lr"] = schedule(step, settings.lr, 0.0, training.steps)
            for _ in range(taken.updates if taken.loss else 0):
                loss = taken.loss()
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(
                    [p for group in groups if group.clipped for p in group.parameters.values()], CLIP
                )
                optimiser.step()
                taken.line["loss"] = loss.item()
            log.write(json.dumps({"step": step + 1, **taken.line}) + "\n")
            log.flush()
            bar.set_postfix({name: f"{value:.3g}" for name, value in taken.line.items()}, refresh=False)
            bar.update()
            if (arrived or (step + 1) % training.save_every == 0) and step + 1 < training.steps:
                save(step + 1)
            if arrived and step + 1 < training.steps:
                raise resume.Stopped(
                    f"stopped after step {step + 1} of {training.steps}, which is saved; go on with --resume"
                )
    for state in resume.states(out):
        shutil.rmtree(state)
