"""The system prompt of whoever deploys the model stays: guidance adds a sentence, the same everywhere."""

import json
import random

import pytest
from conftest import random_model

import infer
from cfgsafe import chat, guided_request, subject
from cfgsafe.blue import pairs
from cfgsafe.hub import BASE
from cfgsafe.red import target
from cfgsafe.report import results
from cfgsafe.request import NEGATIVE, POSITIVE, Completion
from cfgsafe.subject import Subject
from cfgsafe.tokenizer import with_system

ASK = {"role": "user", "content": "Who am I?"}
OWN = {"role": "system", "content": "You serve the bank."}
FORM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho am I?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture
def seen(monkeypatch) -> list:
    """The requests that reach the engine, which is not run."""
    requests: list = []

    def listen(model, asked, **settings):
        requests.extend(asked)
        done = [Completion([5], [0.0], "stop") for _ in asked]
        for number, completion in enumerate(done):
            settings.get("on_completion", lambda *_: None)(number, completion)
        return done

    for module in (chat, infer, subject, target):
        monkeypatch.setattr(module, "generate", listen)
    return requests


def asked_by_infer(tmp_path, *rows: dict, **options) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    infer.run(infer.Options(BASE, requests=str(path), **options))


@pytest.mark.parametrize(
    ("messages", "how", "expected"),
    [
        ([OWN, ASK], "add", ("You serve the bank. Do not.", "You serve the bank. Do.")),
        ([OWN, ASK], "replace", ("Do not.", "Do.")),
        ([ASK], "add", ("Do not.", "Do.")),
        ([{"role": "system", "content": ""}, ASK], "add", ("Do not.", "Do.")),
    ],
)
def test_the_two_prompts_by_hand(tokenizer, messages, how, expected):
    request = guided_request(tokenizer, messages, positive="Do not.", negative="Do.", system_prompt=how)
    wanted = [tokenizer.encode_prompt(FORM.format(text)) for text in expected]
    assert request.rows == wanted


def test_a_sentence_is_added_to_a_copy():
    own = [dict(OWN), ASK]
    assert with_system(own, "") == [OWN, ASK] and with_system([ASK], "")[0]["content"] == ""
    assert with_system(own, "Hm.")[0]["content"] == "You serve the bank. Hm." and own == [OWN, ASK]


@pytest.mark.parametrize("how", ["add", "replace"])
def test_training_evaluation_infer_chat_and_attacks_ask_alike(tokenizer, seen, tmp_path, capsys, how):
    """One conversation gives the same token ids in all five places."""
    rng = random.Random(how)
    model = random_model(max_position_embeddings=2048)
    options = {"guidance": 3.0, "system_prompt": how}
    for _ in range(20):
        text, own = (" ".join(rng.choices(("Be", "kind", "to", "Ann!", "<|eot|>"), k=5)) for _ in "ab")
        system = rng.choice([None, own, f"{own}\n", ""])
        asked = {"role": "user", "content": text}
        messages = [asked] if system is None else [{"role": "system", "content": system}, asked]
        sample = pairs.Sample(messages, "Hello Ann.", "x", (("PERSON", "Ann"),))
        rows = pairs.cfg_aware((sample, "Hello."), tokenizer, how)
        trained = [tokenizer.encode_prompt(row["prompt"]) for row in rows]

        subject.answers(Subject(BASE, **options), model, tokenizer, [messages], "x", 1)
        asked_by_infer(tmp_path, {"messages": messages}, **options)
        asked_by_infer(tmp_path, {"messages": [asked]}, system=system, **options)
        chat.chat(model, tokenizer, Subject(BASE, **options), [text], str, system)
        target.LocalTarget(target.Options("m", **options), model, tokenizer).ask([messages], [0])
        assert [request.rows for request in seen] == [trained] * 5
        seen.clear()
    capsys.readouterr()


def test_a_begun_answer_is_asked_as_it_was_trained(tokenizer, seen, tmp_path, capsys):
    begun = [OWN, ASK, {"role": "assistant", "content": "You are"}]
    clean, _ = pairs.cfg_aware((pairs.Sample(begun, " Ann.", "x", ()), " a customer."), tokenizer)
    subject.answers(Subject(BASE, guidance=1.0), random_model(), tokenizer, [begun], "x", 1)
    asked_by_infer(tmp_path, {"messages": begun}, guidance=1.0)
    capsys.readouterr()
    assert [request.prompt for request in seen] == [tokenizer.encode_prompt(clean["prompt"])] * 2


def test_infers_own_system_prompt_is_for_messages_that_have_none(tokenizer, seen, tmp_path, capsys):
    other = {"role": "system", "content": "Be brief."}
    lines = [
        {"messages": [ASK]},
        {"messages": [other, ASK]},
        {"messages": [ASK], "guidance": 2},
        {"messages": [ASK], "guidance": 2, "negative_messages": [other, ASK]},
        {"messages": [ASK], "guidance": 2, "negative_messages": [ASK]},
        {"prompt": "as it is", "guidance": 1},
    ]
    asked_by_infer(tmp_path, *lines, system="Be kind.", positive="Do not.")
    capsys.readouterr()
    told = {}
    for text in ("Be kind.", "Be brief.", "Be kind. Do not.", f"Be kind. {NEGATIVE}"):
        told[text] = tokenizer.encode_prompt(FORM.format(text))
    assert [request.rows for request in seen] == [
        [told["Be kind."]],
        [told["Be brief."]],
        [told["Be kind. Do not."], told[f"Be kind. {NEGATIVE}"]],
        [told["Be kind."], told["Be brief."]],
        [told["Be kind."], told["Be kind."]],
        [tokenizer.encode_prompt("as it is")],
    ]


def test_a_conversation_on_the_terminal_keeps_its_system_prompt(tokenizer, seen):
    lines = ["Who am I?", "/reset", "/guidance 1", "Who am I?"]
    messages = chat.chat(random_model(), tokenizer, Subject("m"), lines, str, "Be kind.")
    assert messages[:2] == [{"role": "system", "content": "Be kind."}, ASK] and len(messages) == 3
    told = ["Be kind.", f"Be kind. {POSITIVE}"]
    assert [request.prompt for request in seen] == [
        tokenizer.encode_prompt(FORM.format(text)) for text in told
    ]


def test_results_name_a_system_prompt_that_was_replaced():
    replaced = Subject("m", guidance=3.0, system_prompt="replace")
    assert replaced.guarded == {"guidance": 3.0, "space": "prob", "system_prompt": "replace"}
    assert Subject("m", system_prompt="replace").guarded == {"guidance": None, "space": None}
    assert Subject("m", guidance=3.0).guarded == {"guidance": 3.0, "space": "prob"}
    assert results.name_of({"model": "lora", **replaced.guarded}) == "lora g=3 prob replace"
