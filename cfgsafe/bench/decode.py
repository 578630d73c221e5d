"""Guided decoding, step by step from two passes a token to the engine, against transformers on the same checkpoint: tokens a second.

Random weights, random prompts, no end token, greedy, log space (the only one transformers has). A run is prefill and all new tokens; the
table has the median of several. GB/s counts the weights once a step, which no decoder can avoid; `copy` is measured in the same run.

Run it: python -m cfgsafe.bench decode                                                       (CPU, against transformers)
        python -m cfgsafe.bench decode --device cuda --shape 8b --batches 1 8 32 --no-transformers
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from cfgsafe.bench.shapes import llama_8b, random_model
from cfgsafe.checkpoint import DTYPES, read_model, save_checkpoint
from cfgsafe.decode import Engine, Request
from cfgsafe.errors import InputError
from cfgsafe.guidance import next_tokens
from cfgsafe.hub import BASE
from cfgsafe.kernels.measure import cap, synchronize
from cfgsafe.kernels.reference import SPACES, Sampling
from cfgsafe.kernels.results import show, spread
from cfgsafe.llama import KVCache, Llama, LlamaConfig

SHAPES = {
    "tiny": LlamaConfig(4096, 64, 128, 2, 4, 2, 16, 8192),
    "small": LlamaConfig(128256, 768, 2048, 20, 12, 4, 64, 8192, tie_word_embeddings=True),
    "8b": llama_8b(),
}
G = 3.0


@dataclass
class Options:
    """Guided decoding on random weights."""

    shape: Literal["tiny", "small", "8b"] = "small"
    """tiny (2 layers of width 64), small (224M parameters, 128,256 words) or 8b (Llama-3.1-8B)."""
    batches: tuple[int, ...] = (1,)
    """Requests at a time."""
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 48
    """Tokens of each answer."""
    runs: int = 5
    """Runs to time, after one that is not."""
    transformers: bool = True
    """Also run transformers, where it is installed."""
    memory_gib: float | None = None
    """Share of the GPU to use, in GiB."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "bfloat16"
    """float32 or bfloat16."""
    csv: str | None = None
    """File to add the rows to."""


@torch.inference_mode()
def run(options: Options) -> None:
    cap(options.device, options.memory_gib)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dtype = DTYPES[options.dtype]
        model, theirs = random_model(SHAPES[options.shape], dtype, options.device), None
        if options.transformers:
            save_checkpoint(Path(folder) / "model", model, tokenizer_from=BASE, dtype=dtype)
            model, theirs = (
                read_model(Path(folder) / "model", device=options.device, dtype=dtype),
                load_theirs(folder, dtype, options.device),
            )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if not model.config.tie_word_embeddings:
            weights -= (
                model.model.embed_tokens.weight.numel() * dtype.itemsize
            )  # of which a step reads a few rows
        copy = copy_gb_per_second(options.device)
        for size in options.batches:
            random = torch.Generator().manual_seed(size)
            prompts, negatives = (
                torch.randint(
                    5, SHAPES[options.shape].vocab_size, (size, options.prompt), generator=random
                ).tolist()
                for _ in range(2)
            )
            found = ladder(model, prompts, negatives, options) | (
                reference_ladder(theirs, prompts, negatives, options) if theirs else {}
            )
            for name, call in tqdm(found.items(), leave=False):
                seconds = spread([timed(call, options.device) for _ in range(options.runs + 1)][1:])
                rate = size * options.new / seconds["p50"]
                read = (
                    weights
                    * options.new
                    / seconds["p50"]
                    / 1e9
                    * (2 if "two passes" in name or "guidance_scale" in name else 1)
                )
                rows.append(
                    {
                        "requests": size,
                        "variant": name,
                        **seconds,
                        "tokens_per_second": rate,
                        "gb_per_second": read,
                        "share": read / copy,
                    }
                )
    for row in rows:
        same = {
            other["variant"]: other["tokens_per_second"]
            for other in rows
            if other["requests"] == row["requests"]
        }
        row["of_unguided"] = row["tokens_per_second"] / same["ours, unguided"]
        row["of_transformers"] = row["tokens_per_second"] / same.get(
            "transformers, guidance_scale", float("nan")
        )
    columns = {
        "requests": "{requests}",
        "variant": "{variant}",
        "s p20": "{p20:.3f}",
        "p50": "{p50:.3f}",
        "p80": "{p80:.3f}",
    }
    columns |= {
        "tokens/s": "{tokens_per_second:.1f}",
        "GB/s": "{gb_per_second:.1f}",
        "of copy": "{share:.0%}",
    }
    columns |= {"/ our unguided": "{of_unguided:.2f}", "/ transformers guided": "{of_transformers:.2f}"}
    show(rows, columns, options.device, options.csv)


