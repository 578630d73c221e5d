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
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from cfgsafe.blue import batches, loop, memory, origin
from cfgsafe.blue.batches import Pair
from cfgsafe.blue.earlier import replacing
from cfgsafe.blue.loop import Run, values_in_words
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
from cfgsafe.subject import Subject, load
from cfgsafe.ternary import BITS

SHOWN = ("loss", "rewards_margin")  # beside the progress bar


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
    steps = batches.plan([pair.tokens for pair in pairs], options)
    held = contents(options, folders=("model", "init_adapter"), files=("pairs", "eval_pairs"))
    reference = reference_logprobs(net, model, pairs, options, world)
    held_out_reference = reference_logprobs(net, model, held_out, options, world)

    def loss(numbers: list[int]) -> tuple[Tensor, Tensor]:
        before = None if reference is None else reference[:, numbers]
        return batch_loss(net, model, [pairs[number] for number in numbers], options, before, world)

    def end_epoch(epoch: int) -> None:
        weights = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
        if world.main:
            write_adapter(out / f"epoch-{epoch}", weights, config, base=options.model)
        if held_out:
            found = evaluate(net, model, held_out, options, held_out_reference, world)
            if world.main:
                report(out, epoch, found)

    optimiser = loop.adam(parameters, options.lr)
    this = Run(options, world, parameters, optimiser, pairs, loss, LOGGED, SHOWN, held["pairs"])
    settings = settings_of(options, config)
    done = loop.begin(this, settings, origin.record(options), held, FREE, out, steps)
    writer = loop.tensorboard(out) if options.tensorboard and world.main else None
    loop.go(this, steps, done, out, f"{options.objective} {out.name}", end_epoch, writer)
    model.requires_grad_(False).eval()


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


def report(out: Path, epoch: int, values: dict[str, float]) -> None:
    """Write the values of the held-out pairs after an epoch."""
    with Log(out / "eval.jsonl") as log:
        log.add({"epoch": epoch, **values})
    print(f"{out}: epoch {epoch}, held-out {values_in_words(values, SHOWN)}", file=sys.stderr)
