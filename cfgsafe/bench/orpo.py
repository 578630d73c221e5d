"""A training step of ours against TRL + PEFT: seconds, real tokens a second, peak memory above the model's own.

Every variant runs in a process of its own, on the same checkpoint (random weights, made here) and the same rows, for the same steps;
the losses of the first step stand in the table, so that it shows whether they computed the same thing. TRL 0.11.4 needs an environment
of its own:

    python3 -m venv trl && trl/bin/pip install "torch==2.13.*" trl==0.11.4 transformers==4.45.2 peft==0.13.2 "accelerate<1.1" \\
        "datasets<4" "numpy<2.3" rich

Run it: python -m cfgsafe.bench orpo --trl trl/bin/python
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from cfgsafe.bench.shapes import SHAPES, base_parameters, random_model
from cfgsafe.checkpoint import DTYPES, save_checkpoint
from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl, write_jsonl
from cfgsafe.hub import BASE, PROMPTS
from cfgsafe.kernels.results import show, spread
from cfgsafe.llama import LlamaConfig
from cfgsafe.tokenizer import Tokenizer

OURS = ("dense", "chunked", "chunked + shared")


@dataclass
class Options:
    """A training step of ours and of TRL + PEFT, on random weights."""

    trl: str | None = None
    """Python of an environment with TRL 0.11.4."""
    shape: Literal["tiny", "small", "8b"] = "small"
    """tiny (2 layers of width 64), small (8 of width 512, 128,256 words) or 8b (Llama-3.1-8B)."""
    pairs: int = 2
    """Pairs a step."""
    prompt: int = 621
    """Tokens of each prompt."""
    answer: int = 47
    """Tokens of each answer."""
    rank: int = 16
    """LoRA rank."""
    steps: int = 5
    """Steps to time, after one that is not."""
    recompute: int = 0
    """Blocks to recompute."""
    memory_gib: float | None = None
    """Share of the GPU to use, in GiB."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Of the base: float32 or bfloat16."""
    csv: str | None = None
    """File to add the rows to."""


def run(options: Options) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = make_inputs(Path(folder), options)
        variants = [(name, sys.executable, "cfgsafe.bench.orpo_step") for name in OURS]
        if options.trl:
            variants.append(("TRL + PEFT", str(Path(options.trl).absolute()), "cfgsafe.bench.trl_step"))
        for name, python, module in tqdm(variants, leave=False):
            settings = json.dumps({**asdict(options), "folder": folder, "variant": name})
            root = Path(__file__).parent.parent
            done = subprocess.run([python, "-m", module, settings], cwd=root, capture_output=True, text=True)
            if done.returncode:  # out of memory, say: the others are still worth measuring
                print(f"{name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
                continue
            rows.append({"variant": name, **row(json.loads(done.stdout.splitlines()[-1]), config, options)})
    if not rows:
        raise InputError("no variant ran to its end")
    slowest = rows[-1]
    for line in rows:
        line["time_ratio"] = line["p50"] / slowest["p50"]
        line["memory_ratio"] = line["peak_gib"] / slowest["peak_gib"]
    columns = {
        "variant": "{variant}",
        "s/step p20": "{p20:.3f}",
        "p50": "{p50:.3f}",
        "p80": "{p80:.3f}",
        "real tokens/s": "{tokens_per_second:.0f}",
    }
    columns |= {
        "TFLOP/s": "{tflops:.2f}",
        "of matmul": "{share:.0%}",
        "GiB above model": "{peak_gib:.2f}",
        "first loss": "{loss:.5f}",
    }
    columns |= {f"time / {slowest['variant']}": "{time_ratio:.2f}", "memory /": "{memory_ratio:.2f}"}
    show(rows, columns, options.device, options.csv)


def row(result: dict, config: LlamaConfig, options: Options) -> dict:
    """The row of a variant from what its process measured."""
    times = spread(result["seconds"])
    tflops = step_flops(config, options) / times["p50"] / 1e12
    tokens = options.pairs * 2 * (options.prompt + options.answer)
    rate = {"tokens_per_second": tokens / times["p50"], "tflops": tflops, "share": tflops / result["ceiling"]}
    return times | rate | {"peak_gib": result["peak_bytes"] / 2**30, "loss": result["loss"]}


def step_flops(config: LlamaConfig, options: Options) -> float:
    """Floating-point operations a step cannot do without: each prompt once through the linear layers, forward and the gradient to the
    inputs; attention and adapters left out."""
    head = config.vocab_size * config.hidden_size
    blocks = base_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
    tokens = options.pairs * (options.prompt + 2 * options.answer)
    return 4 * (blocks * tokens + head * options.pairs * (options.prompt - 1 + 2 * options.answer))


def make_inputs(folder: Path, options: Options) -> LlamaConfig:
    """Write a checkpoint of random weights with the demo's tokenizer, and pairs.jsonl whose texts are longer than what is read of them."""
    config = SHAPES[options.shape]
    model = random_model(config, DTYPES[options.dtype], options.device)
    save_checkpoint(folder / "model", model, tokenizer_from=BASE, dtype=DTYPES[options.dtype])
    tokenizer = Tokenizer.load(BASE)
    texts = cycle(
        " ".join(message["content"] for message in row["messages"]) for _, row in read_jsonl(PROMPTS)
    )

    def text(tokens: int) -> str:
        words = ""
        while len(tokenizer.encode(words)) < tokens + 8:
            words += " " + next(texts)
        return words

    count = options.pairs * (options.steps + 1)
    sides = [
        {"prompt": text(options.prompt), "chosen": text(options.answer), "rejected": text(options.answer)}
        for _ in range(count)
    ]
    write_jsonl(folder / "pairs.jsonl", sides)
    return config
