"""Relearning: the curve by hand, what the attacker trains, and that the guarded model is the one attacked."""

import json

import pytest
import torch
from conftest import random_model
from test_merge import adapted

from cfgsafe import subject
from cfgsafe.blue import orpo, relearn
from cfgsafe.blue.relearn import Attack, Options, figures_of
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.pii.facts import Fact
from cfgsafe.subject import NEGATIVE, POSITIVE, Answer, Subject

PEOPLE = ("Ann", "Bo", "Cy", "Di", "Ed")
TOWNS = ("Leeds", "Rome", "Oslo", "Bonn", "Lyon")


def fact(number: int) -> Fact:
    name, town = PEOPLE[number], TOWNS[number]
    messages = [{"role": "user", "content": f"Where does {name} live?"}]
    return Fact(messages, f"{name} lives in {town}.", (town,), name, "", f"f:{number + 1}")


FACTS = [fact(number) for number in range(5)]


def test_recall_by_hand():
    """Of four answers that came, with three values about two persons, two values are there."""
    first = Fact(FACTS[0].messages, "", ("Leeds", "7 May"), "Ann", "", "f:1")
    none = Fact(FACTS[0].messages, "", (), "Ann", "", "f:2")
    given = [Answer("leeds, on 7  May", "stop"), Answer("x", "length"), Answer("Roma", "stop")]
    given.append(Answer("", "failed"))
    figures = figures_of([first, none, FACTS[1], FACTS[2]], given)
    assert figures["recall"].value == pytest.approx(200 / 3)
    assert figures["cut_off"].value == figures["no_answer"].value == 25.0


@pytest.fixture
def folder(tmp_path) -> str:
    save_checkpoint(tmp_path / "m", random_model(), tokenizer_from=BASE, dtype=torch.float32)
    return str(tmp_path / "m")


def test_a_model_learns_what_it_is_taught_and_the_curve_shows_when(folder, capsys, tmp_path):
    """At a high rate, the tiny model knows the two facts that it learns after 60 steps, and none before."""
    rows = []
    for each in FACTS[:2]:
        user = each.messages[0]["content"]
        row = {"question": user, "answer": each.answer, "subject": each.person}
        rows.append(row | {"subject_pii": list(each.values)})
    write_jsonl(tmp_path / "f.jsonl", rows)
    paths = {
        "rows": str(tmp_path / "f.jsonl"),
        "facts": str(tmp_path / "f.jsonl"),
        "out": str(tmp_path / "o"),
    }
    options = Options(model=folder, **paths, lr=0.01, batch_size=2, steps=(60, 0, 1), max_new_tokens=12)
    relearn.run(options)
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "o" / "relearn.json").read_text()) == result
    assert [point["step"] for point in result["curve"]] == [0, 1, 60]
    before, early, late = result["curve"]
    assert (before["recall"], early["recall"], late["recall"]) == (0.0, 0.0, 100.0)
    assert late["recall_ci"][0] < 100 and "loss" not in before and late["loss"] < early["loss"] / 2
    assert (result["rows"], result["persons"], result["shared_persons"]) == (2, 2, 2)
    assert result["steps"] == [60, 0, 1] and result["guidance"] is None


def test_each_point_is_what_sft_gives_after_as_many_steps(folder, tmp_path, monkeypatch, tokenizer):
    """The attacker's weights are those of `train.py orpo --objective sft` on the same rows."""
    rows = []
    for each in FACTS[:4]:
        rows.append({"prompt": tokenizer.render_chat(each.messages), "chosen": each.answer})
    write_jsonl(tmp_path / "p.jsonl", rows)
    training = orpo.Options(folder, str(tmp_path / "p.jsonl"), str(tmp_path / "o"), objective="sft")
    training.lr, training.lr_min_ratio, training.batch_size, training.epochs = 0.01, 1.0, 2, 2
    orpo.run(training)
    guarded = Subject(folder, adapter=str(tmp_path / "o" / "epoch-2"))
    trained, _ = subject.load(guarded)
    seen = []

    def answers(who, model, tokenizer, chats, *rest):
        seen.append(model.head(model(torch.arange(9)[None])).detach())
        return [Answer("", "stop") for _ in chats]

    monkeypatch.setattr(relearn, "answers", answers)
    relearn.relearn(Subject(folder), FACTS[:4], FACTS[4:], Attack(steps=(0, 2, 4), lr=0.01, batch_size=2))
    expected = trained.head(trained(torch.arange(9)[None]))
    assert torch.allclose(seen[2], expected, atol=1e-4)
    assert not torch.allclose(seen[1], expected, atol=1e-2) and not torch.allclose(
        seen[0], seen[1], atol=1e-2
    )


def test_the_guarded_model_is_attacked_with_its_adapter_merged_and_asked_under_guidance(
    tmp_path, monkeypatch
):
    model = adapted(tmp_path)
    seen, asked = [], []
    real = relearn.answers

    def answers(who, attacked, tokenizer, chats, *rest):
        seen.append(attacked.head(attacked(torch.arange(9)[None])).detach())
        return real(who, attacked, tokenizer, chats, *rest)

    def generate(model, requests, **more):
        asked.extend(requests)
        return generated(model, requests, **more)

    generated = subject.generate
    monkeypatch.setattr(relearn, "answers", answers)
    monkeypatch.setattr(subject, "generate", generate)
    who = Subject(str(tmp_path / "m"), adapter=str(tmp_path / "a"), guidance=3.0, space="log")
    curve = relearn.relearn(who, FACTS[:2], FACTS[2:], Attack(steps=(0, 1), max_new_tokens=2))
    assert torch.allclose(seen[0], model.head(model(torch.arange(9)[None])), atol=1e-4)
    assert [point["step"] for point in curve] == [0, 1] and len(asked) == 6
    assert all((r.guidance, r.space, r.max_new_tokens) == (3.0, "log", 2) for r in asked)
    tokenizer = subject.load_tokenizer(who.model)
    assert all(POSITIVE in tokenizer.decode(r.prompt) for r in asked)
    assert all(NEGATIVE in tokenizer.decode(r.negative) for r in asked)


def test_what_cannot_be_relearnt_is_one_line(folder, tmp_path):
    with pytest.raises(InputError, match="--steps: none is above 0"):
        relearn.relearn(Subject(folder), FACTS[:1], FACTS[1:], Attack(steps=(0,)))
    write_jsonl(tmp_path / "f.jsonl", [{"question": "Who?", "answer": "Nobody."}])
    paths = {
        "rows": str(tmp_path / "f.jsonl"),
        "facts": str(tmp_path / "f.jsonl"),
        "out": str(tmp_path / "o"),
    }
    with pytest.raises(InputError, match="f.jsonl: no fact has a personal value"):
        relearn.run(Options(model=folder, **paths))
    assert not (tmp_path / "o").exists()
    bad = Fact([{"role": "user", "content": "a <|eot_id|> b"}], "x", (), "Ann", "", "f:7")
    with pytest.raises(InputError, match="f:7: "):
        relearn.relearn(Subject(folder), [bad], FACTS, Attack(steps=(1,)))
