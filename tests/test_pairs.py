"""Preference pairs: where samples are cut, what is kept, and how the CFG-aware set doubles them."""

import json

import pytest

from cfgsafe import load_model
from cfgsafe.blue import pairs, rows
from cfgsafe.decode import Completion
from cfgsafe.demo.testset import pair_dialogues
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.matching import mentions
from cfgsafe.pii.ner import Detector
from cfgsafe.subject import NEGATIVE, POSITIVE

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "I am Ann."},
    {"role": "assistant", "content": "Hello Ann! How is Leeds?"},
]
SPANS = [[1, 5, 8, "PERSON"], [2, 6, 9, "PERSON"], [2, 18, 23, "GPE"]]


class Names:
    """A detector that knows two words."""

    name = "names"

    def __call__(self, texts):
        return [self.find(text) for text in texts]

    def find(self, text):
        known = [word for word in ("Ann", "Leeds") if word in text]
        return [Entity(text.index(word), text.index(word) + len(word), "PERSON", word) for word in known]


def options(tmp_path, **changes) -> pairs.Options:
    paths = {"dialogues": str(tmp_path / "d.jsonl"), "model": BASE, "out": str(tmp_path / "p.jsonl")}
    return pairs.Options(**{**paths, **changes})


def write(tmp_path, *rows) -> str:
    write_jsonl(tmp_path / "d.jsonl", list(rows))
    return str(tmp_path / "d.jsonl")


@pytest.mark.parametrize("spans", [{"spans": SPANS}, {}])
def test_one_sample_for_each_item_of_an_answer(tmp_path, spans):
    samples = pairs.read_samples(write(tmp_path, {"messages": CHAT, **spans}), Names())
    assert [(s.messages[-1]["content"], s.rejected) for s in samples] == [
        ("Hello", " Ann! How is Leeds?"),
        ("Hello Ann! How is", " Leeds?"),
    ]
    assert [value for _, value in samples[0].values] == ["Ann", "Leeds"]
    assert [value for _, value in samples[1].values] == ["Leeds"]


def test_an_item_that_opens_the_answer_leaves_the_users_turn_last(tmp_path):
    chat = [CHAT[1], {"role": "assistant", "content": "Ann, hello."}]
    path = write(tmp_path, {"messages": chat, "spans": [[1, 0, 3, "PERSON"]]})
    (sample,) = pairs.read_samples(path, Names())
    assert sample.messages == [CHAT[1]] and sample.rejected == "Ann, hello."


def test_avoid_prompt_and_nudge():
    plain, nudged = pairs.avoiding(CHAT, False), pairs.avoiding(CHAT, True)
    assert plain[0]["content"] == f"Be kind. {pairs.AVOID}" and plain[1:] == CHAT[1:]
    assert nudged[1]["content"] == f"{pairs.NUDGE} I am Ann." and nudged[2] == CHAT[2]


def test_cfg_aware_rows_are_swapped_with_the_negative_sentence(tokenizer):
    sample = pairs.Sample(CHAT[:2], "Hello Ann.", "x", (("PERSON", "Ann"),))
    clean, leaking = rows.cfg_aware((sample, "Hello."), tokenizer)
    assert f"\n\nBe kind. {POSITIVE}<|eot_id|>" in clean["prompt"]
    assert f"\n\nBe kind. {NEGATIVE}<|eot_id|>" in leaking["prompt"]
    replaced = rows.cfg_aware((sample, "Hello."), tokenizer, "replace")
    assert [row["prompt"].replace("Be kind. ", "") for row in (clean, leaking)] == [
        row["prompt"] for row in replaced
    ]
    assert (clean["chosen"], clean["rejected"]) == ("Hello.<|eot_id|>", "Hello Ann.<|eot_id|>")
    assert (leaking["rejected"], leaking["chosen"]) == ("Hello.<|eot_id|>", "Hello Ann.<|eot_id|>")


def test_swapped_rows_have_the_weight_asked_for_or_are_left_out(tmp_path, tokenizer):
    sample = pairs.Sample(CHAT[:2], "Hello Ann.", "x", (("PERSON", "Ann"),))
    whole = rows.cfg_aware((sample, "Hello."), tokenizer)
    assert rows.cfg_aware((sample, "Hello."), tokenizer, swapped=0.0) == whole[:1]
    lighter = rows.cfg_aware((sample, "Hello."), tokenizer, swapped=0.25)
    assert lighter == [whole[0], whole[1] | {"weight": 0.25}]


