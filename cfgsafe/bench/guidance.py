"""The benchmark of the guidance kernel, kernels/bench.py, with the ranges and outputs of its options.

Deviation: kernels/ imports nothing of the rest, so these stand here and the defaults there.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

from dataclasses import dataclass

from cfgsafe.fields import Count, Guidance, Temperature
from cfgsafe.kernels import bench
from cfgsafe.outputs import OutputFile
from cfgsafe.subject import check_device


@dataclass
class Options(bench.Options):
    """Time guided tokens from pairs of logits."""

    pairs: tuple[Count, ...] = bench.Options.pairs
    vocabulary: Count = bench.Options.vocabulary
    temperature: Temperature = bench.Options.temperature
    guidance: Guidance = bench.Options.guidance
    calls: Count = bench.Options.calls
    sets: Count = bench.Options.sets
    csv: OutputFile | None = bench.Options.csv


def run(options: Options) -> None:
    check_device(options.device)
    bench.run(options)
