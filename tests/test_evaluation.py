"""Leaks, utility and fluency; guidance on every evaluation path."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import random_model

from cfgsafe import subject
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import PROMPTS
from cfgsafe.measure import fluency, leak, perplexity, utility
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.known import Known
from cfgsafe.pii.matching import mentions
from cfgsafe.subject import NEGATIVE, POSITIVE, Answer

PROMPT = leak.Prompt(
    "1",
    "plain",
    "easy",
    [{"role": "user", "content": "I am Ann Lee."}],
    {"PERSON": "Ann Lee", "GPE": "Leeds"},
    "file:1",
)
QUESTION = {"question": "What is hot?", "options": ["ice", "fire", "N/A"], "answer_index": 1}


def detector_of(*entities: Entity):
    """A detector that finds these entities in every text."""
    return lambda texts: [list(entities) for _ in texts]


NOTHING_FOUND = detector_of()


def record_requests(monkeypatch) -> list:
    """The requests that answers are generated for from now on."""
    seen, generate = [], subject.generate

    def recorded(model, requests, **more):
        seen.extend(requests)
        return generate(model, requests, **more)

    monkeypatch.setattr(subject, "generate", recorded)
    return seen


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello Ann", True),
        ("hello ann lee", True),
        ("hello ann", False),
        ("Mrs Lee.", True),
        ("ANN LEE!", True),
        ("Annual sleep", False),
        ("Lee's house", True),
        ("", False),
        ("_Ann_", True),
    ],
)
def test_a_name_is_found_as_whole_words(text, found):
    assert mentions(text, "PERSON", "Ann Lee") is found


def test_a_place_is_found_only_whole():
    assert mentions("to New Leeds.", "GPE", "New Leeds")
    assert not mentions("a new house", "GPE", "New Leeds")


def test_echoed_and_recalled_are_told_apart():
    """The name stands in the conversation, the town does not."""
    (found,) = leak.inspect([PROMPT], [Answer("Ann lives in Leeds.")], NOTHING_FOUND)
    assert (found.echoed, found.recalled, found.clean) == (["Ann Lee"], ["Leeds"], False)
    (clean,) = leak.inspect([PROMPT], [Answer("You live there.")], NOTHING_FOUND)
    assert clean.clean


def test_a_finding_says_whether_its_answer_was_cut_off():
    given = [Answer("I live in", "length"), Answer("I do.", "stop"), Answer("I do.")]
    assert [found.cut for found in leak.inspect([PROMPT] * 3, given, NOTHING_FOUND)] == [True, False, False]


def test_ner_items_alone_make_an_answer_unclean():
    detector = detector_of(Entity(0, 3, "PERSON", "Bob"))
    findings = leak.inspect([PROMPT, PROMPT], [Answer("Bob."), Answer("Bob.")], detector)
    summary = leak.summarise(findings)
    assert summary["ner_items_per_100"].value == 100
    assert summary["leaked_per_100"].value == 0 and summary["clean_answers"].value == 0


def test_the_users_own_name_counts_as_an_ner_item_and_is_not_invented():
    """The reference counts every entity. Lee is in the conversation, York is known, Bob is invented."""
    names = ["Ann Lee", "Lee", "Bob", "York"]
    text = ", ".join(names)
    detector = detector_of(*[Entity(text.index(name), 0, "X", name) for name in names])
    (found,) = leak.inspect([PROMPT], [Answer(text)], detector, Known({"New York": "GPE"}))
    assert len(found.entities) == 4 and found.invented == ["Bob"]


def test_values_of_training_that_nobody_told_are_recalled():
    """Oslo and New York are known; the conversation names Ann, and York inside New York is one item."""
    places, persons = ["Oslo", "New York", "York"], ["Ann Lee", "Bob Will"]
    known = Known(dict.fromkeys(places, "GPE") | dict.fromkeys(persons, "PERSON"))
    text = "Ann Lee, of Leeds, of new york; osloer, Will."
    (found,) = leak.inspect([PROMPT], [Answer(text)], NOTHING_FOUND, known)
    assert found.echoed == ["Ann Lee"] and found.recalled == ["Leeds", "New York"]
    assert found.labels == ["PERSON", "GPE", "GPE"]
    figures = leak.by_label([found])
    assert figures["GPE"]["leaked_per_100"] == 200 and figures["PERSON"]["leaked_per_100"] == 100


def test_a_known_value_that_the_conversation_holds_is_not_recalled():
    """Oslo is no gold item of the prompt, but the user said it; York was said by nobody."""
    chat = [{"role": "user", "content": "I am from Oslo."}]
    prompt = replace(PROMPT, messages=chat, items={})
    known = Known({"Oslo": "GPE", "York": "GPE"})
    (found,) = leak.inspect([prompt], [Answer("Oslo is not York.")], NOTHING_FOUND, known)
    assert found.recalled == ["York"] and found.echoed == []


def test_known_values_come_from_spans_before_items(tmp_path):
    row = {
        "messages": [{"role": "user", "content": "I am Ann."}],
        "spans": [[0, 5, 8, "PERSON"]],
        "items": {"GPE": "Leeds"},
    }
    write_jsonl(tmp_path / "k.jsonl", [row, {"items": {"ORG": ["Acme", "Bolt"]}}])
    values = Known.read(str(tmp_path / "k.jsonl")).values
    assert values == {"Ann": "PERSON", "Acme": "ORG", "Bolt": "ORG"}
    for bad in (
        {"item": 1},
        {"items": {"ORG": ["Acme", ""]}},
        {"items": {"ORG": " "}},
        {"items": {"ORG": [["Acme"]]}},
    ):
        write_jsonl(tmp_path / "bad.jsonl", [{"items": {"ORG": "Acme"}}, bad])
        with pytest.raises(InputError, match="bad.jsonl:2: 'items'"):
            Known.read(str(tmp_path / "bad.jsonl"))


def test_several_values_of_a_label_are_looked_for_and_a_name_is_counted_once():
    """ "Lee" is one leak, whether Ann's or Bob's; Leeds and Lund are two."""
    items = {"PERSON": ["Ann", "Ann Lee", "Bob Lee"], "GPE": ["Leeds", "Lund"]}
    prompt = replace(PROMPT, items=items)
    texts = ["Ann Lee of Leeds, Lund", "Mrs Lee", "Ann Lee and Bob", "No."]
    found = leak.inspect([prompt] * 4, [Answer(text) for text in texts], NOTHING_FOUND)
    assert [finding.echoed for finding in found] == [["Ann Lee"], ["Ann Lee"], ["Ann Lee", "Bob Lee"], []]
    assert [finding.recalled for finding in found] == [["Leeds", "Lund"], [], [], []]
    entity = Entity(0, 3, "PERSON", "Bob Lee")
    (named,) = leak.inspect([prompt], [Answer("Bob Lee")], detector_of(entity))
    assert named.invented == []  # a gold item is not invented


def test_a_leak_run_resumes_and_is_compared_with_another(tmp_path, checkpoint, capsys, monkeypatch):
    rows = [
        {"messages": [{"role": "user", "content": f"I am Ann {n}."}], "items": {"PERSON": "Ann"}}
        for n in range(4)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    options = leak.Options(
        checkpoint, prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "a"), max_new_tokens=2, guidance=2.0
    )
    leak.run(options)
    asked = record_requests(monkeypatch)
    leak.run(options)
    assert asked == []
    other = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    capsys.readouterr()
    write_jsonl(tmp_path / "other.jsonl", [row | {"answer": "Ann"} for row in other])
    leak.run(replace(options, compare=str(tmp_path / "other.jsonl")))
    compared = json.loads(capsys.readouterr().out)["compared"]
    assert compared["leaked_per_100_difference"] == -100
    assert compared["p_value"] > 0.05  # four prompts prove nothing
    other[1]["prompt"]["messages"][0]["content"] = "Another."
    write_jsonl(tmp_path / "other.jsonl", other)
    with pytest.raises(InputError, match="other.jsonl:2: 'prompt' is not that of"):
        leak.run(replace(options, compare=str(tmp_path / "other.jsonl")))


def test_a_finished_answer_is_given_afresh_and_a_begun_one_is_continued(
    tmp_path, checkpoint, tokenizer, capsys, monkeypatch
):
    """A model that continues an answer that has ended finds nothing more to say, and would look clean."""
    asked, finished = (
        {"role": "user", "content": "Who am I?"},
        {"role": "assistant", "content": "You are Ann."},
    )
    chats = [[asked, finished], [asked, finished, asked], [asked, finished], [asked, finished, finished]]
    rows = [{"messages": chat, "items": {"PERSON": "Ann"}} for chat in chats]
    rows[2]["begun"] = True
    write_jsonl(tmp_path / "p.jsonl", rows)
    seen = record_requests(monkeypatch)
    path, out = str(tmp_path / "p.jsonl"), str(tmp_path / "out")
    leak.run(leak.Options(checkpoint, prompts=path, out=out, max_new_tokens=2))
    wanted = [[asked], chats[1], chats[2], [asked]]
    assert [request.prompt for request in seen] == [tokenizer.encode_chat(chat) for chat in wanted]
    line = json.loads(capsys.readouterr().out)
    assert line["finished_answers_removed"] == 2
    written = [
        json.loads(text)["prompt"] for text in (tmp_path / "out/answers.jsonl").read_text().splitlines()
    ]
    assert [(row["messages"], row["begun"]) for row in written] == [
        *((chat, number == 2) for number, chat in enumerate(wanted))
    ]
    leak.run(
        leak.Options(checkpoint, prompts=path, limit=1, compare=f"{out}/answers.jsonl", max_new_tokens=2)
    )
    assert json.loads(capsys.readouterr().out)["finished_answers_removed"] == 1


@pytest.mark.parametrize(
    ("roles", "begun", "words"),
    [
        ("us", False, "p.jsonl:1: 'messages' must end with the user, or with an answer to the user"),
        ("s", False, "must end with the user"),
        ("sa", True, "must end with the user"),
        ("uas", False, "must end with the user"),
        ("su", True, "'begun' is true, but the last message is not the assistant's"),
        ("sua", "yes", "'begun' must be true or false"),
    ],
)
def test_a_conversation_that_leaves_nothing_to_answer_is_said(tmp_path, roles, begun, words):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    write_jsonl(tmp_path / "p.jsonl", [{"messages": messages, "begun": begun}])
    with pytest.raises(InputError, match=re.escape(words)):
        leak.read_prompts(str(tmp_path / "p.jsonl"))


def test_the_demos_prompts_say_which_answers_are_begun():
    prompts = leak.read_prompts(PROMPTS)
    assert not any(prompt.answered for prompt in prompts)
    assert 30 < sum(prompt.begun for prompt in prompts) < len(prompts)


def test_every_evaluation_path_is_guided(tmp_path, monkeypatch, checkpoint, capsys):
    """The paper's utility path ran without guidance; here leak and utility ask for the same pairs."""
    seen = record_requests(monkeypatch)
    tokenizer = subject.Tokenizer.load(checkpoint)
    for module, options in ((leak, leak.Options), (utility, utility.Options)):
        seen.clear()
        module.run(options(checkpoint, guidance=3.0, space="log", limit=2, max_new_tokens=3))
        assert len(seen) == 2 and all(r.guided and r.guidance == 3.0 and r.space == "log" for r in seen)
        assert all(POSITIVE in tokenizer.decode(r.prompt) for r in seen)
        assert all(NEGATIVE in tokenizer.decode(r.negative) for r in seen)
        assert json.loads(capsys.readouterr().out)["guidance"] == 3.0


@pytest.mark.parametrize("module", [leak, utility, perplexity])
def test_results_name_a_space_only_under_guidance(checkpoint, capsys, module):
    module.run(module.Options(checkpoint, space="log", limit=1))
    line = json.loads(capsys.readouterr().out)
    assert line["guidance"] is None and line["space"] is None


def test_questions_drop_na_options_and_keep_the_right_one(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{**QUESTION, "options": ["N/A", "ice", "fire"], "answer_index": 2}])
    (row,) = utility.read_questions(str(tmp_path / "q.jsonl"))
    assert row["options"] == ["ice", "fire"] and row["answer_index"] == 1


@pytest.mark.parametrize(
    "bad",
    [{}, {**QUESTION, "answer_index": 5}, {**QUESTION, "answer_index": 2}, {**QUESTION, "options": "x"}],
)
def test_bad_questions_name_the_line(tmp_path, bad):
    write_jsonl(tmp_path / "q.jsonl", [bad])
    with pytest.raises(InputError, match="q.jsonl:1"):
        utility.read_questions(str(tmp_path / "q.jsonl"))


def test_broken_words_are_in_neither_vocabulary_nor_prompt():
    estimate = fluency.broken_words(["Hello Ann frobl zonk"], [PROMPT.messages], {"hello"})
    assert estimate.value == 50


def test_perplexity_by_hand(tokenizer):
    model = random_model()
    chat, text = [{"role": "user", "content": "Hi"}], "Hello you"
    ids = tokenizer.encode_chat(chat)
    answer = [*tokenizer.encode(text), tokenizer.special["<|eot_id|>"]]
    logp = model.head(model(torch.tensor([ids + answer])))[0].log_softmax(-1)
    nll = -sum(logp[len(ids) - 1 + n, token].item() for n, token in enumerate(answer)) / len(answer)
    other = [{"role": "user", "content": "A much longer question than that one"}]
    together = fluency.perplexity(model, tokenizer, [text, text], [chat, other])
    alone = fluency.perplexity(model, tokenizer, [text], [chat])
    assert math.isclose(alone.value, math.exp(nll), rel_tol=1e-4)
    assert together.value != alone.value


def test_perplexity_reads_an_answer_up_to_the_end_of_the_context(tokenizer):
    chat, text = [{"role": "user", "content": "Hi"}], " one two three" * 20
    prompt, answer = tokenizer.encode_chat(chat), tokenizer.encode(text)
    model = random_model(max_position_embeddings=len(prompt) + 5)
    found = fluency.perplexity(model, tokenizer, [text], [chat])
    logp = model.head(model(torch.tensor([prompt + answer[:5]])))[0].log_softmax(-1)
    nll = -sum(logp[len(prompt) - 1 + n, answer[n]].item() for n in range(5)) / 5
    assert math.isclose(found.value, math.exp(nll), rel_tol=1e-4)


def test_a_bad_prompt_names_the_line(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "x"}], "items": [3]}])
    with pytest.raises(InputError, match="p.jsonl:1: 'items'"):
        leak.read_prompts(str(tmp_path / "p.jsonl"))
