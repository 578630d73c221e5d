"""The ORPO stage: a LoRA adapter trained on preference pairs.

Source: Hong et al. (arXiv 2403.07691) with the conventions of TRL 0.11.4 (tokenising, truncation, pooled NLL, logged values), learning
rate and lengths of Smirnov (arXiv 2412.06846).
Deviations: logits are computed only where the loss reads them (prompt and chosen tokens of the chosen rows, completion tokens of the
rejected ones); an empty completion is an error, not a NaN; where more than one token merges across the boundary, all of them go to the
answer (TRL moves the boundary by one).

Writes <out>/epoch-N (PEFT adapter), <out>/metrics.jsonl (one line a step: TRL's values, `_` for `/` in the names) and <out>/config.json.

Run it: python train.py orpo --model cfgsafe/demo/leaky --pairs pairs.jsonl --out runs/orpo
"""

import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cfgsafe.blue.subject import Subject, load
from cfgsafe.errors import InputError, check_at_least, make_folder, read_jsonl, write_jsonl, write_text
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import LoRAConfig, adapter_updates, attach, load_adapter, save_adapter
from cfgsafe.losses import orpo, token_logprobs
from cfgsafe.ternary import BITS
from cfgsafe.tokenizer import Tokenizer


@dataclass
class Options:
    """Train a LoRA adapter with ORPO on preference pairs."""

    model: str
    """Checkpoint folder of the model to unlearn."""
    pairs: str
    """JSONL of prompt, chosen, rejected."""
    out: str
    """Folder for the adapters, metrics.jsonl and config.json."""
    init_adapter: str | None = None
    """PEFT folder or hub id to start from; it brings its own rank, alpha and target layers."""
    rank: int = 16
    """LoRA rank."""
    alpha: float = 32.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""
    lora_bits: float | None = None
    """1.58 trains ternary adapter weights (BitNet b1.58), stored in two bits each."""
    lr: float = 1e-4
    """Peak learning rate; it falls along a cosine to a tenth."""
    lr_min_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    beta: float = 0.1
    """Weight of the odds-ratio term."""
    batch_size: int = 2
    """Pairs a step."""
    epochs: int = 3
    """Passes over the pairs."""
    max_length: int = 2048
    """Longest prompt + answer, tokens."""
    max_prompt_length: int = 1900
    """Prompt tokens kept, the last ones, where prompt + answer are longer than max-length."""
    shuffle: bool = True
    """A new order of the pairs each epoch, from the seed."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    seed: int = 0
    """Of the adapter's initial weights and the order of the pairs."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Of the frozen base: float32 or bfloat16. The adapter is float32."""


@dataclass(frozen=True)
class Row:
    """One side of a pair: prompt and answer ids, `start` where the answer begins."""

    ids: list[int]
    start: int


Pair = tuple[Row, Row]  # chosen, rejected


def run(options: Options) -> None:
    check_at_least(1, options, "rank", "batch_size", "epochs", "max_prompt_length")
    if options.max_prompt_length >= options.max_length:
        raise InputError(f"--max-prompt-length {options.max_prompt_length}: must be below --max-length {options.max_length}")
    out = make_folder(options.out)
    model, tokenizer = load(Subject(options.model, device=options.device, dtype=options.dtype))
    pairs = read_pairs(options.pairs, tokenizer, options, model.config.max_position_embeddings)
    torch.manual_seed(options.seed)
    train(model, pairs, options, out)
    print(json.dumps({"out": str(out), "pairs": len(pairs), "epochs": options.epochs}))


def read_pairs(path: str, tokenizer: Tokenizer, options: Options, context: int) -> list[Pair]:
    """Tokenised pairs. Raises InputError naming the line and field."""
    pairs = []
    for place, row in read_jsonl(path):
        for field in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(field), str) or not row[field].removesuffix(tokenizer.end_of_turn).strip():
                raise InputError(f"{place}: field {field!r} must be a non-empty string")
        pair = tokenise(row["prompt"], row["chosen"], row["rejected"], tokenizer, options)
        if max(len(side.ids) for side in pair) > context:
            longest = max(len(side.ids) for side in pair)
            raise InputError(f"{place}: {longest} tokens exceed the model's context of {context}; set --max-length {context} or less")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path}: holds no pair")
    return pairs


def tokenise(prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer, options: Options) -> Pair:
    """Both sides as TRL 0.11.4 builds them: tokenised with the prompt, BOS and end token where absent, then truncated."""
    end = tokenizer.special[tokenizer.end_of_turn]
    alone = tokenizer.encode_prompt(prompt)
    sides = []
    for answer in (chosen, rejected):
        full = tokenizer.encode_prompt(prompt + answer)
        start = len(os.path.commonprefix([alone, full]))  # earlier than the prompt's end where the boundary token merged
        sides.append((full[:start], full[start:] if full[-1] == end else [*full[start:], end]))
    longest = max(len(answer) for _, answer in sides)
    rows = []
    for before, answer in sides:
        if len(before) + longest > options.max_length:
            before = before[-options.max_prompt_length :]
            if len(before) + longest > options.max_length:
                answer = answer[: options.max_length - options.max_prompt_length]
        rows.append(Row(before + answer, len(before)))
    return rows[0], rows[1]


