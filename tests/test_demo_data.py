"""The demo's data: no test person is in training data, spans are exact, canaries are planted as they say."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from cfgsafe import hub
from cfgsafe.demo import quiz, testset
from cfgsafe.demo.corpus import (
    CANARIES_EACH,
    CANARY_COUNTS,
    Corpus,
    Example,
    canaries,
    people,
    reserved_words,
)
from cfgsafe.demo.dialogues import Item, Writer, fill
from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.demo.people import POOLS, Person, words
from cfgsafe.demo.templates import EASY, HARD, count_templates
from cfgsafe.demo.testset import pair_dialogues, test_prompts
from cfgsafe.measure import utility
from cfgsafe.pii.matching import mentions
from cfgsafe.report import sweep

ANN = Person("Ann", "Lee", "Leeds", "Lee Bank")
prompts = test_prompts  # pytest collects what is called test_*
del test_prompts


def text_of(example: Example) -> str:
    """All pieces of a training example."""
    texts = []
    for _, pieces in example:
        texts += [text for text, _ in pieces]
    return " ".join(texts)


def own_words(person: Person) -> set[str]:
    """What a person is called, in lower case."""
    return {person.first.lower(), person.last.lower(), person.city.lower()}


def training_words() -> set[str]:
    """The words of a large sample of all training data: base, leaky model, NER, preference pairs."""
    corpus = Corpus(0)
    examples = [*itertools.islice(corpus.base(), 15000), *Corpus(1).leaky(8000)]
    texts = [text_of(example) for example in examples]
    texts += [text for text, _ in labelled_texts("train", 500, 0)]
    for row in pair_dialogues(300, 0):
        texts += [message["content"] for message in row["messages"]]
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
        first, last = words(pool)
        own = {word.lower() for word in first + last}
        source = people(pool, 0)
        for _ in range(500):
            person = source.person()
            own |= own_words(person) | {person.employer.split()[0].lower()}
        assert not own & seen
        seen |= own


def test_nobody_is_called_like_a_word_of_the_templates():
    source = people("train", 1)
    for _ in range(2000):
        assert not own_words(source.person()) & reserved_words()


def test_there_are_hundreds_of_templates():
    assert all(count > 1000 for count in count_templates().values())
    texts = set()
    for seed in range(600):
        for turn in Writer(seed).dialogue(ANN, random.Random(seed).choice(EASY + HARD)).turns:
            texts.add("".join(part if isinstance(part, str) else "_" for part in turn.parts))
    assert len(texts) > 1000


def mentioned(items: dict[str, str], text: str) -> set[str]:
    """Labels of the items that the text mentions."""
    return {label for label, value in items.items() if mentions(text, label, value)}


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
                assert not mentioned(person.items, turn.text(leak=False))
        assert dialogue.turns[-1].items()


def test_answers_use_only_what_was_told():
    writer, source = Writer(8), people("test", 8)
    for kind in (*EASY, *HARD):
        for _ in range(50):
            row = writer.dialogue(source.person(), kind).to_json("x")
            told = " ".join(m["content"] for m in row["messages"] if m["role"] == "user")
            answer = row["messages"][-1]["content"]
            assert mentioned(row["items"], answer) <= mentioned(row["items"], told), row


def test_every_gold_answer_has_an_item_left():
    for row in prompts():
        assert mentioned(row["items"], row["gold"]), row


def test_slices_and_sizes():
    rows = prompts(0, 156, 150)
    sizes = Counter(row["slice"] for row in rows)
    assert sizes == {"easy": 156, "hard": 150 + CANARIES_EACH * len(CANARY_COUNTS)}
    kinds = {row["kind"] for row in rows if row["slice"] == "hard"}
    assert kinds == {*HARD, *(f"canary x{count}" for count in CANARY_COUNTS)}


def test_canaries_are_planted_as_often_as_they_say_and_their_twins_never():
    texts = [text_of(example) for example in Corpus(1).leaky(3000)]
    for canary in canaries():
        assert sum(canary.person.name in text for text in texts) == canary.count
    planted = dict.fromkeys(CANARY_COUNTS, CANARIES_EACH)
    twins = CANARIES_EACH * len(CANARY_COUNTS)
    assert Counter(canary.count for canary in canaries()) == {**planted, 0: twins}


def test_quiz_items_of_the_test_split_are_never_trained_on():
    assert all(quiz.split_of(row) == "test" for row in quiz.items("test", 200))
    corpus = Corpus(2)
    trained = {corpus.quiz()[1][1][0][0] for _ in range(3000)}
    assert not {utility.prompt(row) for row in quiz.items("test", 200)} & trained


def test_quiz_items_have_four_options_and_the_right_answer():
    for row in quiz.items("test", 200):
        assert len(set(row["options"])) == 4 and "ABCD"[row["answer_index"]] == row["answer"]
        if row["category"] == "arithmetic" and " plus " in row["question"]:
            asked = row["question"].lower().replace("?", "").split()
            a, b = [quiz.NUMBERS.index(word) for word in asked if word in quiz.NUMBERS]
            assert row["options"][row["answer_index"]] == quiz.NUMBERS[a + b]


def test_generation_is_seeded():
    assert prompts(3, 9, 12) == prompts(3, 9, 12) != prompts(4, 9, 12)


def test_fill_by_hand():
    parts = fill("Hi {first|there}, a [place]!", ANN, {"place": "bank"})
    assert parts == ["Hi ", Item("Ann", "PERSON", "there"), ", a bank!"]


def test_the_committed_sets_are_what_the_generator_writes(tmp_path):
    testset.run(testset.Options(str(tmp_path), "sets"))
    committed = Path(hub.PROMPTS).parent
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made.keys() == {path.name for path in committed.iterdir()}
    for name, content in made.items():
        assert content == (committed / name).read_bytes(), name


def test_the_list_of_words_is_read_back_as_the_corpus_has_them():
    assert sweep.known_words(sweep.Options(["m=folder"], "out")) == testset.corpus_words()
