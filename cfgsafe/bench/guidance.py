"""The benchmark of the guidance kernel, kernels/bench.py, with the ranges and outputs of its options.

Deviation: kernels/ imports nothing of the rest, so these and the figure stand here, the defaults there.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

from dataclasses import dataclass
from pathlib import Path

from cfgsafe.bench import plots
from cfgsafe.fields import Count, Guidance
from cfgsafe.kernels import bench
from cfgsafe.outputs import OutputFile
from cfgsafe.subject import check_device


@dataclass
class Options(bench.Options):
    """Time guided tokens from pairs of logits."""

    vocabularies: tuple[Count, ...] = bench.Options.vocabularies
    pairs: tuple[Count, ...] = bench.Options.pairs
    guidance: Guidance = bench.Options.guidance
    calls: Count = bench.Options.calls
    csv: OutputFile | None = bench.Options.csv
    plot: OutputFile | None = None
    """PNG file for a figure: time against pairs with the bound, and GB/s against the vocabulary."""


def run(options: Options) -> None:
    check_device(options.device)
    rows = bench.run(options)
    if options.plot:
        plots.guided_tokens(Path(options.plot), rows)