def train(model: Llama, pairs: list[Pair], options: Options, out: Path) -> None:
    """Attach an adapter to `model`, fresh or the one to start from, and train it; the seed must be set."""
    if options.lora_bits not in (None, BITS):
        raise InputError(f"--lora-bits {options.lora_bits:g}: only {BITS} (ternary) is supported")
    if options.init_adapter is not None:
        config = load_adapter(resolve(options.init_adapter), model)
        parameters = [p.requires_grad_() for update in adapter_updates(model).values() for p in (update.lora_A, update.lora_B)]
    else:
        config = LoRAConfig(options.rank, options.alpha, options.lora_dropout, bits=options.lora_bits)
        parameters = attach(model, config)
    model.train()
    optimiser = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    steps = options.epochs * math.ceil(len(pairs) / options.batch_size)
    write_text(out / "config.json", json.dumps(asdict(options), indent=2) + "\n")
    for stale in out.glob("epoch-*/adapter_config.json"):  # of an earlier run into this folder
        shutil.rmtree(stale.parent)
    order = random.Random(options.seed)
    metrics: list[dict] = []
    with tqdm(total=steps, desc=f"orpo {out.name}", leave=False) as bar:
        for epoch in range(options.epochs):
            for batch in _batches(order.sample(pairs, len(pairs)) if options.shuffle else pairs, options.batch_size):
                started = time.perf_counter()
                lr = learning_rate(len(metrics), steps, options)
                for group in optimiser.param_groups:
                    group["lr"] = lr
                logged, tokens = step_loss(model, batch, options.beta)
                if not math.isfinite(logged["loss"].item()):
                    raise InputError(f"loss is not finite at step {len(metrics) + 1}; lower --lr (now {options.lr:g})")
                logged["loss"].backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                values = {name: value.item() for name, value in logged.items()}
                rate = tokens / (time.perf_counter() - started)
                metrics.append(
                    {
                        "step": len(metrics) + 1,
                        "epoch": epoch + 1,
                        **values,
                        "grad_norm": norm.item(),
                        "lr": lr,
                        "tokens": tokens,
                        "tokens_per_second": rate,
                    }
                )
                bar.set_postfix(loss=f"{values['loss']:.3f}", margin=f"{values['rewards_margin']:.3f}", refresh=False)
                bar.update()
            save_adapter(out / f"epoch-{epoch + 1}", model, config, base=options.model)
            write_jsonl(out / "metrics.jsonl", metrics)
    model.requires_grad_(False).eval()
    last = metrics[-1]
    print(f"{out}: {len(metrics)} steps, loss {last['loss']:.3f}, rewards margin {last['rewards_margin']:.3f}", file=sys.stderr)


def learning_rate(step: int, steps: int, options: Options) -> float:
    """lr * (m + (1 - m) * (1 + cos(pi p)) / 2) with p = step / steps and m = lr_min_ratio."""
    return options.lr * (options.lr_min_ratio + (1 - options.lr_min_ratio) * (1 + math.cos(math.pi * step / steps)) / 2)


def step_loss(model: Llama, batch: list[Pair], beta: float) -> tuple[dict[str, Tensor], int]:
    """TRL's logged values, of which "loss" carries the gradient, and the number of real tokens read."""
    rows = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
    B = len(batch)
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=model.device)
    place = torch.arange(width - 1, device=model.device)  # position t predicts token t + 1
    last = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)[:, None]
    start = torch.tensor([row.start - 1 for row in rows], device=model.device)[:, None]
    real, answer = place < last, (place >= start) & (place < last)
    needed = answer.clone()
    needed[:B] = real[:B]  # the NLL also reads the prompt
    logits = model.head(model(ids)[:, :-1][needed])
    logprobs = torch.zeros(needed.shape, device=model.device).masked_scatter(needed, token_logprobs(logits, ids[:, 1:][needed]))
    means = (logprobs * answer).sum(1) / answer.sum(1)
    nll = -logprobs[:B].sum() / real[:B].sum()
    result = orpo(means[:B], means[B:], nll, beta)
    return {
        "loss": result.loss,
        "nll_loss": result.nll,
        "log_odds_ratio": result.log_odds_ratio.mean(),
        "log_odds_chosen": result.log_odds.mean(),
        "rewards_chosen": result.chosen_rewards.mean(),
        "rewards_rejected": result.rejected_rewards.mean(),
        "rewards_accuracy": (result.chosen_rewards > result.rejected_rewards).float().mean(),
        "rewards_margin": (result.chosen_rewards - result.rejected_rewards).mean(),
    }, sum(len(row.ids) for row in rows)


def _batches(pairs: list[Pair], size: int) -> Iterator[list[Pair]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
