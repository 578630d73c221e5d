"""Benchmarks: each prints a table and a JSON line, and adds rows to a CSV file.

    python -m kernels.bench guidance    guided tokens from pairs of logits: the Triton kernel against PyTorch and torch.compile
    python -m kernels.bench decode      guided decoding, from two passes to the engine, against transformers
    python -m kernels.bench orpo        a training step: dense, chunked, chunked with shared prefixes; and TRL + PEFT where installed
    python -m kernels.bench memory      what a training step of an 8B model takes, by formula

`python -m kernels.bench NAME --help` lists a benchmark's options.
"""

import tyro

from cfgsafe.errors import run_command
from kernels import bench_decode, bench_guidance, bench_memory, bench_orpo

BENCHES = {
    "guidance": (bench_guidance.Options, bench_guidance.run),
    "decode": (bench_decode.Options, bench_decode.run),
    "orpo": (bench_orpo.Options, bench_orpo.run),
    "memory": (bench_memory.Options, bench_memory.run),
}


def main() -> None:
    options = tyro.extras.subcommand_cli_from_dict({name: bench for name, (bench, _) in BENCHES.items()}, description=__doc__)
    bench_run = dict(BENCHES.values())[type(options)]
    run_command(lambda: bench_run(options))


if __name__ == "__main__":
    main()
