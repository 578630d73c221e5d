"""The engine where something fails: what fails ends with its reason; all others are as they are alone."""

import random

import pytest
import torch
from conftest import random_model
from engine_faults import alone, poison, random_request, same, small_model, watch

import infer
from cfgsafe import decode
from cfgsafe.cli import run_command
from cfgsafe.decode import Completion, Engine, Request, generate
from cfgsafe.errors import InputError
from cfgsafe.llama import Llama
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach

VOCABULARY = 30
SETTINGS = pytest.mark.parametrize(
    "settings", [{}, {"skip": True}, {"log_path": "logits"}], ids=["", "skipping", "logits path"]
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return small_model(VOCABULARY)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(2)
    return [random_request(rng, VOCABULARY) for _ in range(14)]


def serve(engine: Engine, requests: list[Request], poisoned: bool = True) -> list[Completion]:
    """Their completions, in order. A step that is interrupted is called again."""
    numbers = {engine.submit(request): number for number, request in enumerate(requests)}
    completions: dict[int, Completion] = {}
    tokens: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    for _ in range(1000):
        if not engine.busy:
            break
        if poisoned:
            poison(engine)
        try:
            events = engine.step()
        except KeyboardInterrupt:
            continue
        for event in events:
            number = numbers[event.request_id]
            if event.token is not None:
                tokens[number].append(event.token)
            if event.completion:
                assert number not in completions
                completions[number] = event.completion
    assert engine.free == len(engine.cache.rows) and not engine.busy and not engine.events
    for number, completion in completions.items():  # streamed as they came, but for a stop sequence
        assert tokens[number][: len(completion.tokens)] == completion.tokens
    return [completions[number] for number in range(len(requests))]


@SETTINGS
def test_nothing_is_read_that_no_request_has_stored(model, requests, settings):
    engine = Engine(model, rows=5, slots=48, **settings)
    wanted = alone(model, requests, skip="skip" in settings)
    assert all(map(same, serve(engine, requests), wanted))


class Nth:
    """Raises `error` at the nth call, and at no other one."""

    def __init__(self, nth: int = -1, error: BaseException | None = None):
        self.left, self.error, self.calls = nth, error, 0

    def __call__(self, name: str, arguments: tuple) -> None:
        self.calls += 1
        self.left -= 1
        if self.left == 0 and self.error:
            raise self.error


@SETTINGS
@pytest.mark.parametrize(
    "error", [RuntimeError("no luck"), KeyboardInterrupt()], ids=["fails", "interrupted"]
)
def test_a_call_that_fails_costs_at_most_the_request_that_was_alone(model, requests, settings, error):
    """One of all the calls of all the steps, before it or after its work; 20 of them, drawn by chance."""
    wanted = alone(model, requests, skip="skip" in settings)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, counter := Nth())
        serve(Engine(model, rows=5, slots=48, **settings), requests)
    failures = 0
    for nth in random.Random(0).sample(range(1, counter.calls), 20):
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, Nth(nth, error))
            found = serve(Engine(model, rows=5, slots=48, **settings), requests)
        failed = [number for number, completion in enumerate(found) if completion.finish_reason == "failed"]
        failures += len(failed)
        assert len(failed) <= 1 and (not failed or isinstance(error, RuntimeError))
        for number, completion in enumerate(found):
            if number in failed:
                assert "RuntimeError: no luck (test_engine_failures.py:" in completion.failure
                assert completion.tokens == wanted[number].tokens[: len(completion.tokens)]
            else:
                assert completion.failure == "" and same(completion, wanted[number]), (nth, number)
    assert failures < 10  # most batches are cured by a second attempt in halves


@SETTINGS
@pytest.mark.parametrize("prompts", [True, False], ids=["its prompt", "its answer"])
def test_a_request_that_always_fails_ends_alone(model, requests, settings, prompts):
    """Token 12 cannot be computed, in prompts or in answers."""

    def strike(name: str, arguments: tuple) -> None:
        if prompts:
            guilty = name == "forward" and (arguments[1] == 12).any() and arguments[1].shape[1] > 1
        else:
            numbers = arguments[1] if name == "_feed" else range(99)
            states = arguments[0].running if name in ("_feed", "_advance") else []
            guilty = any(n in numbers and state.completion.tokens[-1] == 12 for n, state in enumerate(states))
        if guilty:
            raise RuntimeError("token 12\nis not for us")

    wanted = alone(model, requests, skip="skip" in settings)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, strike)
        found = serve(Engine(model, rows=5, slots=48, **settings), requests)
    failed = 0
    for request, completion, free in zip(requests, found, wanted, strict=True):
        fed = free.tokens if free.finish_reason == "stop" else free.tokens[:-1]
        if 12 in (sum(request.rows, []) if prompts else fed):
            assert completion.finish_reason == "failed"
            assert completion.failure.startswith("RuntimeError: token 12 is not for us (")
            assert completion.tokens == ([] if prompts else free.tokens[: free.tokens.index(12) + 1])
            failed += 1
        else:
            assert same(completion, free)
    assert 0 < failed < len(requests)


def test_out_of_memory_is_cured_by_smaller_parts(model, requests):
    def strike(name: str, arguments: tuple) -> None:
        if name == "forward" and arguments[1].shape[0] > 2:
            raise torch.OutOfMemoryError("too much")

    wanted = alone(model, requests)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, strike)
        assert all(map(same, serve(Engine(model, rows=9, slots=48), requests), wanted))


def test_a_fault_of_all_requests_is_not_hidden(model, requests, monkeypatch):
    def broken(*_):
        raise IndexError("a bug")

    monkeypatch.setattr(Llama, "forward", broken)
    for completion in generate(model, requests):
        assert completion.finish_reason == "failed" and not completion.tokens
        assert completion.failure.startswith("IndexError: a bug (test_engine_failures.py:")


