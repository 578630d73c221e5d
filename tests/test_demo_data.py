"""The demo's data: nobody of the test set is met in training, spans are exact, canaries are planted as often as they say."""

import itertools
import random
import re
from collections import Counter

import pytest

from cfgsafe.demo import quiz
from cfgsafe.demo.corpus import CANARIES_EACH, CANARY_COUNTS, Corpus, canaries, people, reserved_words
from cfgsafe.demo.dialogues import Writer, fill
from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.demo.people import POOLS, Person, words
from cfgsafe.demo.templates import EASY, HARD, count_templates
from cfgsafe.demo.testset import pair_dialogues, test_prompts
from cfgsafe.measure import utility
from cfgsafe.pii.matching import mentions

ANN = Person("Ann", "Lee", "Leeds", "Lee Bank")
prompts = test_prompts  # pytest collects what is called test_*
del test_prompts


def training_words() -> set[str]:
    """The words of a large sample of everything anything is trained on: base, leaky model, NER, preference pairs."""
    corpus = Corpus(0)
    examples = [*itertools.islice(corpus.base(), 15000), *Corpus(1).leaky(8000)]
    texts = [text for example in examples for _, pieces in example for text, _ in pieces]
    texts += [text for text, _ in labelled_texts("train", 500, 0)]
    texts += [m["content"] for row in pair_dialogues(300, 0) for m in row["messages"]]
    return set(re.findall(r"[a-z]+", " ".join(texts).lower()))


def test_no_test_person_occurs_in_training_data():
    known = training_words()
    for row in prompts():
        if row["id"].startswith("canary"):
            continue
        first, last = row["items"]["PERSON"].lower().split()
        stem = row["items"]["ORG"].lower().split()[0]
        assert not {first, last, row["items"]["GPE"].lower(), stem} & known, row["items"]


def test_pools_share_no_word():
    seen: set[str] = set()
    for pool in POOLS:
        own = {word.lower() for source in words(pool) for word in source}
        source = people(pool, 0)
        for person in (source.person() for _ in range(500)):
            own |= {
                person.first.lower(),
                person.last.lower(),
                person.city.lower(),
                person.employer.split()[0].lower(),
            }
        assert not own & seen
        seen |= own


def test_nobody_is_called_like_a_word_of_the_templates():
    source = people("train", 1)
    for person in (source.person() for _ in range(2000)):
        assert not {person.first.lower(), person.last.lower(), person.city.lower()} & reserved_words()


def test_there_are_hundreds_of_templates():
    assert all(count > 1000 for count in count_templates().values())
    texts = {
        "".join(p if isinstance(p, str) else "_" for p in turn.parts)
        for row in range(600)
        for turn in Writer(row).dialogue(ANN, random.Random(row).choice(EASY + HARD)).turns
    }
    assert len(texts) > 1000


@pytest.mark.parametrize("kind", [*EASY, *HARD, "lookup"])
def test_spans_are_exact_and_clean_answers_hold_no_item(kind):
    writer, source = Writer(7), people("test", 7)
    for _ in range(50):
        person = source.person()
        dialogue = writer.dialogue(person, kind)
        row = dialogue.to_json("x")
        for message, start, end, label in row["spans"]:
            assert row["messages"][message]["content"][start:end] in row["items"][label]
        for turn in dialogue.turns:
            if turn.role == "assistant":
                assert not any(
                    mentions(turn.text(leak=False), label, value) for label, value in person.items.items()
                )
        assert dialogue.turns[-1].items()


def test_answers_use_only_what_was_told():
    writer, source = Writer(8), people("test", 8)
    for kind in (*EASY, *HARD):
        for _ in range(50):
            row = writer.dialogue(source.person(), kind).to_json("x")
            told = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
            answer = row["messages"][-1]["content"]
            assert all(mentions(told, k, v) for k, v in row["items"].items() if mentions(answer, k, v)), row


def test_every_gold_answer_has_an_item_left():
    for row in prompts():
        assert any(mentions(row["gold"], label, value) for label, value in row["items"].items()), row


def test_slices_and_sizes():
    rows = prompts(0, 156, 150)
    assert Counter(row["slice"] for row in rows) == {
        "easy": 156,
        "hard": 150 + CANARIES_EACH * len(CANARY_COUNTS),
    }
    assert {row["kind"] for row in rows if row["slice"] == "hard"} == {
        *HARD,
        *(f"canary x{n}" for n in CANARY_COUNTS),
    }


def test_canaries_are_planted_as_often_as_they_say_and_their_twins_never():
    wholes = [
        " ".join(text for _, pieces in example for text, _ in pieces) for example in Corpus(1).leaky(3000)
    ]
    lookups = [whole for whole in wholes if any(canary.person.last in whole for canary in canaries())]
    for canary in canaries():
        assert sum(canary.person.name in whole for whole in lookups) == canary.count
    assert Counter(c.count for c in canaries()) == {
        **dict.fromkeys(CANARY_COUNTS, CANARIES_EACH),
        0: CANARIES_EACH * len(CANARY_COUNTS),
    }


def test_quiz_items_of_the_test_split_are_never_trained_on():
    assert all(quiz.split_of(row) == "test" for row in quiz.items("test", 200))
    corpus = Corpus(2)
    trained = {corpus.quiz()[1][1][0][0] for _ in range(3000)}
    assert not {utility.prompt(row) for row in quiz.items("test", 200)} & trained


def test_quiz_items_have_four_options_and_the_right_answer():
    for row in quiz.items("test", 200):
        assert len(set(row["options"])) == 4 and "ABCD"[row["answer_index"]] == row["answer"]
        if row["category"] == "arithmetic" and " plus " in row["question"]:
            a, b = [
                quiz.NUMBERS.index(w)
                for w in row["question"].lower().replace("?", "").split()
                if w in quiz.NUMBERS
            ]
            assert row["options"][row["answer_index"]] == quiz.NUMBERS[a + b]


def test_generation_is_seeded():
    assert prompts(3, 9, 12) == prompts(3, 9, 12) != prompts(4, 9, 12)


def test_fill_by_hand():
    assert [
        p if isinstance(p, str) else (p.value, p.clean)
        for p in fill("Hi {first|there}, a [place]!", ANN, {"place": "bank"})
    ] == ["Hi ", ("Ann", "there"), ", a bank!"]
