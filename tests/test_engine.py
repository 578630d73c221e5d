"""The engine under 10,000 random requests: each row as in its solo run, and no row of the cache lost.

Also joining, cancelling, shared beginnings, skipping and limits.
"""

import random

import engine_faults
import pytest
import torch
from conftest import random_model

from cfgsafe import lockstep
from cfgsafe.decode import Completion, Engine, Request, generate
from cfgsafe.errors import InputError
from cfgsafe.kernels import reference
from cfgsafe.llama import KVCache
from cfgsafe.lockstep import Batch, Settings
from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.request import Running


@pytest.fixture(scope="module")
def model():
    """In float64, where the order of a sum cannot change an argmax. Some requests use its adapter."""
    model = random_model(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=3,
    )
    torch.manual_seed(1)
    for parameter in attach(model, LoRAConfig(rank=2)):
        torch.nn.init.normal_(parameter, std=0.3)
    model.model.norm.weight.data.mul_(8)  # for answers of which some tokens are sure and others are not
    return model.double().requires_grad_(False)


def random_request(rng: random.Random) -> Request:
    return engine_faults.random_request(rng, 50, ("default", None), longest_prompt=13)


def same(one: Completion, other: Completion) -> bool:
    return one.tokens == other.tokens and one.finish_reason == other.finish_reason


