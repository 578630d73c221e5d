"""The loop of every stage that trains an adapter: its steps, what it logs, how it stops and goes on.

Source: schedule and clipping as in TRL 0.11.4.
Deviations: see cfgsafe/blue/orpo.py, whose loss this loop knows nothing of. A stage gives it a loss of the
numbers of its rows, and writes its adapter and what it measures at the end of an epoch.

Run it: python train.py orpo --help
        python train.py distil --help
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cfgsafe.blue import resume
from cfgsafe.blue.batches import Step
from cfgsafe.errors import InputError
from cfgsafe.files import Log
from cfgsafe.parallel import World, whole
from cfgsafe.progress import Bar, progress


class Settings(Protocol):
    """The options of a stage that the loop reads; `blue.options.Options` says what each means."""

    lr: float
    lr_min_ratio: float
    epochs: int
    max_grad_norm: float
    save_every: int
    resume: bool


class Item(Protocol):
    """A row of the training data."""

    @property
    def tokens(self) -> int:
        """Tokens that a step computes for it."""

    @property
    def place(self) -> str:
        """file:line"""


# Of the numbers of a batch's rows: the loss to differentiate, and the logged values (n,), the loss first.
Loss = Callable[[list[int]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """What every step of a run works with."""

    options: Settings
    world: World
    parameters: Mapping[str, nn.Parameter]  # of the adapter
    optimiser: torch.optim.Optimizer
    items: Sequence[Item]
    loss: Loss
    logged: tuple[str, ...]  # names of the values that come with the loss
    shown: tuple[str, ...]  # those of them beside the progress bar
    data: str  # digest of the rows, which a saved state belongs to


def adam(parameters: Mapping[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The optimiser of every stage."""
    return torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=True)


def go(
    run: Run,
    steps: list[Step],
    done: int,
    out: Path,
    title: str,
    end_epoch: Callable[[int], None],
    writer=None,
) -> dict[str, float]:
    """All steps after the first `done`; returns what the last one logged, {} if all were done.

    `end_epoch(epoch)` is called in all processes; `writer`: see `tensorboard`. Raises InputError when loss or
    gradient is not finite, resume.Stopped after SIGINT or SIGTERM.
    """
    world, line = run.world, {}
    bar = progress(total=len(steps), initial=done, desc=title, disable=not world.main)
    with bar, resume.signals() as arrived, Log(out / "metrics.jsonl") as log:
        for number, step in enumerate(steps[done:], start=done + 1):
            lr = learning_rate(number - 1, len(steps), run.options)
            values = take_step(run, step, lr, f"step {number}")
            line = {"step": number, "epoch": step.epoch, **values}
            if world.main:
                record(line, run.shown, log, bar, writer)

            run_ends = number == len(steps)
            if run_ends or steps[number].epoch > step.epoch:
                end_epoch(step.epoch)

            stop = any_process(bool(arrived), world)
            if not run_ends and (stop or number % run.options.save_every == 0):
                resume.save(out, number, run.parameters, run.optimiser, run.data, world)
            if not run_ends and stop:
                raise resume.Stopped(
                    f"stopped after step {number} of {len(steps)}, which is saved; go on with --resume"
                )
    if writer:
        writer.close()
    if world.main:
        resume.delete_states(out)
        if line:
            print(f"{out}: {len(steps)} steps, {values_in_words(line, run.shown)}", file=sys.stderr)
    return line


