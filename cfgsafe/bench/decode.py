"""Guided decoding from two passes a token to the engine, against transformers: tokens a second.

All variants decode the same checkpoint of random weights from random prompts, greedily and without an
end token. The space is log, the only one that transformers has, unless a variant names another. A run is
the prefill and all new tokens; the table has the median of several. GB/s counts the weights once for each
step, because no decoder can avoid that; `copy`, the ceiling, is measured in the same run.

Run it: python -m cfgsafe.bench decode                                      (CPU, against transformers)
        python -m cfgsafe.bench decode --device cuda --shape 8b --batches 1 8 32 --no-transformers
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cfgsafe.bench.shapes import DECODE_SHAPES, random_model
from cfgsafe.checkpoint import DTYPES, read_model, save_checkpoint
from cfgsafe.decode import Engine
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Positive
from cfgsafe.guidance import next_tokens
from cfgsafe.hub import BASE
from cfgsafe.kernels.measure import cap, synchronize
from cfgsafe.kernels.reference import Sampling
from cfgsafe.kernels.results import show, spread, spread_columns
from cfgsafe.llama import KVCache, Llama
from cfgsafe.outputs import OutputFile
from cfgsafe.progress import progress
from cfgsafe.request import Request
from cfgsafe.subject import check_device

G = 3.0
TWO_PASSES = ("ours, two passes", "transformers, guidance_scale")  # two reads of the weights a step
COLUMNS = {"requests": "{requests}", "variant": "{variant}", **spread_columns("s", 3)}
COLUMNS |= {"tokens/s": "{tokens_per_second:.1f}", "GB/s": "{gb_per_second:.1f}", "of copy": "{share:.0%}"}
COLUMNS |= {"/ our unguided": "{of_unguided:.2f}", "/ transformers guided": "{of_transformers:.2f}"}

Prompts = list[list[int]]
Decoder = Callable[[], Prompts]  # decodes all requests and returns the tokens of each


@dataclass
class Options:
    """Time guided decoding on random weights."""

    shape: Literal["tiny", "small", "8b"] = "small"
    """tiny (2 layers of width 64), small (224M parameters, 128,256 words) or 8b (Llama-3.1-8B)."""
    batches: tuple[Count, ...] = (1,)
    """Numbers of requests at a time, measured one after the other."""
    prompt: Count = 64
    """Tokens of each prompt."""
    new: Count = 48
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
    csv: OutputFile | None = None
    """CSV file to append the rows to."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if not self.device.startswith("cuda"):
            yield "on a CPU", "memory_gib"