def ladder(
    model: Llama, prompts: list[list[int]], negatives: list[list[int]], options: Options
) -> dict[str, Callable[[], list]]:
    """Ours, each with one thing more than the one before."""
    pairs = [
        Request(p, n, guidance=G, space="log", max_new_tokens=options.new)
        for p, n in zip(prompts, negatives, strict=True)
    ]
    mixed = [
        Request(p, n, guidance=G, max_new_tokens=options.new) for p, n in zip(prompts, negatives, strict=True)
    ]
    plain = [Request(p, max_new_tokens=options.new) for p in prompts]
    found = {
        "ours, two passes": lambda: two_passes(model, prompts, negatives, options.new),
        "ours, pairs in one batch": lambda: serve(model, pairs, log_path="logits", graphs=False),
        "ours, combined before the head": lambda: serve(model, pairs, graphs=False),
    }
    if options.device.startswith("cuda"):
        found["ours, CUDA graph"] = lambda: serve(model, pairs)
    return found | {
        "ours, probability space": lambda: serve(model, mixed),
        "ours, unguided": lambda: serve(model, plain),
    }


def serve(model: Llama, requests: list[Request], **settings) -> list[list[int]]:
    rows = sum(len(request.rows) for request in requests)
    engine = Engine(model, rows=rows, slots=len(requests[0].prompt) + requests[0].max_new_tokens, **settings)
    request_ids = [engine.submit(request) for request in requests]
    tokens = {}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                tokens[event.request_id] = event.completion.tokens
    return [tokens[request_id] for request_id in request_ids]


def two_passes(
    model: Llama, prompts: list[list[int]], negatives: list[list[int]], new: int
) -> list[list[int]]:
    """A forward for the positive rows and one for the negative ones, each token."""
    size, length, device = len(prompts), len(prompts[0]), model.device
    caches = [
        KVCache.empty(model.config, size, length + new, device=device, dtype=model.dtype) for _ in range(2)
    ]
    rows = torch.arange(size, device=device)
    full = lambda value, dtype=torch.float32: torch.full((size,), value, dtype=dtype, device=device)
    settings = dict(
        positive=rows,
        negative=rows + size,
        guidance=full(G),
        space=full(SPACES.index("log"), torch.int32),
        alpha=full(0.0),
        top_p=full(1.0),
    )
    settings |= dict(
        temperature=full(0.0),
        top_k=full(0, torch.int32),
        seed=rows,
        step=rows,
        truncates=False,
        draws=False,
        masks=False,
    )
    fed, at, found = [torch.tensor(p, device=device) for p in (prompts, negatives)], None, []
    for step in range(new):
        hidden = [model(tokens, at, cache)[:, -1] for tokens, cache in zip(fed, caches, strict=True)]
        tokens, _ = next_tokens(torch.cat([model.head(h) for h in hidden]), Sampling(**settings))
        found.append(tokens.tolist())
        fed, at = [tokens[:, None]] * 2, full(length + step, torch.long)[:, None]
    return [list(answer) for answer in zip(*found, strict=True)]


def load_theirs(folder: str, dtype: torch.dtype, device: str):
    try:
        import transformers
    except ImportError:
        raise InputError(
            "transformers is not installed; pip install 'cfgsafe[test]', or pass --no-transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    return (
        transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
        .to(device)
        .eval()
    )


def reference_ladder(
    theirs, prompts: list[list[int]], negatives: list[list[int]], options: Options
) -> dict[str, Callable[[], list]]:
    """transformers' own guidance (one request at a time for unequal prompts; here they are equal), and a loop over pairs in one batch."""
    ids, others = (torch.tensor(p, device=options.device) for p in (prompts, negatives))
    settings = dict(max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False, pad_token_id=0)

    def generate(**more) -> list[list[int]]:
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)[
            :, ids.shape[1] :
        ].tolist()

    def hand_batched() -> list[list[int]]:
        fed, cache, found = torch.cat((ids, others)), None, []
        for _ in range(options.new):
            out = theirs(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logs = out.past_key_values, out.logits[:, -1].float().log_softmax(-1)
            tokens = (logs[len(ids) :] + G * (logs[: len(ids)] - logs[len(ids) :])).argmax(-1)
            found.append(tokens.tolist())
            fed = torch.cat((tokens, tokens))[:, None]
        return [list(answer) for answer in zip(*found, strict=True)]

    return {
        "transformers, guidance_scale": lambda: generate(guidance_scale=G, negative_prompt_ids=others),
        "transformers, pairs in one batch by hand": hand_batched,
        "transformers, unguided": generate,
    }


def timed(call: Callable[[], list], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def copy_gb_per_second(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones((256 if device == "cpu" else 2048) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: [target.copy_(source)], device) for _ in range(5))
    return 2 * source.numel() / best / 1e9
