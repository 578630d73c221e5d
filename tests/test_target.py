"""Targets: the named adapter answers, a missing answer is None, and a budget is never exceeded."""

import endpoint
import pytest
import torch
import tyro
from conftest import random_model

from cfgsafe.decode import Request, generate
from cfgsafe.errors import InputError
from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.red import target
from cfgsafe.red.target import LocalTarget, Options, RemoteTarget, check
from cfgsafe.remote import Service
from cfgsafe.subject import NEGATIVE, POSITIVE
from cfgsafe.tokenizer import with_system


def said(text: str, system: str | None = None) -> list[dict]:
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": text}]


def local(**changes) -> Options:
    return Options("m", **{"answer_tokens": 8, "temperature": 1.0, **changes})


def remote(budget: int | None = None, **changes) -> Options:
    return Options(budget=budget, service=Service(**{"remote_model": "m", "timeout": 5.0, **changes}))


@pytest.fixture
def shared():
    """A model with the adapters of an attacker and of a target."""
    model = random_model()
    torch.manual_seed(1)
    for name in ("attacker", "target"):
        for parameter in attach(model, LoRAConfig(rank=2), name):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


CHATS, SEEDS = [said(f"Number {n}", "Be kind." if n % 2 else None) for n in range(6)], list(range(6))


def test_the_named_adapter_answers_whatever_else_is_attached(shared, tokenizer):
    answers = {
        name: LocalTarget(local(), shared, tokenizer, name).ask(CHATS, SEEDS)
        for name in ("attacker", "target", None)
    }
    assert len({tuple(texts) for texts in answers.values()}) == 3
    assert answers[None] == LocalTarget(local(), random_model(), tokenizer).ask(CHATS, SEEDS)
    with pytest.raises(InputError, match="no adapter 'default' is attached"):
        LocalTarget(local(), shared, tokenizer).ask(CHATS, SEEDS)


def test_requests_are_the_conversations_own_with_the_settings_asked_for(shared, tokenizer, monkeypatch):
    asked = []

    def listen(model, requests, **more):
        asked.append((requests, more))
        return generate(model, requests, **more)

    monkeypatch.setattr(target, "generate", listen)
    answers = LocalTarget(local(top_p=0.7, batch=3), shared, tokenizer, "target").ask(CHATS, SEEDS)
    sampling = dict(temperature=1.0, top_p=0.7, max_new_tokens=8, adapter="target")
    plain = [
        Request(tokenizer.encode_chat(chat), seed=seed, **sampling)
        for chat, seed in zip(CHATS, SEEDS, strict=True)
    ]
    assert asked.pop() == (plain, {"batch": 3})
    assert answers == [tokenizer.decode(done.tokens) for done in generate(shared, plain)]
    LocalTarget(local(guidance=2.0, space="log", alpha=0.1), shared, tokenizer, None).ask(CHATS[1:2], [7])
    (request,) = asked.pop()[0]
    assert (request.guidance, request.space, request.alpha, request.adapter, request.seed) == (
        2.0,
        "log",
        0.1,
        None,
        7,
    )
    assert request.prompt == tokenizer.encode_chat(with_system(CHATS[1], POSITIVE))
    assert request.negative == tokenizer.encode_chat(with_system(CHATS[1], NEGATIVE))


def test_an_empty_answer_is_an_answer(tokenizer):
    model = random_model()
    model.config = type(model.config)(**{**vars(model.config), "eos_token_id": list(range(2048))})
    assert LocalTarget(local(), model, tokenizer).ask(CHATS[:2], SEEDS[:2]) == ["", ""]


def test_a_conversation_that_does_not_fit_has_no_answer_and_costs_nothing(tokenizer):
    model, chats = random_model(), [said("word " * 600), *CHATS[:3]]
    ours = LocalTarget(local(budget=2), model, tokenizer)
    assert not ours.spent
    answers = ours.ask(chats, [9, *SEEDS[:3]])
    assert answers == [None, *LocalTarget(local(), model, tokenizer).ask(CHATS[:2], SEEDS[:2]), None]
    assert ours.calls == 2 and ours.spent
    assert ours.ask(chats, SEEDS[:4]) == [None] * 4 and ours.calls == 2
    length = len(tokenizer.encode_chat(CHATS[0]))
    for limit in (length, length + 1):
        (answer,) = LocalTarget(local(), random_model(max_position_embeddings=limit), tokenizer).ask(
            CHATS[:1], [0]
        )
        assert (answer is None) == (limit == length)
    guided = LocalTarget(local(guidance=2.0, positive="Hi.", negative="word " * 600), model, tokenizer)
    assert guided.ask(CHATS[:1], [0]) == [None] and guided.calls == 0