def serve(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Their completions, in order, each handed out exactly once."""
    request_ids = [engine.submit(request) for request in requests]
    completions = {}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                assert event.request_id not in completions
                completions[event.request_id] = event.completion
    return [completions[request_id] for request_id in request_ids]


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_equal_their_solo_runs(model, count):
    """They join at random moments and some are cancelled. Every tenth is also run alone."""
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(count)]
    engine = Engine(model, rows=48, slots=48)
    todo, request_ids, completions, cancelled = list(enumerate(requests)), {}, {}, set()
    while todo or engine.busy:
        for number, request in todo[: rng.randrange(40)]:
            request_ids[number] = engine.submit(request)
        todo = todo[len(request_ids) - len(requests) :] if len(request_ids) < len(requests) else []
        completions |= {event.request_id: event.completion for event in engine.step() if event.completion}
        if rng.random() < 0.5 and engine.running:
            victim = rng.choice(engine.running)
            completions[victim.request_id] = engine.cancel(victim.request_id)
            cancelled.add(victim.request_id)
        taken = [row for state in engine.running for row in state.rows]
        assert len(taken) == len(set(taken)) == 48 - engine.free
    assert engine.free == 48 and not engine.running and not engine.waiting
    assert count / 50 < len(cancelled)
    assert {completion.finish_reason for completion in completions.values()} == {
        "stop",
        "length",
        "cancelled",
    }
    for number in range(0, len(requests), 10):
        found, alone = completions[request_ids[number]], generate(model, [requests[number]])[0]
        if request_ids[number] in cancelled:
            assert found.tokens == alone.tokens[: len(found.tokens)]
        else:
            assert same(found, alone), number


@pytest.mark.parametrize(
    "settings", [{"log_path": "logits"}, {"skip": True}], ids=["logits path", "skipping"]
)
def test_other_paths_give_the_same_tokens(model, settings):
    rng = random.Random(1)
    requests = [random_request(rng) for _ in range(400)]
    found = []
    for changes in ({}, settings):
        found.append(serve(Engine(model, rows=32, slots=48, **changes), requests))
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    if "skip" in settings:
        guided = [
            completion for request, completion in zip(requests, found[1], strict=True) if request.guided
        ]
        skipped = sum(completion.skipped for completion in guided)
        assert 0 < skipped < sum(len(completion.tokens) for completion in guided)


def test_a_shared_beginning_is_computed_once(model):
    shared = list(range(4, 44))
    requests = [Request(shared + [n, n + 1], max_new_tokens=2) for n in range(5, 25)]
    engine = Engine(model, rows=10, slots=48)
    completions = serve(engine, requests)
    assert engine.prefill.computed < len(shared) + 20 * 3  # not 20 times
    assert all(same(one, generate(model, [r])[0]) for one, r in zip(completions, requests, strict=True))


def test_what_does_not_fit_is_refused_and_what_must_wait_waits(model):
    engine = Engine(model, rows=2, slots=32)
    with pytest.raises(InputError, match="1 rows of 40 tokens do not fit in the KV cache of 2 rows of 32"):
        engine.submit(Request([5] * 30, max_new_tokens=10))
    for _ in range(3):
        engine.submit(Request([5], [6, 7], guidance=2.0, max_new_tokens=3))
    engine.step()
    assert len(engine.running) == 1 and len(engine.waiting) == 2
    with pytest.raises(InputError, match="more than the 100 allowed"):
        Engine(model, rows=2, slots=32, kv_bytes=100)
    small = Engine(model, rows=1000, slots=32, kv_bytes=32 * 2 * 8 * 8 * 5)
    assert small.free == 5


def test_the_last_rows_move_into_the_gap_that_a_request_leaves(model):
    """So attention reads the first rows of the cache where they lie, and no others."""
    engine = Engine(model, rows=5, slots=32)
    requests = [Request([5], [6], guidance=2.0, max_new_tokens=2)]
    requests += [Request([n], max_new_tokens=5 + n) for n in (7, 8, 9)]
    for request in requests:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    assert engine.batch.gapless and [state.rows for state in engine.running] == [[2], [0], [1]]


@pytest.mark.parametrize("log_path", ["hidden", "logits"])
def test_a_step_never_asks_the_device_for_a_value(monkeypatch, log_path):
    """So a CUDA graph can hold it. On the meta device such a question is an error."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)  # no short cuts of the CPU
    by_reference = lambda model, hidden, sampling: reference.next_tokens(model.head(hidden), sampling)
    monkeypatch.setattr(lockstep, "head_tokens", by_reference)  # instead of the kernels
    model = random_model().to("meta")
    attach(model, LoRAConfig(rank=2))
    states, rows = [], list(range(40))
    for number in range(20):
        request = random_request(random.Random(number))
        state = Running(number, request, Completion(), 0.0, rows[: len(request.rows)])
        del rows[: len(request.rows)]
        state.add(5, 0.0)
        states.append(state)
    cache = KVCache.empty(model.config, 40, 64, device=model.device, dtype=model.dtype)
    batch = Batch(model, cache, states, Settings(log_path))
    batch._make_room()
    changing = (batch.tokens, batch.logprobs, batch.positions, batch.sampler.sampling.step)
    with torch.no_grad():
        batch._advance()
        batch._advance()
    # In place, because the next replay of the graph reads these tensors.
    assert [tensor._version for tensor in changing] == [2, 2, 2, 2]
    held = [*vars(batch).values(), *vars(batch.sampler).values(), *vars(batch.sampler.sampling).values()]
    assert all(value.is_meta for value in held if isinstance(value, torch.Tensor))


def test_stop_sequences_are_cut_off(model):
    free = generate(model, [Request([5, 6], max_new_tokens=8, adapter=None)])[0].tokens
    ending = tuple(free[2:4])
    done = generate(model, [Request([5, 6], max_new_tokens=8, adapter=None, stop=(ending,))])[0]
    start = next(n for n in range(8) if tuple(free[n : n + 2]) == ending)
    assert done.finish_reason == "stop" and done.tokens == free[:start]
    assert len(done.logprobs) == start


def test_on_token_is_called_as_they_come(model):
    streamed = {0: [], 1: []}
    requests = [Request([5]), Request([6, 7], [8], guidance=3.0)]
    done = generate(model, requests, on_token=lambda number, token: streamed[number].append(token))
    assert [streamed[n] for n in (0, 1)] == [completion.tokens for completion in done]
    for completion in done:
        assert len(completion.logprobs) == len(completion.tokens) and max(completion.logprobs) <= 0


def test_speed_counts_decoding_alone_and_the_first_token_its_wait(model, monkeypatch):
    """A clock that a step moves by a second; a request waits five seconds for the rows of another one."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    engine = Engine(model, rows=1, slots=32)
    for _ in range(2):
        engine.submit(Request([1, 2, 3], max_new_tokens=5))
    clock[0] += 2  # before the first step: prefill gives the first token
    completions = []
    while engine.busy:
        completions += [event.completion for event in engine.step() if event.completion]
        clock[0] += 1
    one, other = completions
    assert len(one.tokens) == len(other.tokens) == 5
    assert (one.first_token_seconds, one.tokens_per_second) == (2.0, 1.0)
    assert (other.first_token_seconds, other.tokens_per_second) == (6.0, 1.0)


def test_an_answer_of_one_token_has_no_speed_and_one_of_none_no_first_token(model):
    (one,) = generate(model, [Request([1, 2, 3], max_new_tokens=1)])
    assert one.tokens_per_second == 0.0 and one.first_token_seconds > 0
    assert Completion().first_token_seconds is None
