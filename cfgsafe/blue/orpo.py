"""The training stage: a LoRA adapter by ORPO, or one of its peers, on preference pairs.

Source: Hong et al. (arXiv 2403.07691) with the conventions of TRL 0.11.4 (pooled NLL, schedule, clipping, logged values), learning rate
and lengths of Smirnov (arXiv 2412.06846); the other objectives are named in `cfgsafe.losses`.
Deviations: an empty completion is an error, not a NaN; a reference model is not kept, its log-probabilities are computed before the
first step; an epoch's last, smaller accumulation group is averaged over its own batches.

Writes <out>/epoch-N (PEFT adapter), <out>/metrics.jsonl (one line a step: TRL's values, `_` for `/` in the names), <out>/eval.jsonl (one
line an epoch, with --eval-pairs), <out>/config.json and, until it ends, <out>/state-N.

Run it: python train.py orpo --model cfgsafe/demo/leaky --pairs pairs.jsonl --out runs/orpo
        torchrun --nproc-per-node 2 train.py orpo --device cuda --model M --pairs pairs.jsonl --out runs/orpo
"""

import json
import math
import random
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from cfgsafe.blue import batches, memory, resume
from cfgsafe.blue.batches import Pair
from cfgsafe.blue.step import LOGGED, batch_loss, evaluate, reference_logprobs
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, write_text
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import TARGETS, LoRAConfig, adapter_parameters, attach, load_adapter, write_adapter
from cfgsafe.losses import BETA
from cfgsafe.parallel import World, join, whole, wrap
from cfgsafe.subject import Subject, load
from cfgsafe.ternary import BITS


@dataclass
class Options:
    """Train a LoRA adapter on preference pairs."""

    model: str
    """Checkpoint folder or hub id of the model to unlearn."""
    pairs: str
    """JSONL of prompt, chosen, rejected; for sft without rejected, too."""
    out: str
    """Folder for the adapters, metrics.jsonl and config.json."""
    eval_pairs: str | None = None
    """Pairs to evaluate on after each epoch."""
    objective: Literal["orpo", "simpo", "npo", "dpo-idk", "graddiff", "sft"] = "orpo"
    """What to minimise; dpo-idk prefers its own refusals to the rejected side, sft learns the chosen answers alone."""
    init_adapter: str | None = None
    """PEFT folder or hub id to start from; it brings its own rank, alpha and target layers."""
    rank: int = 16
    """LoRA rank."""
    alpha: float = 32.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that get an adapter; lm_head is possible."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""
    lora_bits: float | None = None
    """1.58 trains ternary adapter weights (BitNet b1.58), stored in two bits each."""
    lr: float = 1e-4
    """Peak learning rate; it falls along a cosine to a tenth."""
    lr_min_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    beta: float | None = None
    """Weight of the odds-ratio term, or the objective's own beta: 0.1, for simpo 2."""
    gamma: float = 0.5
    """simpo's margin."""
    retain: float = 1.0
    """Weight of the NLL of prompt and chosen side in npo and graddiff."""
    batch_size: int = 2
    """Pairs a forward pass, over all processes."""
    grad_accum: int = 1
    """Forward passes a step."""
    epochs: int = 3
    """Passes over the pairs."""
    max_length: int = 2048
    """Longest prompt + answer, tokens."""
    max_prompt_length: int = 1900
    """Prompt tokens kept, the last ones, where prompt + answer are longer than max-length."""
    shuffle: bool = True
    """A new order of the pairs each epoch, from the seed."""
    group_by_length: bool = False
    """Batches of pairs of similar length: less padding, every pair still once an epoch."""
    share_prefix: bool = True
    """Compute what chosen and rejected begin with once; exact."""
    recompute: int | None = None
    """Blocks whose activations the backward computes again, by default as few as the GPU's memory allows."""
    compile: bool = False
    """Run each block through torch.compile."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    seed: int = 0
    """Of the adapter's initial weights and the order of the pairs."""
    save_every: int = 100
    """Steps between saved states, for --resume."""
    resume: bool = False
    """Go on with the run in --out where its last saved state left it."""
    tensorboard: bool = False
    """Also write TensorBoard's event files to <out>/tensorboard."""
    fsdp: bool = False
    """Under torchrun, split the base model over the processes (FSDP2) instead of copying it to each (DDP)."""
    device: str = "cpu"
    """Torch device; under torchrun, cuda is each process's own GPU."""
    dtype: str = "float32"
    """Of the frozen base: float32 or bfloat16. The adapter is float32."""


