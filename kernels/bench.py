"""The guidance kernel against eager PyTorch, torch.compile, transformers and FlashInfer.

Every variant turns B pairs of logits into B guided tokens, drawn by one of `METHODS`. The bound is
the time to read these logits once, at the rate at which this machine reads a large array, measured
in the same run. 256 MiB are written before each call, so that smaller caches do not hold the logits.

    GPU     Each call is the replay of a CUDA graph between two events, so neither launches nor
            allocations count. FlashInfer's calls are no graphs, but launched while 1 GiB is still
            being written before them.
    CPU     There is no kernel, and the reference stands in for it. What it allocates counts, as it
            does in decoding; calls that are not timed have made the allocator ready.

transformers has log space alone, and no mask. FlashInfer has no guidance: its variants draw from
probabilities that PyTorch computes within the call, or that are ready before it ("draw alone").

Run it: python -m cfgsafe.bench guidance --device cuda
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from . import reference
from .measure import graphed, read_gb_per_second, seconds
from .reference import Sampling
from .table import show, spread, spread_columns

Call = Callable[[Tensor], object]  # from logits (2 B, V), the positive rows first
MethodName = Literal["greedy", "sampled", "top-k", "top-p", "both", "mask"]
COLUMNS = {"method": "{method}", "V": "{vocabulary}", "pairs": "{pairs}", "variant": "{variant}"}
COLUMNS |= {**spread_columns("us", 1), "one read, us": "{bound:.1f}"}
COLUMNS |= {"GB/s": "{gb_per_second:.2f}", "of read": "{share_of_read:.1%}"}


@dataclass(frozen=True)
class Method:
    """How a token is drawn from the guided distribution; the fields are those of Sampling."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.0


METHODS: dict[MethodName, Method] = {
    "greedy": Method(temperature=0.0),
    "sampled": Method(),
    "top-k": Method(top_k=50),
    "top-p": Method(top_p=0.9),
    "both": Method(top_k=50, top_p=0.9),
    "mask": Method(alpha=0.1),
}


@dataclass
class Options:
    """Time guided tokens from pairs of logits."""

    methods: tuple[MethodName, ...] = ("greedy", "both")
    """How tokens are drawn: greedy, sampled, top-k (50), top-p (0.9), both, mask (alpha 0.1)."""
    vocabularies: tuple[int, ...] = (128256,)
    """Sizes of the vocabulary."""
    pairs: tuple[int, ...] = (1, 8)
    """Numbers of pairs of rows in a call."""
    space: str = "prob"
    """Space of the guidance, such as prob or log."""
    guidance: float = 3.0
    """Guidance coefficient g."""
    compiled: bool = True
    """Also time torch.compile, which compiles for seconds in each case."""
    calls: int = 20
    """Calls to time."""
    device: str = "cpu"
    """Torch device."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the logits."""
    csv: str | None = None
    """CSV file to append the rows to."""


def run(options: Options) -> list[dict]:
    """Measure each method, vocabulary and number of pairs; returns the rows of the table."""
    if options.space not in reference.SPACES:
        known = ", ".join(reference.SPACES)
        print(f"error: --space {options.space}: must be one of {known}", file=sys.stderr)
        sys.exit(2)
    read = 1e9 * read_gb_per_second(options.device)  # bytes a second
    cases = list(product(options.methods, options.vocabularies, options.pairs))
    rows = []
    # disable=None: no bar in a log.
    for method, vocabulary, pairs in tqdm(cases, leave=False, disable=None):
        torch.manual_seed(0)
        logits = 3 * torch.randn(2 * pairs, vocabulary, device=options.device)
        logits = logits.to(getattr(torch, options.dtype))
        for name, call in variants(logits, METHODS[method], options).items():
            if not options.device.startswith("cuda"):
                times = time_calls(call, logits, options)
            else:
                times = time_on_gpu(call, logits, options.calls, graph="FlashInfer" not in name)
            taken = spread(times)
            rate = logits.nbytes / taken["p50"]
            row = {"space": options.space, "dtype": options.dtype, "method": method}
            row |= {"vocabulary": vocabulary, "pairs": pairs, "variant": name}
            row |= {percentile: 1e6 * value for percentile, value in taken.items()}
            row |= {"bound": 1e6 * logits.nbytes / read, "gb_per_second": rate / 1e9}
            rows.append(row | {"share_of_read": rate / read, "read_gb_per_second": read / 1e9})
    show(rows, COLUMNS, options.device, options.csv)
    return rows


