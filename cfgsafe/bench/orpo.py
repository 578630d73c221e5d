"""Our training step and that of TRL + PEFT: seconds, real tokens per second, peak memory above the model's.

Every variant runs in a process of its own, on the same checkpoint of random weights and the same rows,
for the same number of steps. The table has the losses of the first step, which shows whether all
variants computed the same. TRL 0.11.4 needs an environment of its own:

    python3 -m venv trl
    trl/bin/pip install "torch==2.13.*" trl==0.11.4 transformers==4.45.2 peft==0.13.2 \\
        "accelerate<1.1" "datasets<4" "numpy<2.3" rich

Run it: python -m cfgsafe.bench orpo --trl trl/bin/python
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

from cfgsafe.bench.shapes import ORPO_SHAPES, base_parameters, random_model
from cfgsafe.checkpoint import DTYPES, save_checkpoint
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Positive, Whole
from cfgsafe.files import read_jsonl, write_jsonl
from cfgsafe.hub import BASE, PROMPTS
from cfgsafe.kernels.table import show, spread, spread_columns
from cfgsafe.llama import LlamaConfig
from cfgsafe.outputs import InputPath, OutputFile
from cfgsafe.progress import progress
from cfgsafe.subject import check_device
from cfgsafe.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SHARED = "chunked + shared"
OURS = ("dense", "chunked", SHARED)


@dataclass
class Options:
    """Time our training step and that of TRL + PEFT, on random weights."""

    trl: InputPath | None = None
    """Path of the Python of an environment with TRL 0.11.4; without it only our variants run."""
    shape: Literal["tiny", "small", "8b"] = "small"
    """tiny (2 layers of width 64), small (8 of width 512, 128,256 words) or 8b (Llama-3.1-8B)."""
    pairs: Count = 2
    """Pairs in a step."""
    prompt: Count = 621
    """Tokens of each prompt."""
    answer: Count = 47
    """Tokens of each answer."""
    rank: Count = 16
    """LoRA rank."""
    steps: Count = 5
    """Steps to time, after one that is not timed."""
    recompute: Whole = 0
    """Number of blocks whose activations the backward recomputes."""
    memory_gib: Positive | None = None
    """Share of the GPU to use, in GiB."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the base model: float32 or bfloat16."""
    csv: OutputFile | None = None
    """CSV file to append the rows to."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if not self.device.startswith("cuda"):
            yield "on a CPU", "memory_gib"


def run(options: Options) -> None:
    check_device(options.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = make_inputs(Path(folder), options)
        variants = [(name, sys.executable, "cfgsafe.bench.orpo_step") for name in OURS]
        if options.trl:
            python = str(Path(options.trl).absolute())
            variants.append(("TRL + PEFT", python, "cfgsafe.bench.trl_step"))
        for name, python, module in progress(variants, desc="variants"):
            settings = json.dumps({**asdict(options), "folder": folder, "variant": name})
            command = [python, "-m", module, settings]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:  # out of memory, for example: the others are still worth measuring
                print(f"{name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            rows.append({"variant": name, **row(figures, config, options)})
    if not rows:
        raise InputError("no variant ran to its end")
    last = rows[-1]
    for line in rows:
        line["time_ratio"] = line["p50"] / last["p50"]
        line["memory_ratio"] = line["peak_gib"] / last["peak_gib"]
    columns = {"variant": "{variant}", **spread_columns("s/step", 3)}
    columns |= {"real tokens/s": "{tokens_per_second:.0f}", "TFLOP/s": "{tflops:.2f}"}
    columns |= {
        "of matmul": "{share:.0%}",
        "GiB above model": "{peak_gib:.2f}",
        "with it": "{total_gib:.2f}",
        "first loss": "{loss:.5f}",
    }
    columns |= {f"time / {last['variant']}": "{time_ratio:.2f}", "memory /": "{memory_ratio:.2f}"}
    show(rows, columns, options.device, options.csv)


def row(figures: dict, config: LlamaConfig, options: Options) -> dict:
    """The row of a variant from the figures that its process printed."""
    times = spread(figures["seconds"])
    tokens = options.pairs * 2 * (options.prompt + options.answer)
    tflops = step_flops(config, options) / times["p50"] / 1e12
    model_gib = base_parameters(config) * DTYPES[options.dtype].itemsize / 2**30
    peak_gib = figures["peak_bytes"] / 2**30
    return {
        **times,
        "tokens_per_second": tokens / times["p50"],
        "tflops": tflops,
        "share": tflops / figures["ceiling"],
        "peak_gib": peak_gib,
        "total_gib": model_gib + peak_gib,
        "loss": figures["loss"],
    }


def step_flops(config: LlamaConfig, options: Options) -> float:
    """Floating-point operations that no step can do without.

    That is each prompt once through the linear layers, in the forward and in the backward to the inputs;
    attention and adapters are left out.
    """
    head = config.vocab_size * config.hidden_size
    blocks = base_parameters(config) - head * (1 if config.tie_word_embeddings else 2)
    tokens = options.pairs * (options.prompt + 2 * options.answer)
    reads = options.pairs * (options.prompt - 1 + 2 * options.answer)
    return 4 * (blocks * tokens + head * reads)


def make_inputs(folder: Path, options: Options) -> LlamaConfig:
    """Write a checkpoint of random weights with the demo's tokenizer, and pairs.jsonl.

    The texts of the pairs are longer than what a step reads of them.
    """
    config, dtype = ORPO_SHAPES[options.shape], DTYPES[options.dtype]
    model = random_model(config, dtype, options.device)
    save_checkpoint(folder / "model", model, tokenizer_from=BASE, dtype=dtype)
    tokenizer, texts = Tokenizer.load(BASE), cycle(_prompts())

    def text(tokens: int) -> str:
        words = ""
        while len(tokenizer.encode(words)) < tokens + 8:
            words += " " + next(texts)
        return words

    pairs = []
    for _ in range(options.pairs * (options.steps + 1)):
        prompt, chosen, rejected = text(options.prompt), text(options.answer), text(options.answer)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(folder / "pairs.jsonl", pairs)
    return config


def _prompts() -> Iterator[str]:
    """The texts of the demo's prompts."""
    for _, row in read_jsonl(PROMPTS):
        yield " ".join(message["content"] for message in row["messages"])
