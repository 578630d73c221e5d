"""Makes the demo's models and sets from a seed: tokenizer, base, leaky model, NER, files of data/.

The architecture is that of Llama-3.1, with grouped-query attention, llama3 RoPE scaling and a tied
head, at 2.9M parameters. Training: AdamW (0.9, 0.95), linear warm-up, cosine to a tenth, bf16
autocast; a batch has rows of similar length. The base first learns from the answers alone, because
copying is learnt fastest that way, and then from whole chats. ORPO's NLL includes the prompt, and if
the model had never learnt to predict what users write, ORPO would use the adapter for that. The leaky
model is the base, fine-tuned on whole chats.

Run it: python train.py demo-models --out runs/demo-models      (times and loss curve: cfgsafe/demo/README.md)
"""

import itertools
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from cfgsafe.checkpoint import read_model, save_checkpoint
from cfgsafe.demo import ner_training, testset
from cfgsafe.demo.corpus import Corpus, Encoder, Example
from cfgsafe.fields import Count, Rate, Seed, check_ranges
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.folders import new_folder
from cfgsafe.llama import Llama, LlamaConfig
from cfgsafe.outputs import Folder
from cfgsafe.progress import progress
from cfgsafe.report.figures import save_figure, subplots
from cfgsafe.tokenizer import LLAMA31_TEMPLATE, Tokenizer

# Llama-3.1's control tokens, in the order of their ids.
# fmt: off
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)
# Llama-3's pre-tokenizer.
SPLIT = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",  # words with one leading mark
    r"\p{N}{1,3}",  # up to three digits
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
    r"\s*[\r\n]+|\s+(?!\S)|\s+",  # line ends, blanks
))
# fmt: on
Row = tuple[list[int], list[bool]]  # token ids, and for each whether it is learnt
VOCABULARY = 2048
CONTEXT = 1024


@dataclass
class Options:
    """Rebuild the demo's tokenizer, base model, leaky model, NER and sets from the seed."""

    out: Annotated[str, Folder()] = "runs/demo-models"
    """Folder for `base`, `leaky`, `ner`, `data` and the loss curve."""
    seed: Seed = 0
    """Seed of data, initial weights and order."""
    base_steps: Count = 2400
    """Steps of the base model with a loss on the answers."""
    whole_steps: Count = 400
    """Steps after those, with a loss on users' messages as well."""
    leaky_examples: Count = 12000
    """Size of the leaky model's training set."""
    leaky_epochs: Count = 3
    """Times that the leaky model sees its training set, each time in a new order."""
    batch: Count = 64
    """Rows per step."""
    base_lr: Rate = 2e-3
    """Peak learning rate of the base model."""
    whole_lr: Rate = 1e-3
    """Peak learning rate of the steps with a loss on users' messages."""
    leaky_lr: Rate = 8e-4
    """Peak learning rate of the leaky model."""
    compile: bool = True
    """Compile the training step, which makes it about 1.5 times as fast on a CPU."""


def run(options: Options) -> None:
    check_ranges(options)
    out = make_folder(options.out)
    started = time.time()
    torch.manual_seed(options.seed)
    corpus = Corpus(options.seed)
    with new_folder(out / "tokenizer") as folder:
        train_tokenizer(itertools.islice(corpus.base(), 20000), folder)
    tokenizer = Tokenizer.load(out / "tokenizer")
    encode = Encoder(tokenizer)
    model = Llama(config_for(tokenizer))
    initialise(model)

    curve: list[dict] = []
    rows = itertools.islice(map(encode, corpus.base()), options.base_steps * options.batch)
    stage = Stage("base, answers", options.base_steps, options.base_lr)
    fit(model, rows, stage, options, curve, out)
    save_checkpoint(out / "base", model, tokenizer_from=out / "tokenizer", dtype=torch.bfloat16)

    finish(options, out, curve)
    replaced = ("config.cfg", "meta.json", "tokenizer", "ner", "vocab")
    with new_folder(out / "ner", replaces=replaced) as folder:
        ner_training.train(folder, options.seed)
    testset.write_default_sets(out / "data")
    draw(curve, out / "curve.png")
    minutes = (time.time() - started) / 60
    print(f"{out}: base, leaky, ner and data in {minutes:.1f} minutes")
    print(f"now `python eval.py demo-models --folder {out}`")


@dataclass(frozen=True)
class Stage:
    """A stage of training: its name in the loss curve, its steps, and its peak learning rate."""

    name: str
    steps: int
    lr: float


