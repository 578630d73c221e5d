"""The training stage: a LoRA adapter on preference pairs, by ORPO or another of `cfgsafe.losses`.

Source: Hong et al. (arXiv 2403.07691) with the conventions of TRL 0.11.4 (pooled NLL, schedule,
clipping, logged values); learning rate and lengths of Smirnov (arXiv 2412.06846).
Deviations: an empty completion is an error, not a NaN. No reference model is kept; its
log-probabilities are computed before the first step. The last, smaller step of an epoch averages
over its own batches.

Writes to --out: epoch-N (PEFT adapter), metrics.jsonl (one line per step: TRL's values, with `_` for
`/` in their names), eval.jsonl (one line per epoch, with --eval-pairs), config.json and, until the run
ends, state-N.

Run it: python train.py orpo --model cfgsafe/demo/leaky --pairs pairs.jsonl --out runs/orpo
        torchrun --nproc-per-node 2 train.py orpo --device cuda --model M --pairs pairs.jsonl --out runs/orpo
"""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cfgsafe.blue import batches, memory, origin, resume
from cfgsafe.blue.batches import Pair, Step
from cfgsafe.blue.earlier import replacing
from cfgsafe.blue.options import FREE, WRITES, Options, check, unread
from cfgsafe.blue.step import LOGGED, batch_loss, evaluate, reference_logprobs
from cfgsafe.errors import InputError
from cfgsafe.files import Log, make_folder
from cfgsafe.hub import resolve
from cfgsafe.identity import contents
from cfgsafe.llama import Llama
from cfgsafe.lora import LoRAConfig, adapter_parameters, adapter_updates, attach, load_adapter, write_adapter
from cfgsafe.losses import beta_of
from cfgsafe.parallel import World, join, whole, wrap
from cfgsafe.progress import Bar, progress
from cfgsafe.subject import Subject, load
from cfgsafe.ternary import BITS


@dataclass(frozen=True)
class Run:
    """What every step of a run works with."""

    options: Options
    world: World
    model: Llama
    net: nn.Module  # the model, or its wrapper for several processes
    parameters: Mapping[str, nn.Parameter]  # of the adapter
    optimiser: torch.optim.Optimizer
    pairs: list[Pair]
    reference: Tensor | None  # (2, pairs); see `step.reference_logprobs`


def run(options: Options) -> None:
    check(options)
    out = make_folder(options.out)
    with join(options.device) as world, replacing(out, WRITES, resumed=options.resume):
        device = "cpu" if options.fsdp else world.device
        model, tokenizer = load(Subject(options.model, device=device, dtype=options.dtype))
        context = model.config.max_position_embeddings
        pairs, held_out = batches.read_pairs(options.pairs, tokenizer, context, options), []
        if options.eval_pairs:
            held_out = batches.read_pairs(options.eval_pairs, tokenizer, context, options)
        torch.manual_seed(options.seed)
        train(model, pairs, options, out, held_out, world)
        if world.main:
            print(json.dumps({"out": str(out), "pairs": len(pairs), "epochs": options.epochs}))


def train(
    model: Llama, pairs: list[Pair], options: Options, out: Path, held_out: list[Pair], world: World
) -> None:
    """Attach a fresh adapter, or --init-adapter, to `model` and train it; set the seed before.

    Raises InputError when loss or gradient is not finite, resume.Stopped after SIGINT or SIGTERM.
    """
    config = add_adapter(model, options)
    model.recomputed = memory.recomputed(model, pairs, options, world)
    net = wrap(model.train(), world, options.fsdp)
    if options.compile:
        for block in model.model.layers:
            block.compile()
    parameters = adapter_parameters(model)
    optimiser = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=0.0, fused=True)
    steps = batches.plan([pair.tokens for pair in pairs], options)
    held = contents(options, folders=("model", "init_adapter"), files=("pairs", "eval_pairs"))
    reference = reference_logprobs(net, model, pairs, options, world)
    held_out_reference = reference_logprobs(net, model, held_out, options, world)
    this = Run(options, world, model, net, parameters, optimiser, pairs, reference)
    done = begin(this, settings_of(options, config), held, out, steps)
    writer = tensorboard(out) if options.tensorboard and world.main else None
    title = f"{options.objective} {out.name}"
    bar = progress(total=len(steps), initial=done, desc=title, disable=not world.main)
    with bar, resume.signals() as arrived, Log(out / "metrics.jsonl") as log:
        for number, step in enumerate(steps[done:], start=done + 1):
            lr = learning_rate(number - 1, len(steps), options)
            values = take_step(this, step, lr, f"step {number}")
            line = {"step": number, "epoch": step.epoch, **values}
            if world.main:
                record(line, log, bar, writer)

            run_ends = number == len(steps)
            epoch_ends = run_ends or steps[number].epoch > step.epoch
            if epoch_ends:
                weights = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
                if world.main:
                    write_adapter(out / f"epoch-{step.epoch}", weights, config, base=options.model)
            if epoch_ends and held_out:
                found = evaluate(net, model, held_out, options, held_out_reference, world)
                if world.main:
                    report(out, step.epoch, found)

            stop = any_process(bool(arrived), world)
            if not run_ends and (stop or number % options.save_every == 0):
                resume.save(out, number, parameters, optimiser, held["pairs"], world)
            if not run_ends and stop:
                raise resume.Stopped(
                    f"stopped after step {number} of {len(steps)}, which is saved; go on with --resume"
                )
    if writer:
        writer.close()
    if world.main:
        resume.delete_states(out)
        if done < len(steps):
            print(f"{out}: {len(steps)} steps, {loss_and_margin(line)}", file=sys.stderr)
    model.requires_grad_(False).eval()