def variants(logits: Tensor, method: Method, options: Options) -> dict[str, Call]:
    """Name -> the call that is timed, for logits like these."""
    pos, g = torch.arange(len(logits) // 2, device=logits.device), options.guidance
    sampling = replace(
        Sampling.uniform(pos, pos + len(pos), g, options.space, method.temperature),
        alpha=torch.full_like(pos, method.alpha, dtype=torch.float32),
        top_k=torch.full_like(pos, method.top_k, dtype=torch.int32),
        top_p=torch.full_like(pos, method.top_p, dtype=torch.float32),
        truncates=method.top_k > 0 or method.top_p < 1,
        masks=method.alpha > 0,
    )
    found: dict[str, Call] = {}
    if logits.is_cuda:
        from .guidance import next_tokens

        found["kernel"] = lambda z: next_tokens(z, sampling)
    found["reference, eager"] = lambda z: reference.next_tokens(z, sampling)
    if options.compiled:
        torch.compiler.reset()  # or it gives up after eight shapes, and runs eagerly
        compiled = torch.compile(reference.next_tokens, dynamic=False)
        found["reference, torch.compile"] = lambda z: compiled(z, sampling)
    if options.space == "log" and method.alpha == 0:
        found["transformers' formula"] = lambda z: transformers_tokens(z, g, method)
    if logits.is_cuda and method.temperature > 0 and importlib.util.find_spec("flashinfer"):
        guided = partial(reference.guided_logprobs, sampling=sampling)
        ready = guided(logits).exp()
        try:
            draw = flashinfer_draw(method)
            draw(ready)
        except (ImportError, OSError, RuntimeError) as error:  # its kernels are compiled now
            print(f"FlashInfer is left out: {error}", file=sys.stderr)
            return found
        found["guided, then FlashInfer"] = lambda z: draw(guided(z).exp())
        found["FlashInfer, draw alone"] = lambda z: draw(ready)
    return found


def transformers_tokens(logits: Tensor, g: float, method: Method) -> Tensor:
    """What transformers computes of the logits of both forwards: guidance, warpers and draw.

    See UnbatchedClassifierFreeGuidanceLogitsProcessor, TopKLogitsWarper and TopPLogitsWarper there.
    The draw is that of torch.multinomial, without its checks, which make the host wait.
    """
    scores, unconditional = (rows.log_softmax(-1) for rows in logits.chunk(2))
    scores = g * (scores - unconditional) + unconditional
    if method.temperature == 0:
        return scores.argmax(-1)
    scores = scores / method.temperature
    if method.top_k:
        scores = scores.masked_fill(scores < scores.topk(method.top_k).values[:, -1:], -torch.inf)
    if method.top_p < 1:
        ascending, order = scores.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - method.top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    probs = scores.softmax(-1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1)


def flashinfer_draw(method: Method) -> Call:
    """FlashInfer's draw from probabilities (B, V) float32."""
    from flashinfer import sampling

    k, p = method.top_k, method.top_p
    if k and p < 1:
        return partial(sampling.top_k_top_p_sampling_from_probs, top_k=k, top_p=p)
    if k:
        return partial(sampling.top_k_sampling_from_probs, top_k=k)
    if p < 1:
        return partial(sampling.top_p_sampling_from_probs, top_p=p)
    return sampling.sampling_from_probs


def time_calls(call: Call, logits: Tensor, options: Options) -> list[float]:
    """Seconds of each call on a CPU, after two that are not timed."""
    cache = torch.empty(2**28, dtype=torch.uint8)
    found = []
    for _ in range(options.calls + 2):
        cache.zero_()
        found.append(seconds(lambda: call(logits), options.device))
    return found[2:]


def time_on_gpu(call: Call, logits: Tensor, calls: int, *, graph: bool) -> list[float]:
    """Seconds of each call on a GPU, after two that are not timed; `graph`: as a CUDA graph."""
    for _ in range(2):
        call(logits)
    cache = torch.empty(2**28 if graph else 2**30, dtype=torch.uint8, device=logits.device)
    repeat = graphed(partial(call, logits)).replay if graph else partial(call, logits)
    begins = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    for begin, end in zip(begins, ends, strict=True):
        torch.cuda.synchronize()
        cache.zero_()
        begin.record()
        repeat()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(begins, ends, strict=True)]
