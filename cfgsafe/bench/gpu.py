"""Everything that needs a GPU, in one command: correctness of the kernel, then every benchmark, into runs/gpu/*.csv. Under 8 minutes.

With --memory-gib 48 a larger GPU stands in for an A40.

Run it: python -m cfgsafe.bench.gpu
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cfgsafe.cli import run_single
from cfgsafe.errors import InputError
from cfgsafe.files import make_folder

COMMANDS = {
    "kernel": ["-m", "pytest", "tests/test_kernel.py", "-m", "slow or not slow"],
    "guidance": ["-m", "cfgsafe.bench", "guidance", "--device", "cuda"],
    "guidance-log": [
        "-m",
        "cfgsafe.bench",
        "guidance",
        "--device",
        "cuda",
        "--space",
        "log",
        "--temperature",
        "1",
    ],
    "decode": [
        "-m",
        "cfgsafe.bench",
        "decode",
        "--device",
        "cuda",
        "--shape",
        "8b",
        "--batches",
        "1",
        "8",
        "32",
        "--no-transformers",
        "--runs",
        "3",
    ],
    "orpo": [
        "-m",
        "cfgsafe.bench",
        "orpo",
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--shape",
        "8b",
        "--prompt",
        "1900",
        "--answer",
        "148",
    ],
}
ORPO_RECOMPUTED = 16  # blocks: the dense variant computes every prompt twice


@dataclass
class Options:
    """Run all that needs a GPU."""

    out: str = "runs/gpu"
    """Folder for the CSV files."""
    memory_gib: float | None = None
    """Share of the GPU to use in the 8B benchmarks, in GiB."""


def run(options: Options) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device is there; python -m cfgsafe.bench measures what a CPU can")
    out = make_folder(options.out)
    for name, command in COMMANDS.items():
        more = [] if name == "kernel" else ["--csv", str(out / f"{name}.csv")]
        if options.memory_gib and name in ("decode", "orpo"):
            more += ["--memory-gib", str(options.memory_gib)]
        if name == "orpo":
            more += ["--recompute", str(ORPO_RECOMPUTED), "--steps", "3"]
        started = time.time()
        done = subprocess.run([sys.executable, *command, *more], cwd=Path(__file__).parent.parent)
        print(
            f"{name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.time() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    run_single(Options, run, __doc__)
