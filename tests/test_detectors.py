"""Detectors: what each finds, how the finds of several are merged, and precision and recall."""

import json
import shutil
import sys

import pytest
import spacy

from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import DEMO_PIPELINE
from cfgsafe.measure import detectors
from cfgsafe.pii import ner
from cfgsafe.pii.entities import Entity, merge
from cfgsafe.pii.ner import Detector

TEXT = "Ann Lee of Leeds saw 3 cats on Monday. Leeds!"


def rules(folder, patterns: dict[str, str]) -> str:
    """A spaCy pipeline that finds exactly these phrases."""
    nlp = spacy.blank("en")
    rows = [{"label": label, "pattern": words} for words, label in patterns.items()]
    nlp.add_pipe("entity_ruler").add_patterns(rows)
    nlp.to_disk(folder)
    return str(folder)


@pytest.fixture
def one(tmp_path) -> str:
    return rules(tmp_path / "one", {"Ann": "PERSON", "Leeds": "GPE", "3": "CARDINAL", "Monday": "DATE"})


@pytest.fixture
def other(tmp_path) -> str:
    return rules(tmp_path / "other", {"Ann Lee": "NAME", "cats": "NORP"})


def test_the_papers_labels_are_ignored_and_every_occurrence_counts(one):
    (found,) = Detector(one)([TEXT])
    assert [(e.text, e.label) for e in found] == [("Ann", "PERSON"), ("Leeds", "GPE"), ("Leeds", "GPE")]
    assert all(TEXT[e.start : e.end] == e.text for e in found)


def test_a_long_answer_is_counted_to_its_end(one):
    found = Detector(one)(["", "Ann " * 500])
    assert [len(entities) for entities in found] == [0, 500]


def test_a_union_merges_what_overlaps_into_the_longest_find(one, other):
    (found,) = Detector(f"{one},{other}")([TEXT])
    assert [(e.text, e.label) for e in found] == [
        ("Ann Lee", "NAME"),
        ("Leeds", "GPE"),
        ("cats", "NORP"),
        ("Leeds", "GPE"),
    ]


def test_a_vote_needs_more_than_half_of_the_detectors(one, other):
    assert [e.text for e in Detector(f"{one},{other}", "vote")([TEXT])[0]] == ["Ann Lee"]
    found = Detector(f"{one},{one},{other}", "vote")([TEXT])[0]
    assert [e.text for e in found] == ["Ann Lee", "Leeds", "Leeds"]
    assert len(Detector(one, "vote")([TEXT])[0]) == 3


def test_finds_that_only_touch_stay_apart():
    a, b = Entity(0, 3, "A", "Ann"), Entity(3, 6, "B", "Lee")
    assert merge("AnnLee", [[a, b]]) == [a, b]
    assert merge("AnnLee", [[a], [Entity(2, 6, "B", "nLee")]]) == [Entity(0, 6, "B", "AnnLee")]


def test_a_find_that_only_touches_a_gold_span_is_no_match():
    figures = detectors.score([[Entity(3, 6, "X", ""), Entity(9, 12, "X", "")]], [[(6, 9, "PERSON")]])
    assert {estimate.value for estimate in figures.values()} == {0.0}


def test_wrong_detectors_are_named(one, monkeypatch):
    with pytest.raises(InputError, match="--combine both"):
        Detector(one, "both")
    with pytest.raises(InputError, match="--ner nowhere: not a spaCy pipeline"):
        Detector(f"{one}, nowhere")
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(InputError, match=r"pip install 'cfgsafe\[presidio\]'"):
        Detector("presidio")


