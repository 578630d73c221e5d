"""Benchmarks: each prints a table and a JSON line, and can append rows to a CSV file.

    python -m cfgsafe.bench guidance    guided tokens from pairs of logits: kernel and others
    python -m cfgsafe.bench decode      guided decoding, from two passes to the engine, and transformers
    python -m cfgsafe.bench orpo        a training step: dense, chunked, shared prefixes; TRL + PEFT
    python -m cfgsafe.bench memory      what a training step of an 8B model takes, by formula
    python -m cfgsafe.bench gpu         all that needs a GPU, and a table of goals

`python -m cfgsafe.bench NAME --help` lists the options of a benchmark.
"""

from cfgsafe.bench import decode, gpu, guidance, memory, orpo
from cfgsafe.cli import Commands, run_subcommand

BENCHES: Commands = {
    "guidance": (guidance.Options, guidance.run),
    "decode": (decode.Options, decode.run),
    "orpo": (orpo.Options, orpo.run),
    "memory": (memory.Options, memory.run),
    "gpu": (gpu.Options, gpu.run),
}


def main() -> None:
    run_subcommand(BENCHES, __doc__)


if __name__ == "__main__":
    main()
