"""Perplexity of dialogues under a guided subject, by hand; what it refuses."""

import json
import math

import pytest
import torch

from cfgsafe import subject
from cfgsafe.errors import ContextError, InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import CHATS
from cfgsafe.measure import perplexity, scoring
from cfgsafe.subject import NEGATIVE, POSITIVE

USER, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "More"}
ONE, TWO = {"role": "assistant", "content": "Hello you"}, {"role": "assistant", "content": " There is more. "}
DIALOGUES = [{"messages": [USER, ONE, MORE, TWO]}, {"messages": [USER, ONE]}]


@pytest.fixture
def texts(tmp_path) -> str:
    write_jsonl(tmp_path / "t.jsonl", DIALOGUES)
    return str(tmp_path / "t.jsonl")


def result(capsys, *options, **more) -> dict:
    perplexity.run(perplexity.Options(*options, **more))
    return json.loads(capsys.readouterr().out)


def by_hand(checkpoint: str, space: str, guidance: float) -> tuple[float, float, int]:
    """(perplexity, percentage of impossible tokens, tokens) of `DIALOGUES`, in plain torch."""
    model, tokenizer = subject.load(subject.Subject(checkpoint))
    logs = []
    for messages in ([USER], [USER, ONE, MORE], [USER]):
        text = "There is more." if len(messages) == 3 else "Hello you"
        answer = [*tokenizer.encode(text), tokenizer.special["<|eot_id|>"]]
        sides = []
        for system in (POSITIVE, NEGATIVE):
            prompt = tokenizer.encode_chat([{"role": "system", "content": system}, *messages])
            logits = model.head(model(torch.tensor([prompt + answer])))[0, len(prompt) - 1 : -1]
            sides.append(logits.log_softmax(-1))
        if space == "log":
            guided = (sides[1] + guidance * (sides[0] - sides[1])).log_softmax(-1)
        else:
            p = (sides[1].exp() + guidance * (sides[0].exp() - sides[1].exp())).clamp(min=0)
            guided = (p / p.sum(-1, keepdim=True)).log()
        logs += guided[range(len(answer)), answer].tolist()
    nll = sum(-max(value, math.log(1e-9)) for value in logs)
    return math.exp(nll / len(logs)), 100 * logs.count(-math.inf) / len(logs), len(logs)


@pytest.mark.parametrize(("space", "guidance"), [("prob", 3.0), ("log", 3.0), ("prob", 1.0)])
def test_perplexity_is_pooled_over_the_guided_tokens_of_the_assistants_turns(
    checkpoint, texts, capsys, space, guidance
):
    found = result(capsys, checkpoint, texts=texts, guidance=guidance, space=space)
    value, impossible, tokens = by_hand(checkpoint, space, guidance)
    assert math.isclose(found["perplexity"], value, rel_tol=1e-3) and found["tokens"] == tokens
    assert math.isclose(found["impossible"], impossible, abs_tol=1e-3)
    assert found["perplexity_ci"][0] <= found["perplexity"] <= found["perplexity_ci"][1]


def test_the_figures_depend_on_the_guidance(checkpoint, texts, capsys):
    plain, one, three = (
        result(capsys, checkpoint, texts=texts, guidance=g)["perplexity"] for g in (None, 1.0, 3.0)
    )
    assert len({plain, one, three}) == 3


def test_all_turns_are_guided(checkpoint, texts, capsys, monkeypatch):
    seen, real = [], perplexity.continuation_logprobs

    def recorded(model, requests, *rest, **more):
        seen.extend(requests)
        return real(model, requests, *rest, **more)

    monkeypatch.setattr(perplexity, "continuation_logprobs", recorded)
    result(capsys, checkpoint, texts=texts, guidance=3.0, space="log", alpha=0.1)
    tokenizer = subject.load_tokenizer(checkpoint)
    assert len(seen) == 3 and all(r.guided for r in seen)
    assert all((r.guidance, r.space, r.alpha) == (3.0, "log", 0.1) for r in seen)
    assert all(POSITIVE in tokenizer.decode(r.prompt) for r in seen)
    assert all(NEGATIVE in tokenizer.decode(r.negative) for r in seen)


def test_an_impossible_token_is_counted_and_costs_as_much_as_one_of_1e_9():
    parts = [torch.tensor([-1.0, -torch.inf]), torch.tensor([-3.0, -30.0])]
    assert scoring.impossible(parts).value == 25
    least = 9 * math.log(10)
    assert perplexity.figures(parts[0]) == {"tokens": 2, "nll": round(1 + least, 4), "impossible": 1}
    assert perplexity.figures(parts[1]) == {"tokens": 2, "nll": round(3 + least, 4), "impossible": 0}
    pooled = perplexity.pooled([torch.tensor([-1.0, -3.0]), torch.tensor([-2.0])])
    assert math.isclose(pooled.value, math.exp(2))


def test_each_dialogues_figures_are_written(checkpoint, texts, tmp_path, capsys):
    out = tmp_path / "new" / "p.jsonl"
    found = result(capsys, checkpoint, texts=texts, guidance=3.0, space="log", out=str(out))
    rows = [json.loads(line) for line in open(out)]
    assert [row["place"] for row in rows] == [f"{texts}:1", f"{texts}:2"]
    nll, tokens = sum(row["nll"] for row in rows), sum(row["tokens"] for row in rows)
    assert math.isclose(math.exp(nll / tokens), found["perplexity"], rel_tol=1e-3)


def test_the_demos_chats_are_the_default(checkpoint, capsys):
    assert result(capsys, checkpoint, limit=2)["dialogues"] == 2
    (place, messages), *rest = perplexity.read_dialogues(CHATS)
    assert place == f"{CHATS}:1" and messages[-1]["role"] == "assistant" and len(rest) == 99


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER]}, "no assistant's turn"),
        ({"messages": [ONE]}, r"messages\[0\] is an assistant's turn without"),
        ({"messages": [USER, ONE, TWO]}, r"messages\[2\] is an assistant's turn without"),
        ({"text": "x"}, "'messages' must be"),
    ],
)
def test_a_bad_dialogue_names_the_line(tmp_path, row, words):
    write_jsonl(tmp_path / "t.jsonl", [*DIALOGUES, row])
    with pytest.raises(InputError, match=f"t.jsonl:3: .*{words}"):
        perplexity.read_dialogues(str(tmp_path / "t.jsonl"))


def test_a_turn_beyond_the_context_names_line_and_turn(checkpoint, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"messages": [USER, {"role": "assistant", "content": "word " * 600}]}])
    with pytest.raises(ContextError, match=r"t.jsonl:1: messages\[1\]: prompt and text have"):
        perplexity.run(perplexity.Options(checkpoint, texts=str(tmp_path / "t.jsonl")))
