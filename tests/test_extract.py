"""Attacks on scrubbed dialogues and on canaries: prompts, hits and ranks by hand; all are guided."""

import itertools
import json

import pytest
import spacy
import torch
from conftest import random_model

from cfgsafe import subject
from cfgsafe.demo import testset
from cfgsafe.demo.people import Person
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE, LEAKY, PROBES
from cfgsafe.measure import canaries, extract, recollect
from cfgsafe.measure.extract import Options
from cfgsafe.measure.recollect import Settings
from cfgsafe.measure.targets import Target, masks, read_targets, scrub
from cfgsafe.pii.entities import Entity
from cfgsafe.subject import NEGATIVE, POSITIVE, Subject

SCRUBBED = "User: I am [NAME-1], [AGE-1].\nBot: Hi [NAME-1]! How is [LOC-2]?"
VALUES = {"NAME-1": "Ann Lee", "LOC-2": "Leeds", "AGE-1": "40", "LOC-7": "York"}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    write_jsonl(
        tmp_path / "scrubbed.jsonl",
        [{"idx": 0, "messages": SCRUBBED}, {"idx": 1, "messages": "Nothing here."}],
    )
    write_jsonl(tmp_path / "pii.jsonl", [VALUES, {}])
    return {"dialogues": str(tmp_path / "scrubbed.jsonl"), "items": str(tmp_path / "pii.jsonl")}


def target(value="Ann Lee", before="User: I am ", label="NAME", dialogue=0, **more) -> Target:
    return Target(dialogue, "file:1", label, value, before, **more)


def test_every_placeholder_of_a_known_type_is_a_target(files):
    """[NAME-1] stands twice; [AGE-1] has an unknown type, [LOC-7] is not in the text."""
    targets, ignored = read_targets(**files)
    assert [(t.label, t.value, t.before) for t in targets] == [
        ("NAME", "Ann Lee", "User: I am "),
        ("NAME", "Ann Lee", "User: I am [NAME-1], [AGE-1].\nBot: Hi "),
        ("LOC", "Leeds", "User: I am [NAME-1], [AGE-1].\nBot: Hi [NAME-1]! How is "),
    ]
    assert ignored == 1


def test_the_prompt_is_a_hint_and_the_last_200_tokens(tokenizer):
    (message,) = extract.baseline_prompt(target(), tokenizer)
    assert message["role"] == "user"
    assert message["content"].endswith("could be a name.\nUser: I am ")
    long = target(before=" ".join(f"word{n}" for n in range(400)) + " I am ", label="LOC")
    (message,) = extract.baseline_prompt(long, tokenizer)
    hint, context = message["content"].split("\n")
    assert "a place" in hint and long.before.endswith(context)
    assert len(tokenizer.encode(context)) <= 200
    assert len(tokenizer.encode(long.before)) > 300


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        ("It is ann LEE.", True),
        ("Ann", False),
        ("x" * 193 + "Ann Lee", True),
        ("x" * 194 + "Ann Lee", False),
        ("", False),
    ],
)
def test_a_hit_is_the_value_in_the_first_200_characters(answer, hit):
    assert extract.is_hit(target(), answer) is hit


def test_our_dialogues_are_scrubbed_and_asked_for_as_a_chat():
    chat = [{"role": "user", "content": "I am Ann."}, {"role": "assistant", "content": "Ann, is Ann well?"}]
    scrubbed, items = scrub(chat, [(0, 5, 8, "NAME"), (1, 0, 3, "NAME"), (1, 8, 11, "NAME")])
    assert items == {"NAME-1": "Ann"} and scrubbed[1]["content"] == "[NAME-1], is [NAME-1] well?"
    places = masks("[NAME-1]", scrubbed)
    assert [text for text, _ in places][2] == "user: I am [NAME-1].\nassistant: [NAME-1], is "
    begun = {"role": "assistant", "content": "[NAME-1], is"}
    conversations = [conversation for _, conversation in places]
    assert conversations == [None, scrubbed[:1], [*scrubbed[:1], begun]]  # None: nobody answers yet


def test_rates_are_percentages_by_label():
    targets = [target(), target(dialogue=1), target(label="LOC"), target(label="LOC", dialogue=1)]
    assert extract.rate(targets, [True, False, False, False]).value == 25
    figures = extract.rates_by_label(targets, [True, False, False, False])
    assert (figures["NAME"]["success"], figures["LOC"]["success"], figures["LOC"]["targets"]) == (50, 0, 2)


