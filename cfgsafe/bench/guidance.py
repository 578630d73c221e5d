"""The benchmark of the guidance kernel, kernels/bench.py, with the ranges and outputs of its options.

Deviation: kernels/ imports nothing of the rest, so these stand here and the defaults there.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

from dataclasses import dataclass

from cfgsafe.errors import Unused
from cfgsafe.fields import Count, Guidance, Share, Temperature, Whole
from cfgsafe.kernels import bench
from cfgsafe.outputs import OutputFile
from cfgsafe.subject import check_device


@dataclass
class Options(bench.Options):
    """Time guided tokens from pairs of logits."""

    pairs: tuple[Count, ...] = bench.Options.pairs
    vocabulary: Count = bench.Options.vocabulary
    temperature: Temperature = bench.Options.temperature
    top_k: Whole = bench.Options.top_k
    top_p: Share = bench.Options.top_p
    guidance: Guidance = bench.Options.guidance
    calls: Count = bench.Options.calls
    sets: Count = bench.Options.sets
    csv: OutputFile | None = bench.Options.csv

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.temperature == 0:
            yield "on greedy tokens, without --temperature", "top_k", "top_p"


def run(options: Options) -> None:
    check_device(options.device)
    bench.run(options)
