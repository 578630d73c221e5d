"""Decoding with continuous batching; a guided request is two rows of one batch.

Both rows of a guided request are fed the same tokens. Each row has its own positions, so that a
request gives the same tokens as alone, whatever the lengths of its two prompts and of the others are.
Requests that end leave the batch and waiting ones join it. Prompts are prefilled apart from the
decoding steps, and a beginning that several of them share is computed once. On a GPU, a batch that
stays the same for a few steps is captured as a CUDA graph: forward, head, guidance and sampling then
replay as one launch. A step that fails costs only the requests that fail alone. `cfgsafe.request` defines
what goes in and out; `cfgsafe.lockstep` and `cfgsafe.prefill` compute the tokens.

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

import re
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cfgsafe.errors import CfgsafeError, InputError
from cfgsafe.kernels.reference import NOT_FINITE
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lockstep import Batch, Results, Settings
from cfgsafe.lora import set_adapters
from cfgsafe.prefill import Prefill
from cfgsafe.request import Completion, Request, Running, check_request, slots_for

BATCH = 64  # requests decoded together
MEMORY_SHARE = 0.9  # of the device's free memory that the KV cache may take


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
        A running request has rows of the cache that no other one has; a waiting one has none.
        What the cache holds follows from the tokens of the running requests (`request.Running`).
        Rows of the cache beyond those, and slots beyond a row's length, are never read before they are
        written or cleared.
        `batch` holds the tensors of the running requests, or is None after one has joined or left.

    A step computes first and takes the tokens then. Where computing fails, it is tried again with each half
    of the requests, down to single ones: a request that fails alone ends as "failed", with the reason in
    its completion, and all others get the tokens that they get alone. `KeyboardInterrupt` and `SystemExit`
    go through, and the next step goes on from there.

    The cache has `rows` of `slots` positions each and is allocated at once. It takes at most
    `kv_bytes`, by default most of what the device has free; `rows` shrinks to fit. `log_path`, `skip`
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
        free = free_memory(model.device)
        if kv_bytes is None and free is not None:
            kv_bytes = int(MEMORY_SHARE * free)
        if kv_bytes is not None:
            rows = min(rows, kv_bytes // row_bytes)
        if rows < 1:
            raise InputError(
                f"the KV cache of one row of {slots} positions takes {row_bytes:,} bytes, "
                f"more than the {kv_bytes:,} allowed; shorten the prompts or lower max_new_tokens"
            )
        self.model, self.slots = model, slots
        self.cache = KVCache.empty(model.config, rows, slots, device=model.device, dtype=model.dtype)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.events: list[Event] = []  # that `step` has not returned yet
        self.submitted = 0
        self.settings = Settings(log_path, skip, graphs)
        self.prefill = Prefill(model, self.cache, self.settings)
        self.batch: Batch | None = None

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running or self.events)

    @property
    def free(self) -> int:
        """Number of rows of the cache that no request has."""
        return len(self._free_rows())

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
                self._forget(state)
                return state.completion
        return None

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute the next token of each running request, and the first of each that can join.

        The last event of a request has its completion; the engine then forgets the request.
        """
        whole = False
        try:
            self._attempt(self._decode, list(self.running))
            self._attempt(self.prefill, self._joining())
            whole = True
        finally:
            set_adapters(self.model, None)
            if not whole:
                self.batch = None
        events, self.events = self.events, []
        return events

    def _attempt(self, compute: Callable[[list[Running]], Results], states: list[Running]) -> None:
        """Give each of `states` its next token; where computing them fails, try each half apart."""
        if not states:
            return
        failure = ""
        try:
            tokens, logprobs = compute(states)
        except Exception as error:
            failure = reason(error)
        if not failure:  # after the block above, which keeps the tensors of a failed attempt alive
            for state, token, logprob in zip(states, tokens, logprobs, strict=True):
                self._take(state, token, logprob)
            return
        self.batch = None
        if len(states) == 1:
            self._end(states[0], "failed", failure)
            return
        half = len(states) // 2
        self._attempt(compute, states[:half])
        self._attempt(compute, states[half:])

    def _decode(self, states: list[Running]) -> Results:
        """The next tokens of some running requests, or of all, whose batch is kept for the next step."""
        if states != self.running:
            return Batch(self.model, self.cache, states, self.settings).step()
        if self.batch is None:
            self._close_gaps()
            self.batch = Batch(self.model, self.cache, states, self.settings)
        return self.batch.step()

    def _joining(self) -> list[Running]:
        """The first waiting requests, as many as there are free rows for; each is given its rows."""
        joining = []
        free = self._free_rows()
        for state in self.waiting:
            size = len(state.request.rows)
            if size > len(free):
                break
            state.rows, free = free[:size], free[size:]
            joining.append(state)
        return joining

    def _take(self, state: Running, token: int, logprob: float | None) -> None:
        """Add a token to the answer of a request, which then is a running one, or end it."""
        if token == NOT_FINITE:
            self._end(state, "failed", "the model gave numbers that are not finite")
        elif token < 0:
            self._end(state, "impossible")
        elif token in self.model.config.stop_ids:
            self._end(state, "stop")
        else:
            if not state.completion.tokens:
                self.waiting.remove(state)
                self.running.append(state)
                self.batch = None
            state.add(token, logprob)
            self.events.append(Event(state.request_id, token))
            if state.cut_stop_sequence():
                self._end(state, "stop")
            elif max(state.positions) + 1 >= slots_for(state.request, self.model):
                self._end(state, "length")

    def _end(self, state: Running, finish_reason: str, failure: str = "") -> None:
        """End a request, and hand out its completion."""
        state.completion.finish_reason, state.completion.failure = finish_reason, failure
        self.events.append(Event(state.request_id, completion=state.completion))
        self._forget(state)

    def _forget(self, state: Running) -> None:
        """Take a request out; its rows are free then."""
        if state in self.running:
            self.running.remove(state)
            self.batch = None
        else:
            self.waiting.remove(state)

    def _free_rows(self) -> list[int]:
        """The rows of the cache that no running request has, in order."""
        taken = {row for state in self.running for row in state.rows}
        return [row for row in range(len(self.cache.rows)) if row not in taken]

    def _close_gaps(self) -> None:
        """Move the last rows in use into the free rows before them, so that attention reads no others."""
        free = self._free_rows()
        used = len(self.cache.rows) - len(free)
        for state in self.running:
            for side, (row, length) in enumerate(zip(state.rows, state.positions, strict=True)):
                if row >= used:
                    self.cache.copy(free[0], self.cache, row, length)
                    state.rows[side] = free.pop(0)


def reason(error: Exception) -> str:
    """Why a request failed, in one line; for a bug, with the place where it was raised."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    if isinstance(error, CfgsafeError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has free; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")  # on Linux
    if device.type != "cpu" or not known.exists():
        return None
    found = re.search(r"MemAvailable:\s*(\d+) kB", known.read_text())
    return None if found is None else 1024 * int(found[1])