def echo(body: dict) -> str:
    return f"re: {body['messages'][-1]['content']} {body['seed']}"


def test_every_fault_of_an_endpoint_ends_in_its_answer_or_none(serve, tmp_path):
    server = serve(echo, share=0.4, stall=1.3)
    ours = RemoteTarget(remote(timeout=1.0, concurrency=20, attempts=2), tmp_path / "c.jsonl")
    chats, seeds = [said(f"q{n // 5}") for n in range(60)], list(range(60))
    answers = ours.ask(chats, seeds)
    assert all(answer in (None, f"re: q{n // 5} {n}") for n, answer in enumerate(answers))
    assert 0 < answers.count(None) < 40 and 60 - answers.count(None) == len(server.answered)
    assert ours.calls == len(server.bodies) and not ours.spent
    assert all(server.failed[fault] for fault in endpoint.FAULTS)

    resumed = RemoteTarget(remote(attempts=5), tmp_path / "c.jsonl")
    assert resumed.ask(chats, seeds) == [f"re: q{n // 5} {n}" for n in range(60)]
    assert resumed.calls == len(server.bodies) - ours.calls and set(server.answered.values()) == {1}
    assert RemoteTarget(remote(), tmp_path / "c.jsonl").ask(chats, seeds) == resumed.ask(chats, seeds)
    assert len(server.bodies) == ours.calls + resumed.calls


@pytest.mark.parametrize("faults", [("drop",), ("rate limit",), ("error", "empty")])
def test_a_budget_bounds_requests_with_their_retries(serve, tmp_path, faults):
    server = serve(echo, faults=faults, share=1.0, last_fault=1)
    ours = RemoteTarget(remote(budget=25, concurrency=8), tmp_path / "c.jsonl")
    answers = ours.ask([said("q")] * 20, list(range(20)))
    assert len(server.bodies) == ours.calls == 25 and ours.spent
    assert sum(server.answered.values()) == 20 - answers.count(None) <= 12
    assert ours.ask([said("r")], [0]) == [None] and len(server.bodies) == 25


def test_what_is_sent(serve, tmp_path):
    server = serve(echo)
    RemoteTarget(remote(), tmp_path / "c.jsonl").ask([said("q", "Be kind.")], [3])
    sampling = {"max_tokens": 64, "temperature": 0.1, "top_p": 0.9, "seed": 3}
    assert server.bodies == [
        {"model": "m", "messages": said("q", "Be kind."), **sampling, "path": "/v1/chat/completions"}
    ]


def test_a_refused_attack_has_no_answer_and_a_refused_key_ends_the_run(serve, tmp_path):
    server = serve(lambda body: 400 if "bomb" in echo(body) else echo(body))
    ours = RemoteTarget(remote(), tmp_path / "c.jsonl")
    assert ours.ask([said("a"), said("bomb"), said("c")], [1, 2, 3]) == ["re: a 1", None, "re: c 3"]
    server.status = 401
    with pytest.raises(InputError, match="set OPENAI_API_KEY") as caught:
        ours.ask([said("d")], [4])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), "give one target"),
        (Options("m", service=Service("r")), "give one target"),
        (Options(adapter="a", service=Service("r")), "need a --target"),
        (Options(guidance=1.0, service=Service("r")), "need a --target"),
        (Options(service=Service("r", attempts=0)), "--attempts 0"),
        (Options("m", temperature=-0.1), "--temperature -0.1"),
        (Options("m", temperature=float("nan")), "--temperature nan"),
        (Options("m", top_p=0.0), "--top-p 0.0"),
        (Options("m", top_p=1.1), "--top-p 1.1"),
        (Options("m", answer_tokens=0), "--answer-tokens 0"),
        (Options("m", budget=0), "--budget 0"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(quick, options, words):
    with pytest.raises(InputError, match=words):
        check(options)


def test_options_that_can_be_pass(quick):
    check(Options("m", adapter="a", guidance=3.0, temperature=0.0, top_p=1.0, budget=1))
    check(Options(service=Service("r")))
    check(tyro.cli(Options, args=["--target", "m", "--adapter", "a"]))


def test_help_calls_the_model_target(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Options, args=["--help"])
    assert "--target" in (text := capsys.readouterr().out) and "--model" not in text.replace(
        "--remote-model", ""
    )
