"""All that needs a GPU, in one command: the kernel's tests, all benchmarks, and a table of goals.

The tables go to runs/gpu/*.csv, the figures beside them. It is planned for less than 8 minutes, and
says how long it took. With --memory-gib 48 a larger GPU simulates an A40. FlashInfer and
transformers take part where they are installed.

Run it: python -m cfgsafe.bench gpu
"""

import importlib.util
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from cfgsafe.bench import goals
from cfgsafe.errors import InputError
from cfgsafe.fields import Positive
from cfgsafe.files import make_folder
from cfgsafe.kernels.table import show
from cfgsafe.outputs import Folder

ROOT = Path(__file__).parents[2]
MINUTES = 8  # that all may take
BENCH, PLOT = "cfgsafe.bench", ("guidance", "decode-8b", "decode-1b")
GUIDANCE = f"{BENCH} guidance --device cuda"
DECODE = f"{BENCH} decode --device cuda --prompt 128 --new 96 --runs 3"
# Name of the files -> arguments of `python -m`. torch.compile takes seconds for each case, so few
# have it. The dense variant of orpo computes every prompt twice: it fits with 16 blocks recomputed.
COMMANDS = {
    "kernel": "pytest tests/test_kernel.py tests/test_truncation.py tests/test_head.py -m 'slow or not slow'",
    "guidance": f"{GUIDANCE} --no-compiled --methods greedy sampled top-k top-p both mask"
    " --vocabularies 32000 49152 128256 151936 --pairs 1 2 4 8 16 32 64 128",
    "guidance-131072": f"{GUIDANCE} --methods sampled top-p both --vocabularies 131072 --pairs 128",
    "guidance-log": f"{GUIDANCE} --no-compiled --space log --methods greedy both --pairs 1 8 32 128",
    "decode-8b": f"{DECODE} --shape 8b --batches 1 8 32 --no-transformers",
    "decode-1b": f"{DECODE} --shape llama-3.2-1b --batches 1 8",
    "orpo": f"{BENCH} orpo --device cuda --dtype bfloat16 --shape 8b --recompute 16"
    " --prompt 1900 --answer 148 --steps 3",
}
LIMITED = ("decode-8b", "decode-1b", "orpo")  # those that take --memory-gib


@dataclass
class Options:
    """Run everything that needs a GPU, and compare the figures with the goals."""

    out: Annotated[str, Folder(writes=("*.csv", "*.png"))] = "runs/gpu"
    """Folder for the tables and figures."""
    memory_gib: Positive | None = None
    """Share of the GPU to use for decoding and training, in GiB."""


def run(options: Options) -> None:
    if not torch.cuda.is_available():
        raise InputError("no CUDA device is there; the other benchmarks measure what a CPU can")
    out = make_folder(options.out).absolute()
    started = time.time()
    failed = run_commands(out, options.memory_gib)
    print(f"all: {time.time() - started:.0f} s, of {60 * MINUTES} planned")
    show(goals.compare(out), goals.COLUMNS, "cuda", str(out / "goals.csv"))
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def run_commands(out: Path, memory_gib: float | None) -> list[str]:
    """Run all commands; returns the names of those that failed."""
    for name in (*COMMANDS, "goals"):  # or a command that fails would leave those of an earlier run
        for suffix in ("csv", "csv.png"):
            (out / f"{name}.{suffix}").unlink(missing_ok=True)
    failed = []
    for name in COMMANDS:
        started = time.time()
        command = [sys.executable, "-m", *arguments(name, out, memory_gib)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
        outcome = "FAILED" if name in failed else "done"
        print(f"{name}: {outcome} in {time.time() - started:.0f} s", flush=True)
    return failed


def arguments(name: str, out: Path, memory_gib: float | None) -> list[str]:
    """What follows `python -m` in a command."""
    words = shlex.split(COMMANDS[name])
    if words[0] == BENCH:
        words += ["--csv", str(out / f"{name}.csv")]
    if name in PLOT:
        words.append("--plot")
    if name in LIMITED and memory_gib:
        words += ["--memory-gib", str(memory_gib)]
    if name == "decode-1b" and importlib.util.find_spec("transformers") is None:
        words.append("--no-transformers")
    return words