FREE = (
    "pairs",
    "eval_pairs",
    "out",
    "recompute",
    "save_every",
    "resume",
    "tensorboard",
    "fsdp",
    "device",
)  # a resumed run may change these


def run(options: Options) -> None:
    check_at_least(
        1, options, "rank", "batch_size", "grad_accum", "epochs", "max_prompt_length", "save_every"
    )
    check_at_least(0, options, "recompute")
    if options.max_prompt_length >= options.max_length:
        raise InputError(
            f"--max-prompt-length {options.max_prompt_length}: must be below --max-length {options.max_length}"
        )
    out = make_folder(options.out)
    options.beta = BETA[options.objective] if options.beta is None else options.beta
    with join(options.device) as world:
        model, tokenizer = load(
            Subject(options.model, device="cpu" if options.fsdp else world.device, dtype=options.dtype)
        )
        read = lambda path: batches.read_pairs(
            path,
            tokenizer,
            model.config.max_position_embeddings,
            options.max_length,
            options.max_prompt_length,
            random.Random(options.seed) if options.objective == "dpo-idk" else None,
            one_sided=options.objective == "sft",
        )
        pairs, held_out = read(options.pairs), read(options.eval_pairs) if options.eval_pairs else []
        torch.manual_seed(options.seed)
        train(model, pairs, options, out, held_out, world)
        if world.main:
            print(json.dumps({"out": str(out), "pairs": len(pairs), "epochs": options.epochs}))


def train(
    model: Llama, pairs: list[Pair], options: Options, out: Path, held_out: list[Pair], world: World
) -> None:
    """Attach an adapter to `model`, fresh or the one to start from, and train it; the seed must be set.

    Raises InputError when the loss or the gradient is not finite, and resume.Stopped after SIGINT or SIGTERM.
    """
    config = add_adapter(model, options)
    model.recomputed = memory.recomputed(model, pairs, options, world)
    net = wrap(model.train(), world, options.fsdp)
    if options.compile:
        for block in model.model.layers:
            block.compile()
    parameters = adapter_parameters(model)
    optimiser = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=0.0, fused=True)
    steps = batches.plan(
        [pair.tokens for pair in pairs],
        batch_size=options.batch_size,
        accumulate=options.grad_accum,
        epochs=options.epochs,
        shuffle=options.shuffle,
        group=options.group_by_length,
        seed=options.seed,
    )
    data = batches.fingerprint(pairs)
    reference, held_out_reference = (
        reference_logprobs(net, model, some, options, world) for some in (pairs, held_out)
    )
    done = begin(out, options, parameters, optimiser, data, steps, world)
    writer = tensorboard(out) if options.tensorboard and world.main else None
    bar = tqdm(
        total=len(steps),
        initial=done,
        desc=f"{options.objective} {out.name}",
        leave=False,
        disable=not world.main,
    )
    with bar, resume.signals() as arrived, open(out / "metrics.jsonl", "a") as log:
        for step, (epoch, micro_batches) in enumerate(steps[done:], start=done + 1):
            line = {"step": step, "epoch": epoch}
            lr = learning_rate(step - 1, len(steps), options)
            line |= take_step(
                net,
                model,
                pairs,
                micro_batches,
                parameters,
                optimiser,
                lr,
                reference,
                options,
                world,
                f"step {step}",
            )
            if world.main:
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(
                    loss=f"{line['loss']:.3f}", margin=f"{line['rewards_margin']:.3f}", refresh=False
                )
                bar.update()
            if writer:
                for name, value in line.items():
                    writer.add_scalar(name, value, step)
            last = step == len(steps)
            if last or steps[step][0] != epoch:
                weights = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
                if world.main:
                    write_adapter(out / f"epoch-{epoch}", weights, config, base=options.model)
                if held_out:
                    report(
                        out, epoch, evaluate(net, model, held_out, options, held_out_reference, world), world
                    )
            stop = (
                world.total(torch.tensor(float(bool(arrived)), device=world.device)).item() > 0
            )  # all processes stop at the same step
            if not last and (stop or step % options.save_every == 0):
                resume.save(out, step, parameters, optimiser, data, world)
            if not last and stop:
                raise resume.Stopped(
                    f"stopped after step {step} of {len(steps)}, which is saved; go on with --resume"
                )
    if writer:
        writer.close()
    if world.main:
        for state in resume.states(out):
            shutil.rmtree(state)
        if done < len(steps):
            print(
                f"{out}: {len(steps)} steps, loss {line['loss']:.3f}, rewards margin {line['rewards_margin']:.3f}",
                file=sys.stderr,
            )
    model.requires_grad_(False).eval()