TURNS = [
    {"role": "user", "content": "I am Ann Lee."},
    {"role": "assistant", "content": "Hi Ann, in Leeds and Hull?"},
    {"role": "user", "content": "In Leeds."},
    {"role": "assistant", "content": "Ann Lee of Leeds, call Bob."},
]
TURN_SPANS = [
    [0, 5, 12, "PERSON"],
    [1, 3, 6, "PERSON"],
    [1, 11, 16, "GPE"],
    [1, 21, 25, "GPE"],
    [2, 3, 8, "GPE"],
    [3, 0, 7, "PERSON"],
    [3, 11, 16, "GPE"],
    [3, 23, 26, "PERSON"],
]


def test_scrubbing_hides_what_the_assistant_has_said(tmp_path):
    """Marked or not; the user's turns and how the answer went on stay."""
    hidden = "Hi [PERSON], in [GPE] and [GPE]?"
    for left_out in (None, 1, 2):  # "Ann" is part of a marked name, and Leeds is marked elsewhere
        spans = [span for number, span in enumerate(TURN_SPANS) if number != left_out]
        samples = pairs.read_samples(write(tmp_path, {"messages": TURNS, "spans": spans}), Names())
        last = rows.scrubbed(samples[-1])
        said = [message["content"] for message in last.messages]
        assert said == ["I am Ann Lee.", hidden, "In Leeds.", "[PERSON] of [GPE], call"]
        assert (last.rejected, last.values) == (" Bob.", (("PERSON", "Bob"),))
        assert samples[-1].messages[1] == TURNS[1]


@pytest.mark.parametrize(("earlier", "names"), [("keep", True), ("scrub", False)])
def test_a_scrubbed_file_differs_in_its_prompts_alone(tmp_path, tokenizer, monkeypatch, earlier, names):
    monkeypatch.setattr(pairs, "load", lambda subject: (None, tokenizer))
    candidates(monkeypatch, " Hello.", " Hello.")
    write(tmp_path, {"messages": TURNS, "spans": TURN_SPANS})
    pairs.run(options(tmp_path, earlier=earlier, swapped=0.5))
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row.get("weight") for row in written] == [None, 0.5] * 6
    texts = [row["prompt"].split("assistant<|end_header_id|>", 1)[1] for row in written[6:]]
    assert all(("Hi Ann, in Leeds" in text) == names for text in texts)
    assert all(("[PERSON], in [GPE]" in text) != names for text in texts)
    ends = {row["rejected"] for row in written[6::2]}
    assert ends == {"Ann Lee of Leeds, call Bob.<|eot_id|>", " Leeds, call Bob.<|eot_id|>", " Bob.<|eot_id|>"}


def test_built_pairs_are_clean_where_the_rejected_side_is_not(tmp_path, tokenizer):
    detector, settings = Detector(), options(tmp_path)
    samples = pairs.read_samples(write(tmp_path, *pair_dialogues(6, seed=3)), detector)
    built, report = pairs.build(samples, load_model(BASE), tokenizer, detector, settings)
    assert len(built) > len(samples) / 2 and report.pairs == len(built) == sum(report.won.values())
    for sample, chosen in built:
        assert not detector([chosen])[0] and not any(mentions(chosen, *item) for item in sample.values)
        assert any(mentions(sample.rejected, *item) for item in sample.values)


def test_the_same_seed_gives_the_same_file(tmp_path):
    write(tmp_path, *pair_dialogues(2, seed=4))
    for name in ("a", "b"):
        pairs.run(options(tmp_path, out=str(tmp_path / name)))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    row = json.loads((tmp_path / "a").read_text().splitlines()[0])
    assert set(row) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": 3}, "d.jsonl:1: 'messages'"),
        ({"messages": CHAT, "spans": [[2, 6, 999, "X"]]}, "outside"),
        ({"messages": CHAT, "spans": "x"}, "'spans' must"),
        ({}, "'messages' must"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, words):
    with pytest.raises(InputError, match=words):
        pairs.read_samples(write(tmp_path, row), Names())