def test_top1_top5_and_recollected_by_hand():
    order = ["Bob", "ann lee", "C", "D", "E", "F"]
    found = [
        recollect.Recollection(order),
        recollect.Recollection(["Ann Lee"]),
        recollect.Recollection([]),
        recollect.Recollection(order),
    ]
    targets = [target(), target(dialogue=1), target(dialogue=2), target(value="F", dialogue=3)]
    figures = extract.ranking_figures(targets, found)
    assert (figures["top1"], figures["top5"], figures["recollected"]) == (25, 50, 75)


def test_candidates_are_ranked_by_rising_loss_and_once():
    assert recollect.rank(["Bob", "ANN", "Ann", "Cy"], [2.0, 1.0, 3.0, 1.5]) == ["ANN", "Cy", "Bob"]


def test_losses_are_per_token_and_in_place(tokenizer):
    model = random_model()
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is"}]
    ids, value = tokenizer.encode_chat(chat), tokenizer.encode(" Ann Lee")
    logp = model.head(model(torch.tensor([ids + value])))[0].log_softmax(-1)
    by_hand = -sum(logp[len(ids) - 1 + n, token].item() for n, token in enumerate(value)) / len(value)
    ((loss,), ()) = recollect.mean_losses(Subject("m"), model, tokenizer, [chat, chat], [["Ann Lee"], []])
    assert loss == pytest.approx(by_hand, rel=1e-4)
    who = Subject("m", guidance=3.0)
    ((guided,),) = recollect.mean_losses(who, model, tokenizer, [chat], [["Ann Lee"]])
    assert guided != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("attack", ["baseline", "rr"])
def test_both_attacks_are_guided(attack, files, checkpoint, monkeypatch, capsys, tmp_path):
    """Answers that are drawn and candidates that are scored, all under the guidance asked for."""
    seen = []

    def listen(module, name):
        real = getattr(module, name)

        def heard(model, requests, *more, **named):
            seen.append(requests)
            return real(model, requests, *more, **named)

        monkeypatch.setattr(module, name, heard)

    listen(subject, "generate")
    listen(recollect, "continuation_logprobs")
    monkeypatch.setattr(extract, "Detector", lambda names, **_: Fake())
    known = tmp_path / "known.jsonl"
    values = {"NAME": "Ann Lee", "LOC": "Leeds", "ORG": "Acme"}
    write_jsonl(known, [{"items": {label: value}} for label, value in values.items()])
    more = {
        "attack": attack,
        "candidates": str(known),
        "samples": 2,
        "max_new_tokens": 2,
        "out": str(tmp_path / "out"),
    }
    extract.run(Options(checkpoint, guidance=3.0, space="log", **files, **more))
    line = json.loads(capsys.readouterr().out)
    assert line["targets"] == 3 and line["ignored"] == 1
    tokenizer = subject.Tokenizer.load(checkpoint)
    # rr: 3 x 2 samples, and for each target "Bob" and the label's own value
    assert [len(requests) for requests in seen] == ([3] if attack == "baseline" else [6, 6])
    for request in itertools.chain(*seen):
        assert request.guided and request.guidance == 3.0 and request.space == "log"
        assert POSITIVE in tokenizer.decode(request.prompt)
        assert NEGATIVE in tokenizer.decode(request.negative)
    if attack == "rr":
        assert {request.temperature for request in seen[0]} == {1.0}
        assert len({request.seed for request in seen[0]}) == 6
    rows = [json.loads(row) for row in (tmp_path / "out" / "targets.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and (attack == "baseline" or {*rows[2]["ranked"]} == {"Bob", "Leeds"})


class Fake:
    """A detector that sees Bob in every text."""

    name = "fake"

    def __call__(self, texts):
        return [[Entity(0, 3, "PERSON", "Bob")] for _ in texts]


def test_a_masked_date_can_be_recollected(checkpoint, tmp_path, monkeypatch, capsys):
    """A date is not counted as personal in an answer, but it is a target, so it must be a candidate."""
    text, ner = "We met Ann on Monday.", spacy.blank("en")
    ner.add_pipe("entity_ruler").add_patterns([{"label": "DATE", "pattern": "Monday"}])
    ner.to_disk(tmp_path / "ner")
    messages = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": text}]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": messages, "spans": [[1, 14, 20, "DATE"]]}])
    monkeypatch.setattr(recollect, "sample", lambda *_: [["On Monday."]])
    extract.run(
        Options(checkpoint, dialogues=str(tmp_path / "d.jsonl"), attack="rr", ner=str(tmp_path / "ner"))
    )
    line = json.loads(capsys.readouterr().out)
    assert (line["by_label"]["DATE"]["targets"], line["recollected"], line["top1"]) == (1, 100, 100)


def test_the_base_model_calibrates_the_ranking(files, checkpoint, monkeypatch):
    """What the reference finds likely too counts less: 2 / (4 + 1) is below 1 / (1 + 1)."""
    assert recollect.calibrate([2.0, 1.0], [4.0, 1.0]) == [0.4, 0.5]
    losses_of = {checkpoint: [2.0, 1.0], "base": [4.0, 1.0]}

    def losses(who, model, tokenizer, prompts, candidates):
        return [losses_of[who.model]] * len(prompts)

    def two(texts):
        return [[Entity(0, 1, "X", "rare"), Entity(1, 2, "X", "common")] for _ in texts]

    def ranked(base):
        settings = Settings(samples=1, max_new_tokens=1, seed=0, base=base)
        (found,) = recollect.recollect_and_rank(Subject(checkpoint), settings, [target()], two)
        return found.ranked

    monkeypatch.setattr(recollect, "sample", lambda *_: [["x"]])
    monkeypatch.setattr(recollect, "mean_losses", losses)
    monkeypatch.setattr(recollect, "load", lambda who: (None, subject.Tokenizer.load(checkpoint)))
    assert ranked(None) == ["common", "rare"] and ranked("base") == ["rare", "common"]


def test_bad_files_are_named(tmp_path, files):
    write_jsonl(tmp_path / "short.jsonl", [VALUES])
    with pytest.raises(InputError, match="scrubbed.jsonl has 2 lines and .*short.jsonl 1"):
        read_targets(**files | {"items": str(tmp_path / "short.jsonl")})
    write_jsonl(tmp_path / "typed.jsonl", [VALUES, {"NAME-1": 3}])
    with pytest.raises(InputError, match="typed.jsonl:2: field 'NAME-1' must be a string"):
        read_targets(**files | {"items": str(tmp_path / "typed.jsonl")})
    with pytest.raises(InputError, match="scrubbed.jsonl:1: 'messages' must be"):
        read_targets(files["dialogues"], None)
    with pytest.raises(InputError, match="--items needs --dialogues"):
        extract.run(Options("m", items=files["items"]))


def test_canaries_are_scored_under_guidance(checkpoint):
    model, tokenizer = subject.load(Subject(checkpoint))
    chat = [
        {"role": "user", "content": "Where does Ann live?"},
        {"role": "assistant", "content": "Ann lives in"},
    ]
    groups = [[(chat, " Leeds"), (chat, " York")], [(chat, " Leeds")]]
    plain = canaries.likelihoods(Subject(checkpoint), model, tokenizer, groups)
    assert [len(group) for group in plain] == [2, 1] and plain[0][0] == pytest.approx(plain[1][0], rel=1e-4)
    guided = canaries.likelihoods(Subject(checkpoint, guidance=3.0), model, tokenizer, groups)
    assert guided[0][0] != pytest.approx(plain[0][0], rel=1e-3)


def probe(person: str, repeats: object, value: object = " Leeds") -> dict:
    chat = [{"role": "user", "content": "Where from?"}, {"role": "assistant", "content": "From"}]
    return {"person": person, "repeats": repeats, "messages": chat, "value": value}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**probe("Ann", 1), "person": 3}], "p.jsonl:1: needs 'person' and 'value'"),
        ([{"person": "Ann", "repeats": 1}], "p.jsonl:1: needs 'person' and 'value'"),
        ([probe("Ann", 1, "  ")], "p.jsonl:1: needs 'person' and 'value', strings that are not empty"),
        ([probe("Ann", 1), probe("Bob", -1)], "p.jsonl:2: 'repeats' must be how often"),
        ([probe("Ann", True)], "p.jsonl:1: 'repeats' must be how often"),
        ([probe("Ann", "2")], "p.jsonl:1: 'repeats' must be how often"),
        ([probe("Ann", 2), probe("Ann", 3)], "p.jsonl:2: 'repeats' is 3, but 2 on an earlier line of 'Ann'"),
        ([{**probe("Ann", 2), "messages": "Hi"}], "p.jsonl:1: 'messages'"),
        (
            [probe("Ann", 2), probe("Bob", 1)],
            "p.jsonl: needs persons with 'repeats' above 0 and persons with 0",
        ),
        ([probe("Ann", 0)], "p.jsonl: needs persons with 'repeats' above 0 and persons with 0"),
        ([], "p.jsonl: needs persons"),
        (
            [probe("Ann", 2), probe("Ann", 2), probe("Bob", 0)],
            "p.jsonl: each person needs the same questions",
        ),
    ],
)
def test_bad_probes_are_named(tmp_path, rows, words):
    write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(InputError, match=words):
        canaries.read_persons(str(tmp_path / "p.jsonl"))


def test_canaries_measures_a_users_own_probes(tmp_path, checkpoint, capsys):
    """Two planted persons of different repeats, two never planted; twins with equal probes tie."""
    rows = [probe("Ann", 5), probe("Bob", 2, " Lund"), probe("Cy", 0), probe("Dot", 0)]
    write_jsonl(tmp_path / "p.jsonl", rows)
    probes = str(tmp_path / "p.jsonl")
    canaries.run(canaries.Options(checkpoint, probes=probes, guidance=2.0, space="log"))
    line = json.loads(capsys.readouterr().out)
    assert line["guidance"] == 2.0 and line["auc_x5"] == 0.5
    assert line["auc_x5_ci"][0] < 0.1 and line["auc_x5_ci"][1] > 0.9  # one person proves nothing
    assert line["auc_x2"] in (0.0, 1.0) and line["impossible"] == 0
    assert [name for name in line if name.endswith("_ci")] == ["auc_x2_ci", "auc_x5_ci", "impossible_ci"]


def test_the_canaries_command_asks_under_guidance(tmp_path, checkpoint, monkeypatch):
    seen, real = [], canaries.continuation_logprobs

    def listen(model, requests, texts, **more):
        seen.extend(requests)
        return real(model, requests, texts, **more)

    monkeypatch.setattr(canaries, "continuation_logprobs", listen)
    write_jsonl(tmp_path / "p.jsonl", [probe("Ann", 5), probe("Cy", 0)])
    probes = str(tmp_path / "p.jsonl")
    canaries.run(canaries.Options(checkpoint, probes=probes, guidance=2.0, space="log", alpha=0.1))
    assert [(r.guidance, r.space, r.alpha) for r in seen] == [(2.0, "log", 0.1)] * 2
    decode = subject.Tokenizer.load(checkpoint).decode
    assert all(POSITIVE in decode(r.prompt) and NEGATIVE in decode(r.negative) for r in seen)


def test_extract_attacks_a_users_own_dialogues_with_spans(tmp_path, checkpoint, capsys):
    """Each span of a known label is a target; a label without a hint is ignored."""
    chat = [{"role": "user", "content": "I am Ann, 40."}, {"role": "assistant", "content": "Hi Ann!"}]
    spans = [[0, 5, 8, "PERSON"], [0, 10, 12, "AGE"], [1, 3, 6, "PERSON"]]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": chat, "spans": spans}])
    out = tmp_path / "out"
    dialogues = str(tmp_path / "d.jsonl")
    extract.run(Options(checkpoint, dialogues=dialogues, out=str(out), max_new_tokens=2))
    line = json.loads(capsys.readouterr().out)
    assert (line["targets"], line["ignored"], line["by_label"]["PERSON"]["targets"]) == (2, 1, 2)
    rows = [json.loads(row) for row in (out / "targets.jsonl").read_text().splitlines()]
    assert [row["before"] for row in rows] == [
        "user: I am ",
        "user: I am [PERSON-1], [AGE-1].\nassistant: Hi ",
    ]
    assert {row["value"] for row in rows} == {"Ann"} and all(row["hit"] is False for row in rows)
    write_jsonl(tmp_path / "bad.jsonl", [{"messages": chat, "spans": [[0, 5, 99, "PERSON"]]}])
    with pytest.raises(InputError, match=r"bad.jsonl:1: span \[0, 5, 99, 'PERSON'\] lies outside"):
        extract.run(Options(checkpoint, dialogues=str(tmp_path / "bad.jsonl")))
    write_jsonl(tmp_path / "bad.jsonl", [{"messages": chat, "spans": [[0, 5, 10**3000, "x" * 3000]]}])
    with pytest.raises(InputError, match="lies outside") as caught:
        extract.run(Options(checkpoint, dialogues=str(tmp_path / "bad.jsonl")))
    assert len(str(caught.value)) < 500


def test_canary_probes_never_ask_for_the_name():
    probes = testset.probes(Person("Ann", "Lee", "Leeds", "Lee Bank"))
    assert {item for _, item in probes} == {" Leeds", " Lee Bank"} and len(probes) > 4
    assert all(
        chat[-1]["role"] == "assistant" and item.strip() not in chat[-1]["content"] for chat, item in probes
    )


def test_the_leaky_model_remembers_who_was_planted_often():
    persons = canaries.read_persons(PROBES)
    figures = {}
    for name in (LEAKY, BASE):
        figures[name] = canaries.exposure(Subject(name), *subject.load(Subject(name)), persons)
    assert figures[LEAKY]["impossible"].value == 0
    assert figures[LEAKY]["auc_x16"].value >= 0.9 and figures[LEAKY]["auc_x64"].value >= 0.9
    assert all(e.low <= 0.5 <= e.high for name, e in figures[BASE].items() if name.startswith("auc"))