def test_a_request_whose_adapter_is_not_finite_fails_alone():
    model = random_model()
    for name in ("default", "other"):
        attach(model, LoRAConfig(rank=2), name)
    for parameter in adapter_parameters(model, "other").values():
        parameter.data.fill_(torch.nan)
    model.double().requires_grad_(False)
    requests = [Request([5, 6], max_new_tokens=4, adapter=name) for name in ("default", "other", None)]
    requests.append(Request([5], [6], guidance=3.0, max_new_tokens=4, adapter="other", space="log"))
    found, wanted = serve(Engine(model, rows=5, slots=8), requests), alone(model, requests)
    assert same(found[0], wanted[0]) and same(found[2], wanted[2])
    for completion in (found[1], found[3], wanted[1], wanted[3]):
        assert completion.finish_reason == "failed" and completion.tokens == []
        assert completion.failure == "the model gave numbers that are not finite"


def test_a_skipped_negative_row_leaves_no_log_probability(model, requests):
    skipped, full = alone(model, requests, skip=True), alone(model, requests)
    for one, other in zip(skipped, full, strict=True):
        assert one.tokens == other.tokens
        for found, wanted in zip(one.logprobs, other.logprobs, strict=True):
            assert found is None or found == pytest.approx(wanted, abs=1e-6)
        assert one.skipped == one.logprobs.count(None)
    assert 0 < sum(completion.skipped for completion in skipped) < 40
    assert not any(completion.skipped for completion in full)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (
            Request([1, VOCABULARY]),
            "the prompt holds '30', which is no token id; those are whole numbers from 0",
        ),
        (Request([1, -1]), "the prompt holds '-1'"),
        (Request([1, True]), "the prompt holds 'True'"),
        (Request([1, 2.0]), "the prompt holds '2.0'"),
        (Request("abc"), "the prompt must be a list of token ids, not 'abc'"),
        (Request([]), "the prompt is empty"),
        (Request([1], [1, 99]), "the negative prompt holds '99'"),
        (Request([1], [], guidance=2.0), "the negative prompt is empty"),
        (Request([1], stop=((1, 2), (1, 99))), "a stop sequence holds '99'"),
        (Request([1], stop=((),)), "a stop sequence is empty"),
        (Request([1], stop=(7,)), "a stop sequence must be a list of token ids, not '7'"),
        (Request([1], [2], guidance=1e308), "guidance 1e.308: must be at most 1000"),
        (Request([1], [2], guidance=float("nan")), "guidance nan: must be a finite number"),
        (Request([1], temperature=1e9), "temperature 1000000000.0: must be at most 1000"),
        (Request([1], alpha=1.5), "alpha 1.5: must be at most 1"),
    ],
)
def test_a_request_that_cannot_be_computed_is_refused_when_it_is_submitted(model, request_, why):
    engine = Engine(model, rows=2, slots=200)
    with pytest.raises(InputError, match=f"^request 0: {why}"):
        engine.submit(request_)
    assert not engine.busy


def test_a_stop_sequence_may_be_a_list(model):
    free = generate(model, [Request([5, 6], max_new_tokens=6)])[0].tokens
    done = generate(model, [Request([5, 6], max_new_tokens=6, stop=[free[2:4]])])[0]
    assert done.finish_reason == "stop" and len(done.tokens) < 6


def test_a_temperature_that_float32_cannot_divide_by_is_greedy(model):
    greedy, cold = (
        generate(model, [Request([5, 6], max_new_tokens=6, temperature=temperature)])[0]
        for temperature in (0.0, 1e-44)
    )
    assert cold.tokens == greedy.tokens


def test_a_cache_takes_no_more_than_the_free_memory(model, monkeypatch):
    assert decode.free_memory(torch.device("cpu")) > 0
    monkeypatch.setattr(decode, "free_memory", lambda device: 1_000_000)
    row = 50 * 2 * 8 * 8  # keys and values of 50 positions: one layer, one head of 8 numbers of 8 bytes
    assert len(Engine(model, rows=1000, slots=50).cache.rows) == 900_000 // row
    with pytest.raises(InputError, match="^the KV cache of one row of 10000 positions takes 1,280,000 bytes"):
        Engine(model, rows=1, slots=10_000)


@pytest.mark.parametrize("options", [["--json"], [], ["--json", "--explain"]])
def test_infer_says_which_answer_failed_and_ends_with_code_2(
    checkpoint, tmp_path, monkeypatch, capsys, options
):
    """The first of two lines fails; the other is answered."""
    lines = [
        '{"prompt": "Hello there, who are you and what is your name?"}',
        '{"prompt": "Hi", "max_new_tokens": 3}',
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    sizes: list[int] = []

    def strike(name: str, arguments: tuple) -> None:
        sizes.append(arguments[1].shape[1] if name == "forward" else 0)
        if sizes[-1] == max(sizes) > 4:
            raise RuntimeError("too long")

    watch(monkeypatch, strike)
    given = infer.Options(model=checkpoint, requests=str(tmp_path / "r.jsonl"))
    given.json, given.explain = "--json" in options, "--explain" in options
    monkeypatch.setattr("sys.argv", ["infer.py"])
    with pytest.raises(SystemExit) as ended:
        run_command(infer.run, given)
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert (
        ended.value.code == 2 and '"finish_reason": "failed", "failure": "RuntimeError: too long (' in first
    )
    assert '"failure": ""' in second and '"finish_reason": "length"' in second
    assert err.count("\n") == 1 and err.startswith(
        f"error: {tmp_path}/r.jsonl:1: the answer failed: RuntimeError"
    )
