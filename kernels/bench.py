"""The guidance kernel against eager PyTorch, torch.compile and transformers: time and bytes per second.

Every variant turns B pairs of logits into B guided tokens. The ceiling is `copy`, measured in the same
run: a device-to-device copy of as many bytes as the kernel must read. On a GPU each call is a CUDA
graph between two events, so that launches do not count. Inputs rotate among sets that together exceed
the cache. On a CPU there is no kernel, and the reference stands in for it.

Run it: python -m cfgsafe.bench guidance --device cuda
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from . import reference
from .reference import Sampling
from .results import show, spread, spread_columns

Call = Callable[[Tensor], object]  # from logits (2 B, V), the positive rows first
COLUMNS = {"pairs": "{pairs}", "variant": "{variant}", **spread_columns("us", 1)}
COLUMNS |= {"GB/s": "{gb_per_second:.1f}", "of copy": "{share_of_copy:.0%}"}


@dataclass
class Options:
    """Time guided tokens from pairs of logits."""

    pairs: tuple[int, ...] = (1, 8, 32, 64)
    """Numbers of pairs of rows in a call, measured one after the other."""
    vocabulary: int = 128256
    """Size of the vocabulary."""
    space: str = "prob"
    """Space of the guidance, such as prob or log."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_k: int = 0
    """Keep so many of the best tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the best tokens that hold this share of the probability; 1 keeps all."""
    guidance: float = 3.0
    """Guidance coefficient g."""
    calls: int = 50
    """Calls to time."""
    sets: int = 4
    """Sets of inputs to rotate among."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the logits."""
    csv: str | None = None
    """CSV file to append the rows to."""


def run(options: Options) -> None:
    if options.space not in reference.SPACES:
        known = ", ".join(reference.SPACES)
        print(f"error: --space {options.space}: must be one of {known}", file=sys.stderr)
        sys.exit(2)
    rows = []
    for pairs in tqdm(options.pairs, leave=False, disable=None):  # None: no bar in a log
        torch.manual_seed(0)
        noise = partial(torch.randn, 2 * pairs, options.vocabulary, device=options.device)
        sets = [(3 * noise()).to(getattr(torch, options.dtype)) for _ in range(options.sets)]
        times = {}
        for name, call in variants(sets[0], options).items():
            times[name] = spread(time_calls(call, sets, options))
        ceiling = 2 * sets[0].nbytes / times["copy"]["p50"]  # bytes a second, read and written
        for name, seconds in times.items():
            moved = sets[0].nbytes * (2 if name == "copy" else 1)
            rate = moved / seconds["p50"]
            row = {"pairs": pairs, "variant": name}
            row |= {percentile: 1e6 * value for percentile, value in seconds.items()}
            rows.append(row | {"gb_per_second": rate / 1e9, "share_of_copy": rate / ceiling})
    show(rows, COLUMNS, options.device, options.csv)


def variants(logits: Tensor, options: Options) -> dict[str, Call]:
    """Name -> the call that is timed, for logits like these."""
    pos = torch.arange(len(logits) // 2, device=logits.device)
    g = options.guidance
    sampling = replace(
        Sampling.uniform(pos, pos + len(pos), g, options.space, options.temperature),
        top_k=torch.full_like(pos, options.top_k, dtype=torch.int32),
        top_p=torch.full_like(pos, options.top_p, dtype=torch.float32),
        truncates=options.top_k > 0 or options.top_p < 1,
    )
    compiled = torch.compile(reference.next_tokens, dynamic=False)
    found: dict[str, Call] = {"copy": torch.empty_like(logits).copy_}
    if logits.is_cuda:
        from .guidance import next_tokens

        found["kernel"] = lambda z: next_tokens(z, sampling)
    found["reference, eager"] = lambda z: reference.next_tokens(z, sampling)
    found["reference, torch.compile"] = lambda z: compiled(z, sampling)
    if options.space == "log":
        found["transformers' formula"] = lambda z: transformers_tokens(z, g)
    return found


def transformers_tokens(logits: Tensor, g: float) -> Tensor:
    """What UnbatchedClassifierFreeGuidanceLogitsProcessor of transformers computes after both forwards."""
    scores, unconditional = (rows.log_softmax(-1) for rows in logits.chunk(2))
    return (g * (scores - unconditional) + unconditional).argmax(-1)


def time_calls(call: Call, sets: list[Tensor], options: Options) -> list[float]:
    """Seconds of each call, after one that is not timed for each set."""
    for logits in sets:
        call(logits)
    if options.device.startswith("cuda"):
        return time_graphs([graphed(call, logits) for logits in sets], options.calls)
    seconds = []
    for number in range(options.calls):
        started = time.perf_counter()
        call(sets[number % len(sets)])
        seconds.append(time.perf_counter() - started)
    return seconds


def time_graphs(graphs: list[torch.cuda.CUDAGraph], calls: int) -> list[float]:
    """Seconds of each replay, by events on the GPU."""
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    torch.cuda.synchronize()
    for number in range(calls):
        begins[number].record()
        graphs[number % len(graphs)].replay()
        ends[number].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]


def graphed(call: Call, logits: Tensor) -> torch.cuda.CUDAGraph:
    """The call on these logits as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(logits)
    return graph
