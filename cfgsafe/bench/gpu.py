"""Everything that needs a GPU, in one command: tests of the kernel, then all benchmarks. Under 8 minutes.

The rows go to runs/gpu/*.csv. With --memory-gib 48 a larger GPU simulates an A40.

Run it: python -m cfgsafe.bench.gpu
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cfgsafe.cli import run_single
from cfgsafe.errors import InputError
from cfgsafe.fields import Positive
from cfgsafe.files import make_folder
from cfgsafe.outputs import Folder

ROOT = Path(__file__).parents[2]
# The dense variant of orpo computes every prompt twice, so it fits only with 16 blocks recomputed.
COMMANDS = {
    "kernel": "pytest tests/test_kernel.py tests/test_truncation.py -m 'slow or not slow'",
    "guidance": "cfgsafe.bench guidance --device cuda",
    "guidance-top-p": "cfgsafe.bench guidance --device cuda --temperature 1 --top-p 0.9",
    "guidance-top-k-top-p": "cfgsafe.bench guidance --device cuda --temperature 1 --top-k 50 --top-p 0.9",
    "guidance-log": "cfgsafe.bench guidance --device cuda --space log --temperature 1",
    "decode": "cfgsafe.bench decode --device cuda --shape 8b --batches 1 8 32 --no-transformers --runs 3",
    "orpo": "cfgsafe.bench orpo --device cuda --dtype bfloat16 --shape 8b --prompt 1900 --answer 148"
    " --recompute 16 --steps 3",
}


@dataclass
class Options:
    """Run everything that needs a GPU."""

    out: Annotated[str, Folder()] = "runs/gpu"
    """Folder for the CSV files."""
    memory_gib: Positive | None = None
    """Share of the GPU to use in the 8B benchmarks, in GiB."""


def run(options: Options) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device is there; python -m cfgsafe.bench measures what a CPU can")
    out = make_folder(options.out).absolute()
    for name, command in COMMANDS.items():
        arguments = shlex.split(command)
        if name != "kernel":
            arguments += ["--csv", str(out / f"{name}.csv")]
        if options.memory_gib and name in ("decode", "orpo"):
            arguments += ["--memory-gib", str(options.memory_gib)]
        started = time.time()
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT)
        outcome = "FAILED" if done.returncode else "done"
        print(f"{name}: {outcome} in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run_single(Options, run, __doc__)