def take_step(run: Run, step: Step, lr: float, what: str) -> dict[str, float]:
    """One step of the optimiser at rate `lr`, on the mean of its batches; returns its metrics.

    Raises InputError, before any weight has changed, when the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    values = torch.zeros(len(run.logged))
    all_numbers: list[int] = []
    for numbers in step.batches:
        loss, logged = run.loss(numbers)
        check_finite(f"{what}: the loss", logged[0].item(), [run.items[number] for number in numbers])
        (loss / len(step.batches)).backward()
        values += logged / len(step.batches)
        all_numbers += numbers
    items = [run.items[number] for number in all_numbers]
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), run.options.max_grad_norm or math.inf)
    grad_norm = whole(norm).item()
    check_finite(f"{what}: the gradient's norm", grad_norm, items)
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    tokens = sum(item.tokens for item in items)
    return {
        **dict(zip(run.logged, values.tolist(), strict=True)),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "peak_memory_bytes": peak_memory(run.world.device),
    }


def begin(
    run: Run,
    settings: dict,
    recorded: dict,
    held: dict[str, str],
    free: tuple[str, ...],
    out: Path,
    steps: list[Step],
) -> int:
    """Clear `out`, or with --resume restore its last state; returns the number of steps done.

    `settings` and what the run has `recorded` about itself go to config.json; `held` is what the files of the
    run hold, by `identity.contents`; a resumed run may change the options in `free`.
    """
    options, world, done = run.options, run.world, 0
    if options.resume:
        resume.check_same_run(out / resume.CONFIG, settings, held, free)
        finished = (out / f"epoch-{options.epochs}").exists() and not resume.states(out)
        done = len(steps)
        if not finished:
            done = resume.load(out, run.parameters, run.optimiser, run.data, world)
    world.barrier()  # nobody writes before all have read
    if world.main:
        if not options.resume:
            (out / resume.CONFIG).unlink(missing_ok=True)  # what is left, if this is killed, is no whole run
        epochs = steps[done].epoch - 1 if done < len(steps) else options.epochs  # complete ones
        complete = [f"epoch-{epoch}" for epoch in range(1, epochs + 1)]
        for path in out.glob("epoch-*/adapter_config.json"):
            if path.parent.name not in complete:  # from an earlier run into this folder
                shutil.rmtree(path.parent)
        if not done:
            resume.delete_states(out)
        resume.keep_steps(out / "metrics.jsonl", "step", done)
        resume.keep_steps(out / "eval.jsonl", "epoch", epochs)
        resume.write_config(out / resume.CONFIG, settings | recorded, held)
    world.barrier()
    return done


def record(line: dict[str, float], shown: tuple[str, ...], log: Log, bar: Bar, writer) -> None:
    """Report a step in metrics.jsonl, beside the progress bar and, with a writer, in TensorBoard."""
    log.add(line)
    bar.set_postfix({name.removeprefix("rewards_"): f"{line[name]:.3f}" for name in shown}, refresh=False)
    bar.update()
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])


def values_in_words(values: Mapping[str, float], shown: tuple[str, ...]) -> str:
    """
    >>> values_in_words({"loss": 0.5, "rewards_margin": 1.25, "lr": 1e-4}, ("loss", "rewards_margin"))
    'loss 0.500, rewards margin 1.250'
    """
    return ", ".join(f"{name.replace('_', ' ')} {values[name]:.3f}" for name in shown)


def any_process(flag: bool, world: World) -> bool:
    """Whether `flag` holds in any process, so that all of them stop at the same step."""
    return world.total(torch.tensor(float(flag), device=world.device)).item() > 0


def learning_rate(step: int, steps: int, options: Settings) -> float:
    """lr * (m + (1 - m) * (1 + cos(pi p)) / 2) with p = step / steps and m = lr_min_ratio."""
    m = options.lr_min_ratio
    return options.lr * (m + (1 - m) * (1 + math.cos(math.pi * step / steps)) / 2)


def check_finite(what: str, value: float, items: Sequence[Item]) -> None:
    """Raise InputError naming the rows of the file."""
    if not math.isfinite(value):
        rows = ", ".join(item.place for item in items)
        raise InputError(f"{what} is {value} (rows {rows}); lower --lr or mend these rows, and start anew")


def peak_memory(device: str) -> int:
    """Peak memory of this process in bytes: on the GPU, or else in the machine's RAM."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tensorboard(out: Path):
    """A writer of TensorBoard event files; raises InputError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard: the package is not installed; pip install 'cfgsafe[tensorboard]'"
        ) from None
    return SummaryWriter(out / "tensorboard")
