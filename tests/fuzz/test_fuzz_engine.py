"""Random requests with failing calls: each row that survives equals its solo run, and memory stays flat.

Requests join at random moments, some are cancelled, and one call of a hundred inside a step fails or is
interrupted, before its work or after it. What no request has stored is NaN: a row as soon as it is left,
and all that is free between steps (tests/engine_faults.py).
A case is the life of an engine with 100 requests.
"""

import gc
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_faults import alone, poison, random_request, same, small_model, watch

from cfgsafe.decode import Completion, Engine
from cfgsafe.request import Running

pytestmark = pytest.mark.slow
REQUESTS = 100  # of a case
SHARE = 0.01  # of the calls fail
WARM = 3  # cases before memory must stay flat
ROOM = 64 * 2**20  # bytes that the process may grow by after them: allocators keep some
ERRORS = (RuntimeError, torch.OutOfMemoryError, IndexError, KeyboardInterrupt)


@pytest.fixture(scope="module")
def model():
    return small_model(30)


def test_survivors_equal_their_solo_runs(cases, model, capsys):
    counts: Counter[str] = Counter()
    tensors = memory = 0
    for number, rng in enumerate(cases):
        one_life(rng, model, counts)
        if number == WARM:
            tensors, memory = live_tensors(), resident()
        elif number > WARM:
            assert live_tensors() == tensors
            assert resident() < memory + ROOM
    with capsys.disabled():
        print(f"\n{dict(counts)}; grown by {resident() - memory:,} bytes")


def one_life(rng: random.Random, model, counts: Counter[str]) -> None:
    """An engine that serves REQUESTS requests; counts what happens."""
    settings = rng.choice(({}, {"skip": True}, {"log_path": "logits"}))
    engine = Engine(model, rows=rng.randrange(2, 12), slots=48, **settings)
    requests = [random_request(rng, model.config.vocab_size) for _ in range(REQUESTS)]
    numbers: dict[int, int] = {}
    completions: dict[int, Completion] = {}

    def strike(name: str, arguments: tuple) -> None:
        counts["calls"] += 1
        if rng.random() < SHARE:
            counts["failing calls"] += 1
            raise rng.choice(ERRORS)("no luck")

    leave = Engine._forget

    def leave_nothing(engine: Engine, state: Running) -> None:
        rows = state.rows if state in engine.running else []
        leave(engine, state)
        for stored in (engine.cache.keys, engine.cache.values):
            stored[:, rows] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_forget", leave_nothing)
        watch(patch, strike)
        while len(numbers) < REQUESTS or engine.busy:
            for _ in range(rng.randrange(12)):
                if len(numbers) < REQUESTS:
                    numbers[engine.submit(requests[len(numbers)])] = len(numbers)
            poison(engine)
            try:
                for event in engine.step():
                    if event.completion:
                        assert event.request_id not in completions
                        completions[event.request_id] = event.completion
            except KeyboardInterrupt:
                counts["interrupted steps"] += 1
            counts["steps"] += 1
            known = [*engine.waiting, *engine.running]
            if known and rng.random() < 0.1:
                victim = rng.choice(known).request_id
                ended = engine.cancel(victim)
                assert ended is not None and victim not in completions
                completions[victim] = ended
    assert engine.free == len(engine.cache.rows) and set(completions) == set(numbers)
    wanted = alone(model, requests, skip="skip" in settings)
    for request_id, number in numbers.items():
        found, free = completions[request_id], wanted[number]
        counts["requests"] += 1
        counts[found.finish_reason] += 1
        assert bool(found.failure) == (found.finish_reason == "failed")
        if found.finish_reason in ("failed", "cancelled"):  # what it had by then
            assert found.tokens == free.tokens[: len(found.tokens)] or request_cut(found, free)
        else:
            assert same(found, free), number


def request_cut(found: Completion, free: Completion) -> bool:
    """Whether an answer goes on into the stop sequence that ends the other one."""
    return free.finish_reason == "stop" and found.tokens[: len(free.tokens)] == free.tokens


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def resident() -> int:
    """Bytes of memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages
