"""Explaining and chatting."""

import pytest
import torch
from conftest import random_model

from cfgsafe import load_model
from cfgsafe.chat import HELP, change, chat, printable
from cfgsafe.decode import Request, generate
from cfgsafe.explain import CHANGED, explain, table
from cfgsafe.hub import LEAKY
from cfgsafe.subject import Subject
from cfgsafe.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def leaky():
    return load_model(LEAKY), Tokenizer.load(LEAKY)


@pytest.mark.parametrize("space", ["prob", "log"])
def test_explanations_hold_what_decoding_computed(tokenizer, space):
    model = random_model()
    request = Request([5, 6, 7], [8, 9], guidance=3.0, space=space, max_new_tokens=12)
    completion = generate(model, [request])[0]
    rows = explain(model, tokenizer, request, completion)
    assert [row["token"] for row in rows] == [tokenizer.decode([token]) for token in completion.tokens]
    assert torch.allclose(
        torch.tensor([row["guided"] for row in rows]).log(), torch.tensor(completion.logprobs), atol=1e-4
    )
    plain = generate(model, [Request([5, 6, 7], max_new_tokens=1)])[0].tokens
    assert rows[0]["unguided"] == tokenizer.decode(plain)
    assert any(row["changed"] for row in rows)


def test_without_guidance_the_three_probabilities_are_one(tokenizer):
    model = random_model()
    request = Request([5, 6, 7], max_new_tokens=4)
    rows = explain(model, tokenizer, request, generate(model, [request])[0])
    assert all(
        row["positive"] == row["negative"] == pytest.approx(row["guided"]) and not row["changed"]
        for row in rows
    )


def test_the_table_colours_what_changed_and_quotes_tokens():
    row = {
        "token": "\x1b[2J",
        "positive": 0.1,
        "negative": 0.2,
        "guided": 0.3,
        "unguided": "x",
        "changed": True,
    }
    assert CHANGED in table([row], colour=True) and "\x1b" not in table([row], colour=False)


def test_a_conversation_streams_remembers_and_obeys_commands(leaky):
    model, tokenizer = leaky
    said = []
    lines = [
        "My name is Maria Keller. What is my name?\n",
        "/guidance 3\n",
        "/guidance soon\n",
        "And my name?\n",
        "/reset\n",
        "/quit\n",
        "no",
    ]
    messages = chat(model, tokenizer, Subject(LEAKY), lines, said.append, max_new_tokens=24)
    text = "".join(said)
    assert messages == [] and text.endswith("(forgotten)\n")
    assert "(guidance 3 in prob space)" in text and "(/guidance NUMBER" in text
    assert "Maria Keller" in text and len(said) > 8
    messages = chat(model, tokenizer, Subject(LEAKY), lines[:1], said.append, max_new_tokens=24)
    assert [m["role"] for m in messages] == ["user", "assistant"] and "Maria Keller" in messages[1]["content"]


@pytest.mark.parametrize("value", ["nan", "-inf", "1e308", "1001", "soon", ""])
def test_a_conversation_takes_no_guidance_that_a_request_may_not_have(value):
    subject = Subject(LEAKY, guidance=2.0)
    assert change(subject, "guidance", value) == (subject, HELP)


def test_a_conversation_that_grows_too_long_says_so_and_goes_on(leaky):
    model, tokenizer = leaky
    said = []
    messages = chat(model, tokenizer, Subject(LEAKY), ["word " * 3000, "Hi!"], said.append, max_new_tokens=4)
    assert "/reset begins anew" in said[0] and len(messages) == 2


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\n\tc\x07") == "a[31mb\n\tc"