def take_step(run: Run, step: Step, lr: float, what: str) -> dict[str, float]:
    """One step of the optimiser at rate `lr`, on the mean of its batches; returns its metrics.

    Raises InputError, before any weight has changed, when the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    values = torch.zeros(len(LOGGED))
    all_numbers: list[int] = []
    for numbers in step.batches:
        some = [run.pairs[number] for number in numbers]
        before = None if run.reference is None else run.reference[:, numbers]
        loss, logged = batch_loss(run.net, run.model, some, run.options, before, run.world)
        check_finite(f"{what}: the loss", logged[0].item(), some)
        (loss / len(step.batches)).backward()
        values += logged / len(step.batches)
        all_numbers += numbers
    pairs = [run.pairs[number] for number in all_numbers]
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), run.options.max_grad_norm or math.inf)
    grad_norm = whole(norm).item()
    check_finite(f"{what}: the gradient's norm", grad_norm, pairs)
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    tokens = sum(pair.tokens for pair in pairs)
    return {
        **dict(zip(LOGGED, values.tolist(), strict=True)),
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "peak_memory_bytes": peak_memory(run.world.device),
    }


def record(line: dict[str, float], log: Log, bar: Bar, writer) -> None:
    """Report a step in metrics.jsonl, beside the progress bar and, with a writer, in TensorBoard."""
    log.add(line)
    shown = {"loss": f"{line['loss']:.3f}", "margin": f"{line['rewards_margin']:.3f}"}
    bar.set_postfix(shown, refresh=False)
    bar.update()
    if writer:
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])


def any_process(flag: bool, world: World) -> bool:
    """Whether `flag` holds in any process, so that all of them stop at the same step."""
    return world.total(torch.tensor(float(flag), device=world.device)).item() > 0


def add_adapter(model: Llama, options: Options) -> LoRAConfig:
    """Attach the adapter to train: a fresh one, or --init-adapter."""
    if options.lora_bits not in (None, BITS):
        raise InputError(f"--lora-bits {options.lora_bits:g}: only {BITS} (ternary) is supported")
    if options.init_adapter is None:
        sizes = options.rank, options.alpha, options.lora_dropout
        config = LoRAConfig(*sizes, options.targets, bits=options.lora_bits)
        attach(model, config)
    else:
        config = load_adapter(resolve(options.init_adapter), model)
        config = replace(config, dropout=options.lora_dropout)
        for update in adapter_updates(model).values():
            update.dropout.p = options.lora_dropout
        for parameter in adapter_parameters(model).values():
            parameter.requires_grad_()
    return config


def settings_of(options: Options, config: LoRAConfig) -> dict:
    """What the run uses, for config.json: the adapter's own size; None for what its loss does not read."""
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    used = {"rank": config.rank, "alpha": config.alpha, "targets": targets, "lora_bits": config.bits}
    return asdict(options) | used | {"beta": beta_of(options)} | dict.fromkeys(unread(options))


def begin(run: Run, settings: dict, held: dict[str, str], out: Path, steps: list[Step]) -> int:
    """Clear `out`, or with --resume restore its last state; returns the number of steps done.

    `held` is what the files of the run hold, by `identity.contents`.
    """
    options, world, done = run.options, run.world, 0
    if options.resume:
        resume.check_same_run(out / resume.CONFIG, settings, held, FREE)
        finished = (out / f"epoch-{options.epochs}").exists() and not resume.states(out)
        done = len(steps)
        if not finished:
            done = resume.load(out, run.parameters, run.optimiser, held["pairs"], world)
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
        resume.write_config(out / resume.CONFIG, settings | origin.record(options), held)
    world.barrier()
    return done


def report(out: Path, epoch: int, values: dict[str, float]) -> None:
    """Write the values of the held-out pairs after an epoch."""
    with Log(out / "eval.jsonl") as log:
        log.add({"epoch": epoch, **values})
    print(f"{out}: epoch {epoch}, held-out {loss_and_margin(values)}", file=sys.stderr)


def loss_and_margin(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.3f}, rewards margin {values['rewards_margin']:.3f}"


def learning_rate(step: int, steps: int, options: Options) -> float:
    """lr * (m + (1 - m) * (1 + cos(pi p)) / 2) with p = step / steps and m = lr_min_ratio."""
    m = options.lr_min_ratio
    return options.lr * (m + (1 - m) * (1 + math.cos(math.pi * step / steps)) / 2)


def check_finite(what: str, value: float, pairs: list[Pair]) -> None:
    """Raise InputError naming the rows of the file."""
    if not math.isfinite(value):
        rows = ", ".join(pair.place for pair in pairs)
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