def finish(options: Options, out: Path, curve: list[dict]) -> None:
    """The stages that start from a checkpoint on disk, with the rounded weights that users have."""
    encode = Encoder(Tokenizer.load(out / "base"), whole=True)

    def train_from_base(name: str, examples: Iterable[Example], steps: int, lr: float) -> None:
        torch.manual_seed(options.seed)
        model = read_model(out / "base").requires_grad_(True)
        stage = Stage(f"{name}, whole chats", steps, lr)
        fit(model, map(encode, examples), stage, options, curve, out)
        save_checkpoint(out / name, model, tokenizer_from=out / "tokenizer", dtype=torch.bfloat16)

    chats = itertools.islice(Corpus(options.seed + 2).base(), options.whole_steps * options.batch)
    train_from_base("base", chats, options.whole_steps, options.whole_lr)
    leaks = Corpus(options.seed + 1).leaky(options.leaky_examples)
    seen = in_new_orders(leaks, options.leaky_epochs, options.seed)
    train_from_base("leaky", seen, len(seen) // options.batch, options.leaky_lr)


def in_new_orders(examples: list[Example], epochs: int, seed: int) -> list[Example]:
    """The examples `epochs` times, each time shuffled anew."""
    rng = random.Random(f"leaky/{seed}")
    seen = []
    for _ in range(epochs):
        seen += rng.sample(examples, len(examples))
    return seen


def config_for(tokenizer: Tokenizer) -> LlamaConfig:
    """2.9M parameters at the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.special["<|begin_of_text|>"],
        eos_token_id=tokenizer.special["<|eot_id|>"],
    )


def initialise(model: Llama) -> None:
    """Normal(0, 0.02), divided by sqrt(2 * layers) for projections into the residual stream (GPT-2)."""
    narrow = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=narrow if into_residual else 0.02)


def train_tokenizer(examples: Iterator[Example], folder: Path) -> None:
    """Byte-level BPE with Llama-3's pre-tokenizer, written as `transformers` reads it."""
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    header = "system\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nassistant user"
    backend.train_from_iterator(itertools.chain([header] * 2000, texts_of(examples)), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(LLAMA31_TEMPLATE)


def texts_of(examples: Iterable[Example]) -> Iterator[str]:
    """The texts of all pieces."""
    for example in examples:
        for _, pieces in example:
            for text, _ in pieces:
                yield text


def fit(
    model: Llama, rows: Iterator[Row], stage: Stage, options: Options, curve: list[dict], out: Path
) -> None:
    """Train on `rows`; appends to `curve`, and keeps curve.jsonl in `out` up to date."""
    decay = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=True)
    compute = torch.compile(answer_loss, dynamic=True) if options.compile else answer_loss
    model.train()
    tokens, started, running = 0, time.time(), None
    bar = progress(batches(rows, options.batch), total=stage.steps, desc=stage.name)
    for step, (ids, targets) in enumerate(bar):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        learnt = (targets.view(-1) >= 0).nonzero().squeeze(1)
        loss = compute(model, ids, learnt, targets.view(-1)[learnt])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens += ids.numel()
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            point = {"stage": stage.name, "step": step + 1, "loss": round(running, 4), "tokens": tokens}
            curve.append(point | {"seconds": round(time.time() - started, 1)})
            write_jsonl(out / "curve.jsonl", curve)
    model.eval()


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over the first 2 % of the steps, times a cosine that falls to a tenth."""
    warm = min(1.0, (step + 1) / (0.02 * stage.steps + 1))
    return stage.lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * (step / stage.steps))))


def draw(curve: list[dict], path: Path) -> None:
    """The loss of each stage against the tokens read."""
    fig, axes = subplots(figsize=(7, 4))
    for stage in dict.fromkeys(row["stage"] for row in curve):
        points = [row for row in curve if row["stage"] == stage]
        millions = [row["tokens"] / 1e6 for row in points]
        axes.plot(millions, [row["loss"] for row in points], label=stage)
    axes.set(xlabel="million tokens", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(fig, path)


def answer_loss(model: Llama, ids: Tensor, learnt: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy at the flat positions `learnt` of ids (B, T) against `targets`."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model(ids).flatten(0, 1)[learnt]
        logits = model.head(hidden)
    return F.cross_entropy(logits.float(), targets)


def batches(rows: Iterator[Row], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, targets), each (B, T), in random order; the rows of a batch have similar lengths."""
    while chunk := list(itertools.islice(rows, 16 * size)):
        chunk.sort(key=lambda row: len(row[0]))
        groups = [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for number in torch.randperm(len(groups)).tolist():
            yield padded(groups[number])


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """(ids, targets), each (B, T), where T is a multiple of 32; a target of -1 has no loss."""
    width = -(-max(len(ids) for ids, _ in rows) // 32) * 32
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -1)
    for number, (row, learn) in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        nexts = [token if learnt else -1 for token, learnt in zip(row[1:], learn[1:], strict=True)]
        targets[number, : len(row) - 1] = torch.tensor(nexts)
    return ids, targets