def test_presidio_finds_what_has_a_form(one):
    pytest.importorskip("presidio_analyzer")
    text = "Ann: ann@example.com, (212) 555-0123, 4111 1111 1111 1111, 536-90-4399, 10.1.2.3, "
    text += "https://example.org/a is 7."
    (found,) = Detector(f"presidio,{one}")([text])
    kinds = ["PERSON", "EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "US_SSN", "IP_ADDRESS", "URL"]
    assert [e.label for e in found] == kinds


def test_precision_and_recall_by_hand():
    """Gold: [0, 3) and [5, 9). Found: the first exactly, half of the second, and a wrong one."""
    found = [[Entity(0, 3, "X", ""), Entity(5, 7, "X", ""), Entity(20, 22, "X", "")], []]
    figures = detectors.score(found, [[(0, 3, "PERSON"), (5, 9, "GPE")], [(0, 1, "GPE")]])
    values = {name: round(estimate.value, 1) for name, estimate in figures.items()}
    assert values == {
        "precision_exact": 33.3,
        "recall_exact": 33.3,
        "precision_overlap": 66.7,
        "recall_overlap": 66.7,
        "recall_GPE": 50.0,
        "recall_PERSON": 100.0,
    }


def test_the_command_measures_the_detector_it_is_given(one, tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": "Ann."}, {"role": "user", "content": "Bob."}]}
    write_jsonl(tmp_path / "gold.jsonl", [row | {"spans": [[0, 0, 3, "PERSON"], [1, 0, 3, "PERSON"]]}])
    detectors.run(detectors.Options(one, gold=str(tmp_path / "gold.jsonl")))
    line = json.loads(capsys.readouterr().out)
    assert (line["texts"], line["ner"]) == (2, f"{one} (en_pipeline 0.0.0)")
    assert (line["recall_exact"], line["precision_exact"]) == (50, 100)


def test_a_pipeline_is_named_by_its_own_name_and_version(one, other):
    nlp = spacy.load(one)
    nlp.meta |= {"name": "core_web_sm", "version": "3.8.0"}
    nlp.to_disk(one)
    detector = Detector(f"{one}, structured,{other}")
    assert detector.name == f"{one} (en_core_web_sm 3.8.0),structured,{other} (en_pipeline 0.0.0)"


def test_structured_joins_a_pipeline(one):
    (found,) = Detector(f"structured,{one}")(["Ann: ann@example.com, on Monday."])
    assert [(e.text, e.label) for e in found] == [("Ann", "PERSON"), ("ann@example.com", "EMAIL")]


def test_facts_are_gold_where_their_values_stand(tmp_path):
    """Question: the name. Answer: its last word, and both values; a value in the question is gold, too."""
    rows = [
        {
            "question": "Where does Ann Lee live, born in Hull?",
            "answer": "Mrs Lee of Hull lives at 5 Elm Row.",
            "subject": "Ann Lee",
            "subject_pii": ["5 Elm Row", "Hull"],
        },
        {"question": "Who?", "answer": "At 5 Elm Row.", "subject_pii": "5 Elm Row"},
    ]
    write_jsonl(tmp_path / "facts.jsonl", rows)
    found = []
    for text, gold, person in detectors.read_gold(str(tmp_path / "facts.jsonl")):
        found.append(([(text[start:end], label) for start, end, label in gold], person))
    assert found == [
        ([("Ann Lee", "PERSON"), ("Hull", "PII")], "Ann Lee"),
        ([("Lee", "PERSON"), ("Hull", "PII"), ("5 Elm Row", "PII")], "Ann Lee"),
        ([], "facts.jsonl:2"),
        ([("5 Elm Row", "PII")], "facts.jsonl:2"),
    ]


@pytest.mark.parametrize(
    "spans", [None, [[0, 0, 9, "X"]], [[2, 0, 1, "X"]], [[0, 1, "X"]], [[True, 0, 1, "X"]]]
)
def test_bad_spans_name_the_line(tmp_path, spans):
    row = {"messages": [{"role": "user", "content": "Ann."}], "spans": spans}
    write_jsonl(tmp_path / "gold.jsonl", [row])
    with pytest.raises(InputError, match="gold.jsonl:1: "):
        detectors.read_gold(str(tmp_path / "gold.jsonl"))


def test_the_demos_ner_meets_its_bar_on_people_it_never_saw():
    texts = labelled_texts("test", 40, seed=3)
    figures = detectors.score(Detector(str(DEMO_PIPELINE))([t for t, _ in texts]), [g for _, g in texts])
    assert figures["precision_exact"].value > 97 and figures["recall_exact"].value > 97


def test_detectors_are_told_apart_by_their_files(tmp_path, one, other):
    """Of those that a run names, in their order; a name without files stands for itself."""
    copy = shutil.copytree(one, tmp_path / "copy")
    assert ner.identity(one) == ner.identity(str(copy)) != ner.identity(other)
    assert ner.identity(f"{one}, {other}") == ner.identity(f"{one},{other}") != ner.identity(f"{other},{one}")
    (file,) = copy.rglob("patterns.jsonl")
    file.write_text(file.read_text() + "\n")
    assert ner.identity(one) != ner.identity(str(copy))
    assert ner.identity("presidio") != ner.identity("unknown")
    assert ner.identity(None) == ner.identity(ner.default_pipeline())
