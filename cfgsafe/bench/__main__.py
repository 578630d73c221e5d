"""Benchmarks: each prints a table and a JSON line, and adds rows to a CSV file.

    python -m cfgsafe.bench guidance    guided tokens from pairs of logits: the Triton kernel against PyTorch and torch.compile
    python -m cfgsafe.bench decode      guided decoding, from two passes to the engine, against transformers
    python -m cfgsafe.bench orpo        a training step: dense, chunked, chunked with shared prefixes; and TRL + PEFT where installed
    python -m cfgsafe.bench memory      what a training step of an 8B model takes, by formula

`python -m cfgsafe.bench NAME --help` lists a benchmark's options.
"""

from cfgsafe.bench import decode, memory, orpo
from cfgsafe.cli import run_subcommand
from cfgsafe.kernels import bench as guidance

BENCHES = {
    "guidance": (guidance.Options, guidance.run),
    "decode": (decode.Options, decode.run),
    "orpo": (orpo.Options, orpo.run),
    "memory": (memory.Options, memory.run),
}


def main() -> None:
    run_subcommand(BENCHES, __doc__)


if __name__ == "__main__":
    main()
