"""The guidance kernel against eager PyTorch, torch.compile and transformers' processor: time a call, bytes a second, share of a copy.

Every variant turns B pairs of logits into B guided tokens. `copy` is the ceiling, measured in the same run: a device-to-device copy of as
many bytes as the kernel must read. Calls are timed one by one, on a GPU with events and inside a CUDA graph where the variant allows it;
inputs rotate among sets that together exceed the cache. On a CPU there is no kernel: the reference stands in its place.

Run it: python -m cfgsafe.bench guidance --device cuda      (or python -m cfgsafe.kernels.bench)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from . import reference
from .reference import Sampling
from .results import show, spread


@dataclass
class Options:
    """Guided tokens from pairs of logits."""

    pairs: tuple[int, ...] = (1, 8, 32, 64)
    """Pairs a call."""
    vocabulary: int = 128256
    """Words."""
    space: str = "prob"
    """prob or log."""
    temperature: float = 0.0
    """0 is greedy."""
    guidance: float = 3.0
    """g."""
    calls: int = 50
    """Calls to time."""
    sets: int = 4
    """Sets of inputs to rotate among."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the logits."""
    csv: str | None = None
    """File to add the rows to."""


def run(options: Options) -> None:
    rows = []
    for pairs in tqdm(options.pairs, leave=False):
        torch.manual_seed(0)
        dtype, shape = getattr(torch, options.dtype), (2 * pairs, options.vocabulary)
        sets = [(3 * torch.randn(shape, device=options.device)).to(dtype) for _ in range(options.sets)]
        size = sets[0].numel() * sets[0].element_size()
        times = {name: time_calls(call, sets, options) for name, call in variants(pairs, options).items()}
        ceiling = spread(times["copy"])["p50"]
        for name, seconds in times.items():
            row = {
                "pairs": pairs,
                "variant": name,
                **{key: 1e6 * value for key, value in spread(seconds).items()},
            }
            moved = 2 * size if name == "copy" else size  # a copy also writes
            row["gb_per_second"] = moved / row["p50"] / 1e3
            row["share_of_copy"] = row["gb_per_second"] / (2 * size / ceiling / 1e9)
            rows.append(row)
    columns = {
        "pairs": "{pairs}",
        "variant": "{variant}",
        "us p20": "{p20:.1f}",
        "p50": "{p50:.1f}",
        "p80": "{p80:.1f}",
    }
    show(
        rows,
        columns | {"GB/s": "{gb_per_second:.1f}", "of copy": "{share_of_copy:.0%}"},
        options.device,
        options.csv,
    )


def variants(pairs: int, options: Options) -> dict[str, Callable[[torch.Tensor], object]]:
    """Name -> what is timed, from logits (2 B, V), the positive rows first."""
    full = lambda value, dtype=torch.float32: torch.full((pairs,), value, dtype=dtype, device=options.device)
    rows = torch.arange(pairs, device=options.device)
    settings = dict(
        positive=rows,
        negative=rows + pairs,
        guidance=full(options.guidance),
        alpha=full(0.0),
        top_p=full(1.0),
    )
    settings |= dict(
        space=full(reference.SPACES.index(options.space), torch.int32),
        temperature=full(options.temperature),
        top_k=full(0, torch.int32),
    )
    sampling = Sampling(
        **settings,
        seed=rows,
        step=full(0, torch.long),
        truncates=False,
        draws=options.temperature > 0,
        masks=False,
    )
    compiled = torch.compile(reference.next_tokens, dynamic=False)
    found: dict[str, Callable] = {"copy": lambda z, out={}: out.setdefault(0, torch.empty_like(z)).copy_(z)}
    if options.device.startswith("cuda"):
        from .guidance import next_tokens

        found["kernel"] = lambda z: next_tokens(z, sampling)
    found["reference, eager"] = lambda z: reference.next_tokens(z, sampling)
    found["reference, torch.compile"] = lambda z: compiled(z, sampling)
    if options.space == "log":
        found["transformers' formula"] = transformers_processor(pairs, options.guidance)
    return found


def transformers_processor(pairs: int, guidance: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What UnbatchedClassifierFreeGuidanceLogitsProcessor computes once both forwards are done: two log-softmaxes, mix, argmax."""

    def call(logits: torch.Tensor) -> torch.Tensor:
        scores, unconditional = (part.log_softmax(-1) for part in (logits[:pairs], logits[pairs:]))
        return (guidance * (scores - unconditional) + unconditional).argmax(-1)

    return call


def time_calls(call: Callable, sets: list[torch.Tensor], options: Options) -> list[float]:
    """Seconds of each call."""
    for z in sets:
        call(z)
    if not options.device.startswith("cuda"):
        seconds = []
        for number in range(options.calls):
            started = time.perf_counter()
            call(sets[number % len(sets)])
            seconds.append(time.perf_counter() - started)
        return seconds
    calls = [graphed(call, z) for z in sets]
    torch.cuda.synchronize()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(options.calls)]
    for number, (begin, end) in enumerate(pairs):
        begin.record()
        calls[number % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def graphed(call: Callable, z: torch.Tensor) -> Callable[[], None]:
    """The call as a CUDA graph, so that launches do not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(z)
    return graph.replay


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