def take_step(
    net,
    model: Llama,
    pairs,
    micro_batches,
    parameters,
    optimiser,
    lr: float,
    reference,
    options,
    world,
    what: str,
) -> dict:
    """One step of the optimiser at rate `lr` on the mean of its `micro_batches` of pair numbers; returns its line of metrics.jsonl.

    Raises InputError, before any weight has changed, when the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    values = torch.zeros(len(LOGGED))
    for numbers in micro_batches:
        known = None if reference is None else reference[:, numbers]
        loss, logged = batch_loss(net, model, [pairs[number] for number in numbers], options, known, world)
        check_finite(f"{what}: the loss", logged[0].item(), pairs, numbers)
        (loss / len(micro_batches)).backward()
        values += logged / len(micro_batches)
    norm = whole(nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm)).item()
    check_finite(f"{what}: the gradient's norm", norm, pairs, sum(micro_batches, []))
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    tokens = sum(pairs[number].tokens for numbers in micro_batches for number in numbers)
    return {
        **dict(zip(LOGGED, values.tolist(), strict=True)),
        "grad_norm": norm,
        "lr": lr,
        "tokens": tokens,
        "tokens_per_second": tokens / (time.perf_counter() - started),
        "peak_memory_bytes": peak_memory(world.device),
    }


def add_adapter(model: Llama, options: Options) -> LoRAConfig:
    """Attach the adapter to train, fresh or the one to start from."""
    if options.lora_bits not in (None, BITS):
        raise InputError(f"--lora-bits {options.lora_bits:g}: only {BITS} (ternary) is supported")
    if options.init_adapter is None:
        config = LoRAConfig(
            options.rank, options.alpha, options.lora_dropout, options.targets, bits=options.lora_bits
        )
        attach(model, config)
    else:
        config = load_adapter(resolve(options.init_adapter), model)
        for parameter in adapter_parameters(model).values():
            parameter.requires_grad_()
    return config


def begin(
    out: Path, options: Options, parameters: dict, optimiser, data: str, steps: list, world: World
) -> int:
    """Clear `out`, or with --resume bring back its last state; returns the number of steps that are done."""
    done = 0
    settings = asdict(options) | {"targets": list(options.targets)}
    if options.resume:
        resume.check_same_run(out, settings, FREE)
        finished = (out / f"epoch-{options.epochs}").exists() and not resume.states(out)
        done = len(steps) if finished else resume.load(out, parameters, optimiser, data, world)
    world.barrier()  # nobody writes before all have read
    if world.main:
        epochs = (
            steps[done - 1][0] - (done < len(steps) and steps[done][0] == steps[done - 1][0]) if done else 0
        )  # ended ones
        for stale in out.glob("epoch-*/adapter_config.json"):  # of an earlier run into this folder
            if stale.parent.name not in {f"epoch-{epoch}" for epoch in range(1, epochs + 1)}:
                shutil.rmtree(stale.parent)
        for stale in resume.states(out) if not done else ():
            shutil.rmtree(stale)
        resume.keep_steps(out / "metrics.jsonl", "step", done)
        resume.keep_steps(out / "eval.jsonl", "epoch", epochs)
        write_text(out / "config.json", json.dumps(settings, indent=2) + "\n")
    world.barrier()
    return done


def report(out: Path, epoch: int, values: dict[str, float], world: World) -> None:
    """What the held-out pairs say after an epoch."""
    if world.main:
        with open(out / "eval.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, **values}) + "\n")
        print(
            f"{out}: epoch {epoch}, held-out loss {values['loss']:.3f}, rewards margin {values['rewards_margin']:.3f}",
            file=sys.stderr,
        )


def learning_rate(step: int, steps: int, options: Options) -> float:
    """lr * (m + (1 - m) * (1 + cos(pi p)) / 2) with p = step / steps and m = lr_min_ratio."""
    return options.lr * (
        options.lr_min_ratio + (1 - options.lr_min_ratio) * (1 + math.cos(math.pi * step / steps)) / 2
    )


def check_finite(what: str, value: float, pairs: list[Pair], numbers: list[int]) -> None:
    """Raise InputError naming the rows of the file."""
    if not math.isfinite(value):
        rows = ", ".join(pairs[number].place for number in numbers)
        raise InputError(
            f"{what} is {value} (rows {rows}); lower --lr or mend these rows, then go on with --resume"
        )


def peak_memory(device: str) -> int:
    """The most bytes this process held: of the GPU's memory, else of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard: the package is not installed; pip install 'cfgsafe[tensorboard]'"
        ) from None
    return SummaryWriter(out / "tensorboard")
