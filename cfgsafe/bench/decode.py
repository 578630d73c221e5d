"""Guided decoding from two passes a token to the engine, against transformers: tokens a second.

All variants decode the same checkpoint of random weights from random prompts, greedily and without
an end token. The space is log, the only one that transformers has, unless a variant names another.
The variants take turns, so that a slow minute of the machine hits all of them.

    s               prefill and all new tokens, the time that the ratios compare
    first token     until each request has its first token: prefill, head and draw
    prefill         tokens of the prompts, of both sides of a pair, by that time
    tokens/s        new tokens after the first, by the time after it
    GB/s            of weights, in that time; each step reads them once (two passes: twice), and no
                    decoder can avoid that. Keys and values, which attention reads, are not counted.
    of read         GB/s by the rate at which a large array is read, measured before and after

Run it: python -m cfgsafe.bench decode                                      (CPU, against transformers)
        python -m cfgsafe.bench decode --device cuda --shape 8b --batches 1 8 32 --no-transformers
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from cfgsafe import products
from cfgsafe.bench import plots
from cfgsafe.bench.plots import TableFile
from cfgsafe.bench.shapes import DECODE_SHAPES, random_model
from cfgsafe.checkpoint import DTYPES, read_model, save_checkpoint
from cfgsafe.decode import Engine
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Positive, Several
from cfgsafe.guidance import next_tokens
from cfgsafe.hub import BASE
from cfgsafe.kernels.measure import cap, read_gb_per_second, synchronize
from cfgsafe.kernels.reference import Sampling
from cfgsafe.kernels.table import show, spread, spread_columns
from cfgsafe.llama import KVCache, Llama
from cfgsafe.progress import progress
from cfgsafe.request import Request
from cfgsafe.subject import Subject, check_device

G = 3.0
THEIR_GUIDED, THEIR_UNGUIDED = "transformers, guidance_scale", "transformers, unguided"
OUR_UNGUIDED, CUDA_GRAPH = "ours, unguided", "ours, CUDA graph"
PROBABILITY_SPACE = "ours, probability space"
TWO_PASSES = ("ours, two passes", THEIR_GUIDED)  # two reads of the weights a step
COLUMNS = {"requests": "{requests}", "variant": "{variant}", **spread_columns("s", 3)}
COLUMNS |= {"first token, s": "{first_token:.3f}", "prefill, tokens/s": "{prefill_per_second:.0f}"}
COLUMNS |= {"tokens/s": "{tokens_per_second:.1f}", "GB/s": "{gb_per_second:.1f}"}
COLUMNS |= {"of read": "{share_of_read:.0%}", "x our unguided": "{of_unguided:.2f}"}
COLUMNS |= {"x their guided": "{of_their_guided:.2f}"}
COLUMNS |= {"x their unguided": "{of_their_unguided:.2f}"}

Prompts = list[list[int]]
Times = list[tuple[float, float]]  # of each run: seconds to the first tokens, and seconds in all
Call = Callable[[], None]  # what a decoder calls when each request has its first token
Decoder = Callable[[Call], Prompts]  # decodes all requests and returns the tokens of each


@dataclass
class Options:
    """Time guided decoding on random weights."""

    shape: Literal["tiny", "224m", "221m", "smollm2-135m", "llama-3.2-1b", "8b"] = "221m"
    """That of a model, or 224m (20 layers of width 768), 221m (8 of 1024), tiny (2 of 64)."""
    batches: tuple[Count, ...] = (1,)
    """Numbers of requests at a time, measured one after the other."""
    prompt: Count = 64
    """Tokens of each prompt."""
    new: Several = 48
    """Tokens of each answer."""
    runs: Count = 5
    """Runs to time, after one that is not timed."""
    transformers: bool = True
    """Also run transformers, where it is installed."""
    memory_gib: Positive | None = None
    """Share of the GPU to use, in GiB."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "bfloat16"
    """Data type of the model: float32 or bfloat16."""
    tune: bool = Subject.tune
    """As for infer.py: on a CPU, use the products that timing finds fastest, and show them."""
    compile: bool = False
    """As for infer.py: compile our steps of decoding."""
    csv: TableFile | None = None
    """CSV file to append the rows to."""
    plot: bool = False
    """Draw tokens a second and GB/s against the requests at a time: a PNG beside the CSV file."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.device.startswith("cuda"):
            yield "on a GPU", "tune"
        else:
            yield "on a CPU", "memory_gib"
        if self.csv is None:
            yield "without --csv", "plot"


@torch.inference_mode()
def run(options: Options) -> None:
    check_device(options.device)
    cap(options.device, options.memory_gib)
    model, theirs = load_models(options)
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # a step reads only a few of its rows
    if options.tune:
        embedding = model.model.embed_tokens.weight
        products.prepare(model.groups(), embedding, may_pack=not options.compile)
        print(products.table(model.groups()))
    if options.compile:
        model.compile_steps()
    read = read_gb_per_second(options.device)
    times_of = {}
    for size in options.batches:
        random = torch.Generator().manual_seed(size)
        shape = (size, options.prompt)
        prompts = torch.randint(5, model.config.vocab_size, shape, generator=random).tolist()
        negatives = torch.randint(5, model.config.vocab_size, shape, generator=random).tolist()
        decoders = our_decoders(model, prompts, negatives, options)
        if theirs is not None:
            decoders |= their_decoders(theirs, prompts, negatives, options)
        times_of[size] = time_in_turns(decoders, options)
    read = max(read, read_gb_per_second(options.device))  # others may have been at work before
    rows = []
    for size, found in times_of.items():
        of_size = []
        for name, times in found.items():
            of_size.append(row_of(name, times, size, weights, read, options))
        add_ratios(of_size)
        rows += of_size
    show(rows, COLUMNS, options.device, options.csv)
    if options.plot and options.csv:
        plots.decoding(plots.beside(options.csv), rows)


def time_in_turns(decoders: dict[str, Decoder], options: Options) -> dict[str, Times]:
    """Name -> the times of its runs, after one that is not timed."""
    times: dict[str, Times] = {name: [] for name in decoders}
    for _ in progress(range(options.runs + 1), desc="runs"):
        for name, decoder in decoders.items():
            times[name].append(timed(decoder, options.device))
    return {name: found[1:] for name, found in times.items()}


def timed(decoder: Decoder, device: str) -> tuple[float, float]:
    """Seconds until each request has its first token, and seconds in all."""
    firsts: list[float] = []
    synchronize(device)
    started = time.perf_counter()
    decoder(lambda: firsts.append(time.perf_counter() - started))
    synchronize(device)
    return firsts[0], time.perf_counter() - started


def row_of(name: str, times: Times, size: int, weights: int, read: float, options: Options) -> dict:
    """The row of a variant; a pass reads `weights` bytes, and the machine reads `read` GB/s."""
    first = median(first for first, _ in times)
    after = median(total - first for first, total in times)
    steps, sides = options.new - 1, 1 if "unguided" in name else 2
    rate = (2 if name in TWO_PASSES else 1) * weights * steps / after / 1e9
    return {
        "shape": options.shape,
        "dtype": options.dtype,
        "tune": options.tune,
        "compile": options.compile,
        "prompt": options.prompt,
        "new": options.new,
        "requests": size,
        "variant": name,
        **spread([total for _, total in times]),
        "first_token": first,
        "prefill_per_second": sides * size * options.prompt / first,
        "tokens_per_second": size * steps / after,
        "gb_per_second": rate,
        "read_gb_per_second": read,
        "share_of_read": rate / read,
    }


def load_models(options: Options) -> tuple[Llama, torch.nn.Module | None]:
    """Our model of random weights and, if asked for, the same read by transformers."""
    dtype, device = DTYPES[options.dtype], options.device
    model = random_model(DECODE_SHAPES[options.shape], dtype, device)
    if not options.transformers:
        return model, None
    try:
        import transformers
    except ImportError:
        raise InputError(
            "transformers is not installed; pip install 'cfgsafe[test]', or pass --no-transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_checkpoint(path, model, tokenizer_from=BASE, dtype=dtype)
        theirs: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return read_model(path, device=device, dtype=dtype), theirs.to(device).eval()


def add_ratios(rows: list[dict]) -> None:
    """How many times as fast as others each variant is, prefill included."""
    seconds = {row["variant"]: row["p50"] for row in rows}
    others = {
        "of_unguided": OUR_UNGUIDED,
        "of_their_guided": THEIR_GUIDED,
        "of_their_unguided": THEIR_UNGUIDED,
    }
    for row in rows:
        for key, other in others.items():
            row[key] = seconds.get(other, float("nan")) / row["p50"]


def our_decoders(model: Llama, prompts: Prompts, negatives: Prompts, options: Options) -> dict[str, Decoder]:
    """Our variants; each of the first ones has one improvement more than the one before."""
    pairs, mixed, plain = [], [], []
    for prompt, negative in zip(prompts, negatives, strict=True):
        pairs.append(Request(prompt, negative, guidance=G, space="log", max_new_tokens=options.new))
        mixed.append(Request(prompt, negative, guidance=G, max_new_tokens=options.new))
        plain.append(Request(prompt, max_new_tokens=options.new))
    hidden = {"graphs": False}
    logits = {"graphs": False, "log_path": "logits"}
    found: dict[str, Decoder] = {
        "ours, two passes": lambda first: two_passes(model, prompts, negatives, options.new, first),
        "ours, pairs in one batch": lambda first: serve(model, pairs, first, **logits),
        "ours, combined before the head": lambda first: serve(model, pairs, first, **hidden),
    }
    if options.device.startswith("cuda"):
        found[CUDA_GRAPH] = lambda first: serve(model, pairs, first)
    found[PROBABILITY_SPACE] = lambda first: serve(model, mixed, first)
    found[OUR_UNGUIDED] = lambda first: serve(model, plain, first)
    return found


def serve(model: Llama, requests: list[Request], first: Call, **settings) -> Prompts:
    """The tokens of each request, by the engine; all must join in the first step, none may fail."""
    rows = sum(len(request.rows) for request in requests)
    slots = len(requests[0].prompt) + requests[0].max_new_tokens
    engine = Engine(model, rows=rows, slots=slots, **settings)
    request_ids = [engine.submit(request) for request in requests]
    engine.step()
    first()
    if engine.waiting:
        raise InputError(f"the KV cache of {len(requests)} requests does not fit; lower --batches")
    tokens = {}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                if event.completion.finish_reason != "length":
                    raise InputError(f"a request has failed: {event.completion.failure}")
                tokens[event.request_id] = event.completion.tokens
    return [tokens[request_id] for request_id in request_ids]


def two_passes(model: Llama, prompts: Prompts, others: Prompts, new: int, first: Call) -> Prompts:
    """A forward for the positive rows and another for the negative ones, for each token."""
    size, length, device = len(prompts), len(prompts[0]), model.device
    rows = torch.arange(size, device=device)
    sampling = Sampling.uniform(rows, rows + size, G, "log", temperature=0.0)
    fed = [torch.tensor(ids, device=device) for ids in (prompts, others)]
    caches = []
    for _ in fed:
        caches.append(KVCache.empty(model.config, size, length + new, device=device, dtype=model.dtype))
    at: Tensor | None = None
    found = []
    for step in range(new):
        hidden = [model(tokens, at, cache)[:, -1] for tokens, cache in zip(fed, caches, strict=True)]
        tokens, _ = next_tokens(torch.cat([model.head(h) for h in hidden]), sampling)
        found.append(tokens.tolist())
        if step == 0:
            first()
        fed = [tokens[:, None], tokens[:, None]]
        at = torch.full((size, 1), length + step, device=device)
    return [list(answer) for answer in zip(*found, strict=True)]


def their_decoders(theirs, prompts: Prompts, negatives: Prompts, options: Options) -> dict[str, Decoder]:
    """The guidance of transformers, and a loop over pairs in one batch.

    That guidance serves several prompts at a time only if their lengths are equal, as they are here.
    """
    ids, others = (torch.tensor(rows, device=options.device) for rows in (prompts, negatives))
    new = {"max_new_tokens": options.new, "min_new_tokens": options.new}

    def generate(first: Call, **more) -> Prompts:
        mask, streamer = torch.ones_like(ids), Streamer(first)
        settings = {"do_sample": False, "pad_token_id": 0, "streamer": streamer, **new, **more}
        out = theirs.generate(ids, attention_mask=mask, **settings)
        return out[:, ids.shape[1] :].tolist()

    def hand_batched(first: Call) -> Prompts:
        fed, cache, found = torch.cat((ids, others)), None, []
        for step in range(options.new):
            out = theirs(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            positive, negative = out.logits[:, -1].float().log_softmax(-1).chunk(2)
            tokens = (negative + G * (positive - negative)).argmax(-1)
            found.append(tokens.tolist())
            if step == 0:
                first()
            fed = torch.cat((tokens, tokens))[:, None]
        return [list(answer) for answer in zip(*found, strict=True)]

    return {
        THEIR_GUIDED: lambda first: generate(first, guidance_scale=G, negative_prompt_ids=others),
        "transformers, pairs in one batch by hand": hand_batched,
        THEIR_UNGUIDED: generate,
    }


class Streamer:
    """What `generate` of transformers gives its tokens to: the prompts, then those of each step."""

    def __init__(self, first: Call):
        self.first, self.calls = first, 0

    def put(self, tokens: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first()

    def end(self) -> None:
        pass
