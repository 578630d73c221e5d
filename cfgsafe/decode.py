"""Decoding with continuous batching: requests in, tokens out, guided pairs as two rows of one batch in lockstep.

A guided request owns two rows of the KV cache that are fed the same tokens. Rows have their own positions, so prompts of unequal length
(within a pair and across the batch) give what each gives alone. Finished requests leave and waiting ones join; rows in use are kept
together, so that a step computes these alone. Prompts are prefilled apart from the decoding steps; a beginning that several of them
share is computed once. On a GPU a batch that stays as it is for a few steps is captured as a CUDA graph: forward, head, guidance and
sampling replay as one launch.

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cfgsafe.errors import ContextError, InputError
from cfgsafe.guidance import SPACES
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lockstep import Batch, Settings
from cfgsafe.lora import DEFAULT, adapter_names, set_adapters
from cfgsafe.prefill import Prefill
from cfgsafe.request import Completion, Request, Running


def check_request(request: Request, model: Llama, place: str) -> None:
    """Raise InputError or ContextError, naming `place`, for what cannot be served."""
    if request.space not in SPACES:
        raise InputError(f"{place}: space {request.space!r} must be one of {', '.join(SPACES)}")
    if request.guided and request.negative is None:
        raise InputError(f"{place}: guidance {request.guidance:g} needs a negative prompt")
    names = adapter_names(model)
    if request.adapter not in (
        None,
        *(names or [DEFAULT]),
    ):  # a model without adapters has nothing to apply by default
        raise InputError(f"{place}: no adapter {request.adapter!r} is attached; there are {names}")
    if not (
        math.isfinite(request.guidance) and math.isfinite(request.temperature) and request.temperature >= 0
    ):
        raise InputError(f"{place}: guidance must be a finite number and temperature one of at least 0")
    if not (0 <= request.alpha <= 1 and 0 <= request.top_p <= 1 and 0 <= request.top_k < 2**31):
        raise InputError(f"{place}: alpha and top_p must lie from 0 to 1, and top_k be at least 0")
    if request.max_new_tokens < 1 or not 0 <= request.seed < 2**63:
        raise InputError(f"{place}: max_new_tokens must be at least 1 and seed from 0 to 2^63 - 1")
    limit = model.config.max_position_embeddings
    for prompt in request.rows:
        if not prompt:
            raise InputError(f"{place}: the prompt is empty")
        if len(prompt) >= limit:
            raise ContextError(
                f"{place}: the prompt has {len(prompt)} tokens, the model's context is {limit}; shorten it"
            )


def generate(
    model: Llama,
    requests: list[Request],
    *,
    batch: int = 64,
    skip: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Answer `requests`, at most `batch` at a time, in the order they were given.

    on_token(number, token) is called for each token as it comes, on_completion(number, completion) for each answer when it is finished;
    number is the request's place in the list. `skip`: see cfgsafe.lockstep.Settings.
    """
    if batch < 1:
        raise InputError(f"batch {batch}: must be at least 1")
    for number, request in enumerate(requests):
        check_request(request, model, f"request {number}")
    if not requests:
        return []
    slots = max(slots_for(request, model) for request in requests)
    rows = sum(sorted((len(r.rows) for r in requests), reverse=True)[:batch])
    engine = Engine(model, rows=rows, slots=slots, skip=skip)
    order = sorted(
        range(len(requests)), key=lambda number: -len(requests[number].prompt)
    )  # alike prompts are prefilled together
    number_of = {engine.submit(requests[number]): number for number in order}
    completions: dict[int, Completion] = {}
    while engine.busy:
        for event in engine.step():
            number = number_of[event.request_id]
            if event.token is not None and on_token:
                on_token(number, event.token)
            if event.completion:
                completions[number] = event.completion
                if on_completion:
                    on_completion(number, event.completion)
    return [completions[number] for number in range(len(requests))]


