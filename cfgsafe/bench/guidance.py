"""The benchmark of the guidance kernel, kernels/bench.py, with the ranges of its options.

Deviation: kernels/ imports nothing of the rest, so these and the figure stand here.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

from dataclasses import dataclass

from cfgsafe.bench import plots
from cfgsafe.bench.plots import TableFile
from cfgsafe.errors import Unused
from cfgsafe.fields import Count, Guidance
from cfgsafe.kernels import bench
from cfgsafe.subject import check_device


@dataclass
class Options(bench.Options):
    """Time guided tokens from pairs of logits."""

    vocabularies: tuple[Count, ...] = bench.Options.vocabularies
    pairs: tuple[Count, ...] = bench.Options.pairs
    guidance: Guidance = bench.Options.guidance
    calls: Count = bench.Options.calls
    csv: TableFile | None = bench.Options.csv
    plot: bool = False
    """Draw time against pairs, and GB/s against the vocabulary: a PNG beside the CSV file."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.csv is None:
            yield "without --csv", "plot"


def run(options: Options) -> None:
    check_device(options.device)
    rows = bench.run(options)
    if options.plot and options.csv:
        plots.guided_tokens(plots.beside(options.csv), rows)