def test_malformed_json_names_the_line(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": CHAT, "spans": SPANS}) + "\n{oops\n")
    with pytest.raises(InputError, match="d.jsonl:2: not JSON"):
        pairs.read_samples(str(tmp_path / "d.jsonl"), Names())


@pytest.mark.parametrize("turn", [1, 2])
def test_a_dialogue_with_control_token_text_makes_no_pair(tmp_path, tokenizer, turn):
    chat = [dict(message) for message in CHAT]
    chat[turn]["content"] += " <|eot_id|><|start_header_id|>"
    detector = Names()
    samples = pairs.read_samples(write(tmp_path, {"messages": chat, "spans": SPANS}), detector)
    built, report = pairs.build(samples, load_model(BASE), tokenizer, detector, options(tmp_path))
    assert len(samples) == 2 and built == [] and report.fell["avoid"]["control token in the text"] > 0


def test_an_answer_that_nobody_asked_for_is_passed_over(tmp_path):
    chat = [{"role": "assistant", "content": "Ann, hello."}, *CHAT[1:]]
    path = write(tmp_path, {"messages": chat, "spans": [[0, 0, 3, "PERSON"], *SPANS]})
    samples = pairs.read_samples(path, Names())
    assert [s.messages[0]["role"] for s in samples] == ["assistant", "assistant"] and len(samples) == 2


def test_the_nudge_is_on_the_last_message_of_the_user():
    chat = [*CHAT, {"role": "user", "content": "Fine."}, {"role": "assistant", "content": "And"}]
    nudged = pairs.avoiding(chat, True)
    assert nudged[3]["content"] == f"{pairs.NUDGE} Fine."
    assert nudged[1:3] == chat[1:3] and nudged[4] == chat[4]


def test_the_chosen_side_is_drawn_at_the_temperature_asked_for(tmp_path, tokenizer, monkeypatch):
    asked = []

    def listen(model, requests, batch, what):
        asked.extend(requests)
        return [Completion(finish_reason="stop") for _ in requests]

    monkeypatch.setattr(pairs, "complete", listen)
    samples = pairs.read_samples(write(tmp_path, {"messages": CHAT, "spans": SPANS}), Names())
    pairs.build(samples, load_model(BASE), tokenizer, Names(), options(tmp_path, temperature=0.4))
    assert len(asked) == 4 and {request.temperature for request in asked} == {0.4}
    assert len({request.seed for request in asked}) == 4


def candidates(monkeypatch, *texts: str) -> None:
    """Let the local recipes give these texts for each sample."""

    def written(samples, *_):
        recipes = zip(pairs.LOCAL, texts, strict=True)
        several = [pairs.Candidate(recipe, text, True) for recipe, text in recipes]
        return [list(several) for _ in samples]

    monkeypatch.setattr(pairs, "from_model", written)


@pytest.mark.parametrize(
    "text",
    [" Ann, hello.", " Leeds is fine.", " Write to a@b.org."],
    ids=["by the NER", "an item", "by form"],
)
def test_personal_data_make_a_candidate_fall(tmp_path, tokenizer, monkeypatch, text):
    """The NER finds Ann, who is no item of the sample. It misses Leeds, which is one, and any address."""

    def only_ann(texts):
        return [[Entity(0, 3, "PERSON", "Ann")] if "Ann" in text else [] for text in texts]

    candidates(monkeypatch, text, " Hello.")
    sample = pairs.Sample(CHAT[:2], " Leeds?", "x", (("GPE", "Leeds"),))
    built, report = pairs.build([sample], None, tokenizer, only_ann, options(tmp_path))
    assert built == [(sample, " Hello.")] and report.fell["avoid"] == {"personal data": 1}


def test_pieces_that_join_into_a_control_token_make_no_pair(tmp_path, tokenizer, monkeypatch):
    """The begun answer ends with "<|eot": neither side may go on with "_id|>"."""
    candidates(monkeypatch, "_id|> Hello.", " Hello.")
    begun = [*CHAT[:2], {"role": "assistant", "content": "Well <|eot"}]
    for rejected, pairs_built in ((" Leeds?", 1), ("_id|> Leeds?", 0)):
        sample = pairs.Sample(begun, rejected, "x", ())
        built, report = pairs.build([sample], None, tokenizer, Names(), options(tmp_path))
        assert [text for _, text in built] == [" Hello."] * pairs_built
        assert report.fell["avoid"] == {"control token in the text": 1}


def test_one_of_several_clean_recipes_is_drawn(tmp_path, tokenizer, monkeypatch):
    candidates(monkeypatch, " Hello.", " Good day.")
    samples = [pairs.Sample(CHAT[:2], " Leeds?", "x", ())] * 40
    built, report = pairs.build(samples, None, tokenizer, Names(), options(tmp_path))
    assert len(built) == 40 and min(report.won[recipe] for recipe in pairs.LOCAL) > 10


def test_a_sample_may_be_cut_before_the_whole_answer(tmp_path):
    row = {"messages": CHAT, "spans": SPANS}
    path = write(tmp_path, row)
    items = pairs.read_samples(path, Names())
    answers = pairs.read_samples(path, Names(), cut="answer")
    assert {sample.begun for sample in answers} == {""}
    assert len({sample.place for sample in answers}) == len(answers) == 1
    assert set(answers[0].values) >= set(items[0].values)
    both = pairs.read_samples(path, Names(), cut="both")
    assert [sample.rejected for sample in both] == sorted(
        {sample.rejected for sample in answers + items}, key=len, reverse=True
    )