def slots_for(request: Request, model: Llama) -> int:
    """Positions a row of the request may fill."""
    return min(max(map(len, request.rows)) + request.max_new_tokens, model.config.max_position_embeddings)


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step: a new token, or, with its completion, its end."""

    request_id: int
    token: int | None = None
    completion: Completion | None = None


class Engine:
    """Serves requests as they come: `submit`, then `step` as long as it is `busy`; `step` hands out tokens and completions.

    `rows` of the cache, of `slots` positions each, are allocated at once, in at most `kv_bytes`, by default most of what a GPU has free.
    `log_path`, `skip`, `graphs`: see cfgsafe.lockstep.Settings.
    """

    def __init__(
        self,
        model: Llama,
        *,
        rows: int,
        slots: int,
        kv_bytes: int | None = None,
        log_path: str = "hidden",
        skip: bool = False,
        graphs: bool = True,
    ):
        size = KVCache.bytes_a_slot(model.config, model.dtype)
        if kv_bytes is None and model.device.type == "cuda":
            kv_bytes = int(0.9 * torch.cuda.mem_get_info(model.device)[0])
        if kv_bytes is not None:
            rows = min(rows, kv_bytes // (size * slots))
        if rows < 1:
            raise InputError(
                f"the KV cache of one row of {slots} positions takes {size * slots:,} bytes, more than the {kv_bytes:,} allowed"
            )
        self.model, self.slots = model, slots
        self.cache = KVCache.empty(model.config, rows, slots, device=model.device, dtype=model.dtype)
        self.free = rows
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.submitted = 0
        self.settings = Settings(log_path, skip, graphs)
        self.prefill = Prefill(model, self.cache, self.settings)
        self.batch: Batch | None = None  # of the running requests; None when they changed

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Raises InputError when it could never fit, and what `check_request` raises."""
        check_request(request, self.model, f"request {self.submitted}")
        needed = slots_for(request, self.model)
        if needed > self.slots or len(request.rows) > len(self.cache.rows):
            raise InputError(
                f"request {self.submitted}: {len(request.rows)} rows of {needed} tokens do not fit in the KV cache of {len(self.cache.rows)} "
                f"rows of {self.slots}; shorten the prompt, lower max_new_tokens or make the cache larger"
            )
        request_id = self.submitted
        self.submitted += 1
        self.waiting.append(Running(request_id, request, Completion(), time.perf_counter()))
        return request_id

    def cancel(self, request_id: int) -> Completion | None:
        """End a request where it is and hand out what it has; None where no such request waits or runs."""
        for state in [*self.waiting, *self.running]:
            if state.request_id == request_id:
                state.completion.finish_reason = "cancelled"
                if state in self.running:
                    self._leave([state])
                else:
                    self.waiting.remove(state)
                return state.completion
        return None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One more token of every running request, and the first of those that can join.

        A request's last event brings its completion, which the engine then forgets.
        """
        events: list[Event] = []
        try:
            if self.running:
                if self.batch is None:
                    self.batch = Batch(self.model, self.cache, self.running, self.settings)
                tokens, logprobs = self.batch.step()
                self._take(self.running, tokens, logprobs, events)
            if joining := self._join():
                first = len(self.cache.rows) - self.free - sum(len(state.lengths) for state in joining)
                tokens, logprobs = self.prefill(joining, first)
                self._take(joining, tokens, logprobs, events)
        finally:
            set_adapters(self.model, None)
        return events

    def _join(self) -> list[Running]:
        """Move waiting requests to the running ones, in order, as long as rows are free."""
        joining = []
        while self.waiting and len(self.waiting[0].request.rows) <= self.free:
            state = self.waiting.popleft()
            state.lengths = [len(prompt) for prompt in state.request.rows]
            self.free -= len(state.lengths)
            joining.append(state)
        self.running += joining
        if joining:
            self.batch = None
        return joining

    def _take(
        self, states: list[Running], tokens: list[int], logprobs: list[float], events: list[Event]
    ) -> None:
        """Give each request its token; those that are finished leave."""
        finished = []
        for state, token, logprob in zip(list(states), tokens, logprobs, strict=True):
            request, completion = state.request, state.completion
            if token < 0:
                completion.finish_reason = "impossible"
            elif token in self.model.config.stop_ids:
                completion.finish_reason = "stop"
            else:
                completion.tokens.append(token)
                completion.logprobs.append(logprob)
                state.last = token
                events.append(Event(state.request_id, token))
                if ending := next(
                    (s for s in request.stop if s and tuple(completion.tokens[-len(s) :]) == s), None
                ):
                    completion.finish_reason = "stop"
                    del completion.tokens[-len(ending) :], completion.logprobs[-len(ending) :]
                elif max(map(len, request.rows)) + len(completion.tokens) < slots_for(request, self.model):
                    continue
            completion.tokens_per_second = len(completion.tokens) / (time.perf_counter() - state.started)
            finished.append(state)
            events.append(Event(state.request_id, completion=completion))
        self._leave(finished)

    def _leave(self, finished: list[Running]) -> None:
        """Free the rows of `finished`; the last request with as many rows takes the place of each, what lies behind that one moves up."""
        for state in finished:
            at, size = self.running.index(state), len(state.lengths)
            starts = [0]
            for other in self.running:
                starts.append(starts[-1] + len(other.lengths))
            last = max(number for number, other in enumerate(self.running) if len(other.lengths) == size)
            moves = [(last, starts[at])] if last != at else []
            moves += [(number, starts[number] - size) for number in range(last + 1, len(self.running))]
            for number, target in moves:
                for row, length in enumerate(self.running[number].lengths):
                    self.cache.copy(target + row, self.cache, starts[number] + row, length)
            self.running[at] = self.running[last]
            del self.running[last]
            self.free += size
            self.batch = None
