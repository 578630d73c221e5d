"""Batched decoding of requests, with and without guidance: one forward a step for positive and negative rows together.

A guided request is two rows that take the same tokens in lockstep. Rows have their own positions, so prompts of unequal
length (within a pair and across the batch) give what each gives alone; finished requests leave the batch.

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfgsafe.errors import ContextError, InputError
from cfgsafe.guidance import SPACES, guide, sample
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lora import DEFAULT, adapter_names, choose


@dataclass(frozen=True)
class Request:
    """A prompt to answer; `negative` is the other prompt of the pair, needed when guidance is not 1."""

    prompt: list[int]
    negative: list[int] | None = None
    guidance: float = 1.0
    space: str = "prob"
    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 128
    adapter: str | None = DEFAULT  # name of an attached adapter, or None for the bare model

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0


@dataclass
class Completion:
    """Generated ids without the end token; finish_reason is "stop" (end token) or "length"."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0


def check_request(request: Request, model: Llama, place: str) -> None:
    """Raise InputError or ContextError, naming `place`, for what `generate` cannot serve."""
    if request.space not in SPACES:
        raise InputError(f"{place}: space {request.space!r} must be one of {', '.join(SPACES)}")
    if request.guided and request.negative is None:
        raise InputError(f"{place}: guidance {request.guidance:g} needs a negative prompt")
    names = adapter_names(model)
    if request.adapter not in (None, *(names or [DEFAULT])):  # a model without adapters has nothing to apply by default
        raise InputError(f"{place}: no adapter {request.adapter!r} is attached; there are {names}")
    if not (math.isfinite(request.guidance) and math.isfinite(request.temperature) and request.temperature >= 0):
        raise InputError(f"{place}: guidance must be a finite number and temperature one of at least 0")
    if request.max_new_tokens < 1 or not 0 <= request.seed < 2**63:
        raise InputError(f"{place}: max_new_tokens must be at least 1 and seed from 0 to 2^63 - 1")
    limit = model.config.max_position_embeddings
    for prompt in filter(None, (request.prompt, request.negative)):
        if len(prompt) >= limit:
            raise ContextError(f"{place}: the prompt has {len(prompt)} tokens, the model's context is {limit}; shorten it")


@torch.inference_mode()
def generate(
    model: Llama, requests: list[Request], *, batch: int = 64, done: Callable[[int], None] = lambda count: None
) -> list[Completion]:
    """Answer `requests`, `batch` at a time, longest prompts first; `done` hears how many have been finished since the last call."""
    if batch < 1:
        raise InputError(f"batch {batch}: must be at least 1")
    for number, request in enumerate(requests):
        check_request(request, model, f"request {number}")
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
    completions = [Completion() for _ in requests]
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            _generate_batch(model, [requests[i] for i in chosen], [completions[i] for i in chosen])
            done(len(chosen))
    finally:
        choose(model, None)
    return completions


def _generate_batch(model: Llama, requests: list[Request], completions: list[Completion]) -> None:
    started = time.perf_counter()
    limit = model.config.max_position_embeddings
    rows = _Rows(model, requests)
    logits = rows.prefill(model)
    alive = list(range(len(requests)))
    generators = [torch.Generator().manual_seed(r.seed) if r.temperature > 0 else None for r in requests]
    while alive:
        live = [requests[i] for i in alive]
        temperature = torch.tensor([r.temperature for r in live], device=logits.device)
        tokens = sample(rows.combine(logits, live), temperature, [generators[i] for i in alive])
        stays = []
        for at, (i, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            completion, request = completions[i], requests[i]
            if token in model.config.stop_ids:
                completion.finish_reason = "stop"
            else:
                completion.tokens.append(token)
                longest = max(len(request.prompt), len(request.negative or ()) if request.guided else 0)
                if len(completion.tokens) < request.max_new_tokens and longest + len(completion.tokens) < limit:
                    stays.append(at)
                    continue
            completion.tokens_per_second = len(completion.tokens) / (time.perf_counter() - started)
        if len(stays) < len(alive):
            alive = [alive[at] for at in stays]
            tokens = tokens[stays]
            rows.keep(stays, [requests[i] for i in alive])
        if alive:
            logits = rows.step(model, tokens)


class _Rows:
    """The rows of a batch of n requests: n positive ones, then the negative ones of those that are guided."""

    def __init__(self, model: Llama, requests: list[Request]):
        self.guided = [i for i, r in enumerate(requests) if r.guided]
        prompts = [r.prompt for r in requests] + [requests[i].negative for i in self.guided]
        self.count = len(requests)
        self.lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        longest_answer = max(r.max_new_tokens for r in requests)
        slots = min(int(self.lengths.max()) + longest_answer, model.config.max_position_embeddings)
        self.cache = KVCache(model.config, len(prompts), slots, device=model.device, dtype=model.dtype)
        width = int(self.lengths.max())
        self.prompts = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=model.device)
        self.choose = lambda live: choose(model, [r.adapter for r in live] + [live[i].adapter for i in self.guided])
        self.choose(requests)

    def prefill(self, model: Llama) -> Tensor:
        """Logits (rows, V) after each row's last prompt token."""
        hidden = model(self.prompts, cache=self.cache)
        return model.head(hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1])

    def step(self, model: Llama, tokens: Tensor) -> Tensor:
        """Feed each request's token (n,) to all its rows; logits (rows, V)."""
        both = torch.cat((tokens, tokens[self.guided]))[:, None]
        hidden = model(both, self.lengths[:, None], self.cache)
        self.lengths = self.lengths + 1
        return model.head(hidden[:, 0])

    def combine(self, logits: Tensor, requests: list[Request]) -> Tensor:
        """Next-token scores (n, V), guided where the request is."""
        scores = logits[: self.count].float()
        if self.guided:
            guided = [requests[i] for i in self.guided]
            g = torch.tensor([r.guidance for r in guided], device=logits.device)
            log_space = torch.tensor([r.space == "log" for r in guided], device=logits.device)
            scores = scores.index_copy(
                0, torch.tensor(self.guided, device=logits.device), guide(scores[self.guided], logits[self.count :], g, log_space)
            )
        return scores

    def keep(self, requests: list[int], live: list[Request]) -> None:
        """Drop every request but these (indices into those so far), which are then `live`."""
        new_number = {old: new for new, old in enumerate(requests)}
        rows = requests + [self.count + at for at, i in enumerate(self.guided) if i in new_number]
        self.guided = [new_number[i] for i in self.guided if i in new_number]
        self.count = len(requests)
        index = torch.tensor(rows, device=self.lengths.device, dtype=torch.long)
        self.lengths = self.lengths[index]
        self.cache.select(index)
        self.choose(live)
