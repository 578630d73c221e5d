"""Ordinary conversations: the model writes both sides, what is personal falls, the rest is to be kept."""

import json

import pytest
from conftest import random_model
from test_tokenizer import variant

from cfgsafe import load_tokenizer
from cfgsafe.blue import ordinary
from cfgsafe.blue.batches import read_pairs
from cfgsafe.blue.orpo import Options as Training
from cfgsafe.decode import Completion
from cfgsafe.errors import InputError
from cfgsafe.hub import BASE
from cfgsafe.pii.entities import Entity
from cfgsafe.request import NEGATIVE, POSITIVE
from cfgsafe.tokenizer import LLAMA31_TEMPLATE

TURNS = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}{% endif %}"
)  # without a system prompt, without a start token


@pytest.mark.parametrize("template", [LLAMA31_TEMPLATE, TURNS])
def test_an_opening_is_what_every_conversation_of_a_user_begins_with(tmp_path, template):
    tokenizer = variant(tmp_path, template)
    opening = tokenizer.encode_opening()
    for text in ("Hello", "1 + 1?"):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        assert ids[: len(opening)] == opening
        assert ids[len(opening) :][: len(tokenizer.encode(text))] == tokenizer.encode(text)


def test_a_template_without_users_is_named(tmp_path):
    with pytest.raises(InputError, match="the chat template leaves out a user's message"):
        variant(tmp_path, "{{ '<|begin_of_text|>' }}").encode_opening()


def spoken(monkeypatch, tokenizer, texts: list[tuple[str, str]]) -> list:
    """Make the model say these texts, each with how it ended; returns the requests that it got."""
    asked, left = [], iter(texts)

    def complete(model, requests, batch, what):
        asked.append(requests)
        said = [next(left) for _ in requests]
        return [Completion(tokenizer.encode(text), finish_reason=end) for text, end in said]

    monkeypatch.setattr(ordinary, "complete", complete)
    return asked


def test_what_is_clean_is_kept_and_what_is_not_falls(monkeypatch, capsys):
    tokenizer = load_tokenizer(BASE)
    questions = ["Do you like tea?", "Call 020 7946 0958.", "What is the", "How is the weather?", "Why?"]
    answers = ["Yes, tea is good.", "Ask ann@example.org.", "Because the"]
    said = [(text, "length" if text.endswith("the") else "stop") for text in questions + answers]
    asked = spoken(monkeypatch, tokenizer, said)
    settings = ordinary.Options(BASE, "out.jsonl", count=5, max_new_tokens=9)
    found = ordinary.converse(random_model(), tokenizer, lambda texts: [[] for _ in texts], settings)
    assert found == [
        ([{"role": "user", "content": "Do you like tea?"}], "Yes, tea is good.<|eot_id|>"),
        ([{"role": "user", "content": "Why?"}], "Because the"),  # cut, so it has no end
    ]
    assert "fell by {'personal data': 2, 'too long': 1}" in capsys.readouterr().err
    first, second = asked
    assert [request.prompt for request in first] == [tokenizer.encode_opening()] * 5
    assert second[0].prompt == tokenizer.encode_chat([{"role": "user", "content": "Do you like tea?"}])
    seeds = [request.seed for request in first + second]
    assert len(set(seeds)) == 8
    assert all(request.temperature == 1 for request in first + second)


def test_a_person_makes_a_text_fall_and_a_place_does_not(monkeypatch):
    tokenizer = load_tokenizer(BASE)
    said = ["Who is Ann?", "Where is Ulm?", "In the south."]
    spoken(monkeypatch, tokenizer, [(text, "stop") for text in said])
    labels = {"Ann": "PERSON", "Ulm": "GPE"}

    def names(texts):
        return [[Entity(0, 3, labels[n], n) for n in labels if n in text] for text in texts]

    found = ordinary.converse(random_model(), tokenizer, names, ordinary.Options(BASE, "out.jsonl", count=2))
    assert [messages[0]["content"] for messages, _ in found] == ["Where is Ulm?"]


@pytest.mark.parametrize("cfg_aware", [True, False])
def test_rows_can_be_trained_on(tmp_path, monkeypatch, capsys, cfg_aware):
    tokenizer = load_tokenizer(BASE)
    said = [
        ("Do you like tea?", "stop"),
        ("Why?", "stop"),
        ("Yes, tea is good.", "stop"),
        ("Because the", "length"),
    ]
    spoken(monkeypatch, tokenizer, said)
    out = tmp_path / "rows.jsonl"
    ordinary.run(ordinary.Options(BASE, str(out), count=2, cfg_aware=cfg_aware))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    sentences = [POSITIVE, NEGATIVE] * 2 if cfg_aware else ["", ""]
    assert [any(s in row["prompt"] for s in (POSITIVE, NEGATIVE)) for row in rows] == [cfg_aware] * len(rows)
    assert all(sentence in row["prompt"] for sentence, row in zip(sentences, rows, strict=True))
    pairs = read_pairs(str(out), tokenizer, 512, Training("m", str(out), "o"))
    assert all(pair.kept for pair in pairs)
    end = tokenizer.special["<|eot_id|>"]
    ended = [pair.chosen.ids[-1] == end for pair in pairs]
    assert ended == [True] * (len(rows) // 2) + [False] * (len(rows) // 2)
    assert json.loads(capsys.readouterr().out)["rows"] == len(rows)


def test_it_says_when_nothing_is_left(tmp_path, monkeypatch):
    spoken(monkeypatch, load_tokenizer(BASE), [("Call 020 7946 0958.", "stop")])
    out = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="--count 1: no conversation is left"):
        ordinary.run(ordinary.Options(BASE, str(out), count=1))
    assert not out.exists()
