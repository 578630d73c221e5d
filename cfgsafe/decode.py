"""Decoding with continuous batching; a guided request is two rows of one batch.

Both rows of a guided request are fed the same tokens. Each row has its own positions, so that a
request gives the same tokens as alone, whatever the lengths of its two prompts and of the others are.
Requests that end leave the batch and waiting ones join it. Prompts are prefilled apart from the
decoding steps, and a beginning that several of them share is computed once. On a GPU, a batch that
stays the same for a few steps is captured as a CUDA graph: forward, head, guidance and sampling then
replay as one launch. `cfgsafe.request` defines what goes in and out; `cfgsafe.lockstep` and
`cfgsafe.prefill` compute the tokens.

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from cfgsafe.errors import InputError
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lockstep import Batch, Settings
from cfgsafe.lora import set_adapters
from cfgsafe.prefill import Prefill
from cfgsafe.request import Completion, Request, Running, check_request, slots_for

BATCH = 64  # requests decoded together
GPU_SHARE = 0.9  # of the free GPU memory that the KV cache may take


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step: it has a new token, or it has ended with a completion."""

    request_id: int
    token: int | None = None
    completion: Completion | None = None


def generate(
    model: Llama,
    requests: list[Request],
    *,
    batch: int = BATCH,
    skip: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Answer `requests`, at most `batch` at a time; returns the completions in the same order.

    on_token(number, token) is called for each token as it comes, and on_completion(number,
    completion) for each answer when it ends; number is the request's place in the list. `skip`: see
    cfgsafe.lockstep.Settings. Raises InputError or ContextError for a request that cannot be
    served.
    """
    if batch < 1:
        raise InputError(f"batch {batch}: must be at least 1")
    for number, request in enumerate(requests):
        check_request(request, model, f"request {number}")
    if not requests:
        return []
    slots = max(slots_for(request, model) for request in requests)
    row_counts = sorted((len(request.rows) for request in requests), reverse=True)
    engine = Engine(model, rows=sum(row_counts[:batch]), slots=slots, skip=skip)

    # Longest prompts first: prompts of similar length are prefilled together, with little padding.
    longest_first = sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt))
    number_of = {}
    for number in longest_first:
        number_of[engine.submit(requests[number])] = number

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


class Engine:
    """Serves requests as they come: `submit` them, then call `step` while the engine is `busy`.

    Invariants between steps:
        The rows in use are the first rows of the cache, without a gap; `free` counts the others.
        Rows have the order of the requests in `running`.
        The positive row of a guided request comes right before its negative row.
        `batch` holds the tensors of the running requests, or is None after one has joined or left.

    The cache has `rows` of `slots` positions each and is allocated at once. It takes at most
    `kv_bytes`, by default most of what a GPU has free; `rows` shrinks to fit. `log_path`, `skip`
    and `graphs`: see cfgsafe.lockstep.Settings. Raises InputError when not even one row fits.
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
        row_bytes = slots * KVCache.bytes_a_slot(model.config, model.dtype)
        if kv_bytes is None and model.device.type == "cuda":
            kv_bytes = int(GPU_SHARE * torch.cuda.mem_get_info(model.device)[0])
        if kv_bytes is not None:
            rows = min(rows, kv_bytes // row_bytes)
        if rows < 1:
            raise InputError(
                f"the KV cache of one row of {slots} positions takes {row_bytes:,} bytes, "
                f"more than the {kv_bytes:,} allowed"
            )
        self.model, self.slots = model, slots
        self.cache = KVCache.empty(model.config, rows, slots, device=model.device, dtype=model.dtype)
        self.free = rows
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.submitted = 0
        self.settings = Settings(log_path, skip, graphs)
        self.prefill = Prefill(model, self.cache, self.settings)
        self.batch: Batch | None = None

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises InputError when it could never fit into the cache, and what `check_request` raises.
        """
        request_id = self.submitted
        check_request(request, self.model, f"request {request_id}")
        needed, rows = slots_for(request, self.model), len(self.cache.rows)
        if needed > self.slots or len(request.rows) > rows:
            raise InputError(
                f"request {request_id}: {len(request.rows)} rows of {needed} tokens do not fit in the KV "
                f"cache of {rows} rows of {self.slots}; shorten the prompt, lower max_new_tokens or make "
                "the cache larger"
            )
        self.submitted += 1
        self.waiting.append(Running(request_id, request, Completion(), time.perf_counter()))
        return request_id

    def cancel(self, request_id: int) -> Completion | None:
        """End a request now and return its answer so far; None when it is not waiting or running."""
        for state in [*self.waiting, *self.running]:
            if state.request_id == request_id:
                state.completion.finish_reason = "cancelled"
                if state in self.running:
                    self._leave(state)
                else:
                    self.waiting.remove(state)
                return state.completion
        return None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute the next token of each running request, and the first of each that can join.

        The last event of a request has its completion; the engine then forgets the request.
        """
        events: list[Event] = []
        try:
            if self.running:
                if self.batch is None:
                    self.batch = Batch(self.model, self.cache, self.running, self.settings)
                tokens, logprobs = self.batch.step()
                events += self._take(self.running, tokens, logprobs)
            first_row = len(self.cache.rows) - self.free
            joining = self._join()
            if joining:
                tokens, logprobs = self.prefill(joining, first_row)
                events += self._take(joining, tokens, logprobs)
        finally:
            set_adapters(self.model, None)
        return events

    def _join(self) -> list[Running]:
        """Move waiting requests to the running ones, in their order, while rows are free."""
        joining = []
        while self.waiting and len(self.waiting[0].request.rows) <= self.free:
            state = self.waiting.popleft()
            state.lengths = [len(prompt) for prompt in state.request.rows]
            self.free -= len(state.lengths)
            joining.append(state)
        if joining:
            self.running += joining
            self.batch = None
        return joining

    def _take(self, states: list[Running], tokens: list[int], logprobs: list[float]) -> list[Event]:
        """Give each request its next token; requests that end leave. Returns the events."""
        events, ended = [], []
        for state, token, logprob in zip(states, tokens, logprobs, strict=True):
            reason = self._end_before(token)
            if reason is None:
                state.add(token, logprob)
                events.append(Event(state.request_id, token))
                reason = self._end_after(state)
            if reason is not None:
                state.completion.finish_reason = reason
                events.append(Event(state.request_id, completion=state.completion))
                ended.append(state)
        for state in ended:
            self._leave(state)
        return events

    def _end_before(self, token: int) -> str | None:
        """The finish reason when `token` ends the answer without being part of it, else None."""
        if token < 0:
            return "impossible"
        return "stop" if token in self.model.config.stop_ids else None

    def _end_after(self, state: Running) -> str | None:
        """The finish reason when the last token ends the answer, else None. Stop sequences are cut off."""
        if state.cut_stop_sequence():
            return "stop"
        filled = max(map(len, state.request.rows)) + len(state.completion.tokens)
        return None if filled < slots_for(state.request, self.model) else "length"

    def _leave(self, state: Running) -> None:
        """Free the rows of a running request, and close the gap that they leave.

        The last request with as many rows moves into the gap; the requests behind that one move up.
        """
        gap, size = self.running.index(state), len(state.lengths)
        sizes = [len(other.lengths) for other in self.running]
        starts = list(accumulate(sizes, initial=0))  # first row of each request
        filler = max(number for number in range(len(sizes)) if sizes[number] == size)
        if filler != gap:
            self._move(self.running[filler], starts[filler], starts[gap])
        for number in range(filler + 1, len(self.running)):
            self._move(self.running[number], starts[number], starts[number] - size)
        self.running[gap] = self.running[filler]
        del self.running[filler]
        self.free += size
        self.batch = None

    def _move(self, state: Running, source: int, target: int) -> None:
        """Copy the filled slots of a request's rows, from row `source` on to row `target` on."""
        for row, length in enumerate(state.lengths):
            self.cache.copy(target + row, self.cache, source + row, length)
