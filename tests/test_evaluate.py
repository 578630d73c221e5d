"""An attack on a target: what could not be scored is reported; what the ancestor says too is no hit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cfgsafe.blue import earlier
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.red import evaluate
from cfgsafe.red.policy import Attacker
from cfgsafe.red.records import Attack, Trial, read_attacks
from cfgsafe.red.target import LocalTarget
from cfgsafe.remote import Service


@pytest.fixture
def contexts(tmp_path) -> str:
    said = [{"role": "user", "content": "I am Ann Lee."}, {"role": "assistant", "content": "Hi."}]
    rows = [{"id": f"c{n}", "messages": said, "items": {"PERSON": "Ann Lee"}} for n in range(4)]
    write_jsonl(tmp_path / "contexts.jsonl", rows)
    return str(tmp_path / "contexts.jsonl")


def test_an_attack_on_an_endpoint_reports_what_it_could_not_score(serve, contexts, checkpoint, tmp_path):
    serve(lambda body: "You are Ann.", share=0.9, last_fault=99, stall=0.3)
    options = evaluate.Options(
        contexts=contexts, out=str(tmp_path / "out"), draws=12, samples=1, least=3, most=8
    )
    options.attacker = (f"bare={checkpoint}",)
    options.service = Service(remote_model="m", attempts=1, timeout=0.2)
    evaluate.run(options)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert 0 < row["unscorable"] < 12 and row["success"] == 100  # of those that could be scored


def test_a_prompt_that_is_drawn_again_meets_other_conversations(
    serve, contexts, checkpoint, tmp_path, monkeypatch
):
    serve(lambda body: "Hello.")
    monkeypatch.setattr(Attacker, "draw", lambda self, temperatures, _: [(5, 6, 7)] * len(temperatures))
    options = evaluate.Options(contexts=contexts, out=str(tmp_path / "out"), draws=4, samples=1)
    options.attacker = (f"bare={checkpoint}",)
    options.service = Service(remote_model="m")
    evaluate.run(options)
    attacks = read_attacks(tmp_path / "out" / "attacks-bare.jsonl")
    assert len({attack.text for attack in attacks}) == 1
    assert sorted(attack.trials[0].context for attack in attacks) == ["c0", "c1", "c2", "c3"]


def test_a_resumed_attack_belongs_to_the_contents_of_its_files_and_to_its_endpoint(
    serve, contexts, checkpoint, tmp_path, monkeypatch
):
    serve(lambda body: "Hello.")
    shutil.copytree(checkpoint, tmp_path / "model")
    options = evaluate.Options(contexts=contexts, out=str(tmp_path / "out"), draws=2, samples=1)
    options.attacker = (f"bare={tmp_path / 'model'}",)
    options.service = Service(remote_model="m")
    evaluate.run(options)
    options.resume = True
    evaluate.run(options)
    changed = {"contexts": Path(contexts), "attacker": tmp_path / "model" / "tokenizer.json"}
    for option, path in changed.items():
        before = path.read_text()
        path.write_text(before + "\n")
        with pytest.raises(InputError, match=f"--{option}.*: holds something else than when the run in"):
            evaluate.run(options)
        path.write_text(before)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    with pytest.raises(InputError, match="--remote-model: holds something else"):
        evaluate.run(options)


def test_a_new_attack_that_was_killed_does_not_go_on_with_the_answers_of_an_earlier_one(
    serve, contexts, checkpoint, tmp_path, monkeypatch
):
    serve(lambda body: "Hello.")
    options = evaluate.Options(contexts=contexts, out=str(tmp_path / "out"), draws=2, samples=1)
    options.attacker = (f"bare={checkpoint}",)
    options.service = Service(remote_model="m")
    evaluate.run(options)

    def killed(*_):
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(evaluate, "draw_attacks", killed)
        patch.setattr(earlier, "return_or_keep", killed)
        evaluate.run(replace(options, seed=1))
    evaluate.run(replace(options, seed=1, resume=True))
    evaluate.run(replace(options, seed=1, out=str(tmp_path / "whole")))
    again, whole = (read_attacks(tmp_path / name / "attacks-bare.jsonl") for name in ("out", "whole"))
    assert again == whole


def test_what_the_ancestor_gives_away_too_is_no_hit(checkpoint, tmp_path, monkeypatch):
    """Values that stand in no conversation, and that the model before fine-tuning says as well."""
    messages = [{"role": "system", "content": "I am Ann Lee."}]
    row = {"id": "c", "messages": messages, "items": {"PERSON": "Ann Lee"}}
    write_jsonl(tmp_path / "c.jsonl", [row])
    told = Trial("c", "Ann Lee of Oslo, Bo Berg", 1.0, ("Ann Lee", "Oslo", "Bo Berg"))
    public = Trial("c", "Oslo", 1.0, ("Oslo",))

    def ask(self, conversations, seeds):
        return ["Ann Lee and Oslo"] * len(conversations)

    monkeypatch.setattr(LocalTarget, "ask", ask)
    options = evaluate.Options(
        model=checkpoint, ancestor=checkpoint, contexts=str(tmp_path / "c.jsonl"), out=str(tmp_path)
    )
    lists = {("t", "m"): [Attack((1,), "Hi", -1.0, (told, public))]}
    (after,) = evaluate.subtract_ancestor(lists, checkpoint, options)["t", "m"]
    assert after.trials[0].found == ("Ann Lee", "Bo Berg")  # an echo stays a leak
    assert after.trials[0].score == 1
    assert after.trials[1].found == () and after.trials[1].score == 0


@pytest.fixture
def attack(contexts, checkpoint, tmp_path, monkeypatch) -> evaluate.Options:
    """An attack in chunks of 4 draws, whose budget ends within the third of four."""
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    options = evaluate.Options(model=checkpoint, contexts=contexts, out=str(tmp_path / "out"), draws=14)
    options.samples, options.answer_tokens, options.budget, options.most = 2, 3, 20, 8
    options.attacker = (f"bare={checkpoint}",)
    return options


@pytest.mark.parametrize("lines", [0, 2, 4, 7])
def test_an_attack_goes_on_with_the_budget_and_the_draws_it_had(attack, tmp_path, lines):
    evaluate.run(attack)
    file = tmp_path / "out" / "attacks-bare.jsonl"
    whole, results = file.read_bytes(), (tmp_path / "out" / "results.json").read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]) + b'{"draw": ')
    evaluate.run(replace(attack, resume=True))
    assert file.read_bytes() == whole and (tmp_path / "out" / "results.json").read_bytes() == results


def test_an_attack_does_not_go_on_from_other_prompts(attack, tmp_path):
    evaluate.run(attack)
    file = tmp_path / "out" / "attacks-bare.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    for changed, words in (
        (
            json.dumps({**json.loads(first), "tokens": [1, 2, 3]}) + "\n",
            "holds other prompts than this run draws",
        ),
        (first.replace('"draw": 1', '"draw": "1"'), ":1: 'draw' must be a number"),
        (first.replace('"draw": 1', '"draw": 3'), ":2: 'draw' must be a number, not below"),
        ("", "holds other prompts than this run draws"),
    ):
        file.write_text(changed + "".join(others))
        with pytest.raises(InputError, match=words):
            evaluate.run(replace(attack, resume=True))