@torch.inference_mode()
def run(options: Options) -> None:
    check_device(options.device)
    cap(options.device, options.memory_gib)
    model, theirs = load_models(options)
    weights = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # a step reads only a few of its rows
    copy = copy_gb_per_second(options.device)
    rows = []
    for size in options.batches:
        random = torch.Generator().manual_seed(size)
        shape = (size, options.prompt)
        prompts = torch.randint(5, model.config.vocab_size, shape, generator=random).tolist()
        negatives = torch.randint(5, model.config.vocab_size, shape, generator=random).tolist()
        decoders = our_decoders(model, prompts, negatives, options)
        if theirs is not None:
            decoders |= their_decoders(theirs, prompts, negatives, options)
        of_size = []
        for name, decoder in progress(decoders.items(), desc="variants"):
            times = [timed(decoder, options.device) for _ in range(options.runs + 1)]
            seconds = spread(times[1:])
            passes = 2 if name in TWO_PASSES else 1
            read = passes * weights * options.new / seconds["p50"] / 1e9
            row = {"requests": size, "variant": name, **seconds}
            row |= {"tokens_per_second": size * options.new / seconds["p50"]}
            of_size.append(row | {"gb_per_second": read, "share": read / copy})
        add_ratios(of_size)
        rows += of_size
    show(rows, COLUMNS, options.device, options.csv)


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
    """Compare the rates of variants with each other, at one number of requests."""
    rates = {row["variant"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        rate = row["tokens_per_second"]
        row["of_unguided"] = rate / rates["ours, unguided"]
        row["of_transformers"] = rate / rates.get("transformers, guidance_scale", float("nan"))


def our_decoders(model: Llama, prompts: Prompts, negatives: Prompts, options: Options) -> dict[str, Decoder]:
    """Our variants; each of the first ones has one improvement more than the one before."""
    pairs, mixed, plain = [], [], []
    for prompt, negative in zip(prompts, negatives, strict=True):
        pairs.append(Request(prompt, negative, guidance=G, space="log", max_new_tokens=options.new))
        mixed.append(Request(prompt, negative, guidance=G, max_new_tokens=options.new))
        plain.append(Request(prompt, max_new_tokens=options.new))
    found = {
        "ours, two passes": lambda: two_passes(model, prompts, negatives, options.new),
        "ours, pairs in one batch": lambda: serve(model, pairs, log_path="logits", graphs=False),
        "ours, combined before the head": lambda: serve(model, pairs, graphs=False),
    }
    if options.device.startswith("cuda"):
        found["ours, CUDA graph"] = lambda: serve(model, pairs)
    found["ours, probability space"] = lambda: serve(model, mixed)
    found["ours, unguided"] = lambda: serve(model, plain)
    return found


def serve(model: Llama, requests: list[Request], **settings) -> Prompts:
    """The tokens of each request, by the engine."""
    rows = sum(len(request.rows) for request in requests)
    slots = len(requests[0].prompt) + requests[0].max_new_tokens
    engine = Engine(model, rows=rows, slots=slots, **settings)
    request_ids = [engine.submit(request) for request in requests]
    tokens = {}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                tokens[event.request_id] = event.completion.tokens
    return [tokens[request_id] for request_id in request_ids]


def two_passes(model: Llama, prompts: Prompts, negatives: Prompts, new: int) -> Prompts:
    """A forward for the positive rows and another for the negative ones, for each token."""
    size, length, device = len(prompts), len(prompts[0]), model.device
    rows = torch.arange(size, device=device)
    sampling = Sampling.uniform(rows, rows + size, G, "log", temperature=0.0)
    fed = [torch.tensor(ids, device=device) for ids in (prompts, negatives)]
    caches = []
    for _ in fed:
        caches.append(KVCache.empty(model.config, size, length + new, device=device, dtype=model.dtype))
    at: Tensor | None = None
    found = []
    for step in range(new):
        hidden = [model(tokens, at, cache)[:, -1] for tokens, cache in zip(fed, caches, strict=True)]
        tokens, _ = next_tokens(torch.cat([model.head(h) for h in hidden]), sampling)
        found.append(tokens.tolist())
        fed = [tokens[:, None], tokens[:, None]]
        at = torch.full((size, 1), length + step, device=device)
    return [list(answer) for answer in zip(*found, strict=True)]


def their_decoders(theirs, prompts: Prompts, negatives: Prompts, options: Options) -> dict[str, Decoder]:
    """The guidance of transformers, and a loop over pairs in one batch.

    That guidance serves several prompts at a time only if their lengths are equal, as they are here.
    """
    ids, others = (torch.tensor(rows, device=options.device) for rows in (prompts, negatives))
    new = {"max_new_tokens": options.new, "min_new_tokens": options.new}

    def generate(**more) -> Prompts:
        mask = torch.ones_like(ids)
        out = theirs.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **new, **more)
        return out[:, ids.shape[1] :].tolist()

    def hand_batched() -> Prompts:
        fed, cache, found = torch.cat((ids, others)), None, []
        for _ in range(options.new):
            out = theirs(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            positive, negative = out.logits[:, -1].float().log_softmax(-1).chunk(2)
            tokens = (negative + G * (positive - negative)).argmax(-1)
            found.append(tokens.tolist())
            fed = torch.cat((tokens, tokens))[:, None]
        return [list(answer) for answer in zip(*found, strict=True)]

    return {
        "transformers, guidance_scale": lambda: generate(guidance_scale=G, negative_prompt_ids=others),
        "transformers, pairs in one batch by hand": hand_batched,
        "transformers, unguided": generate,
    }


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def copy_gb_per_second(device: str) -> float:
    """Bytes that a large copy reads and writes in a second, in GB."""
    size = (256 if device == "cpu" else 2048) * 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() / best / 1e9
