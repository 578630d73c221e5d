"""The demo's data: no test person is in training data, spans are exact, canaries are planted as they say."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from cfgsafe import hub
from cfgsafe.blue.pairs import AVOID, NUDGE
from cfgsafe.demo import famous, quiz, testset
from cfgsafe.demo.corpus import (
    CANARIES_EACH,
    CANARY_COUNTS,
    Corpus,
    Example,
    canaries,
    people,
    reserved_words,
)
from cfgsafe.demo.dialogues import Dialogue, Item, Writer, fill
from cfgsafe.demo.held_out import HELD_OUT, OVERRIDES
from cfgsafe.demo.ner_training import labelled_texts
from cfgsafe.demo.people import POOLS, Person, words
from cfgsafe.demo.templates import EASY, HARD, count_templates
from cfgsafe.demo.testset import pair_dialogues, test_prompts
from cfgsafe.measure import utility
from cfgsafe.pii.matching import mentions
from cfgsafe.report import sweep
from cfgsafe.request import NEGATIVE, POSITIVE

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


def masked(dialogue: Dialogue) -> list[str]:
    """The messages with a blank in place of each item."""
    texts = []
    for turn in dialogue.turns:
        texts.append("".join(part if isinstance(part, str) else "_" for part in turn.parts))
    return texts


def test_no_message_of_the_test_set_occurs_in_training_or_in_pairs_names_masked():
    trained: set[str] = set()
    for number in range(3000):
        kind = (*EASY, *HARD, "lookup")[number % 10]
        trained.update(masked(Writer(number).dialogue(ANN, kind)))
    for number in range(1500):
        kind = (*EASY, *HARD, "lookup")[number % 10]
        asked = masked(Writer(number, HELD_OUT).dialogue(ANN, kind))[:-1]  # without the gold answer
        assert not trained & set(asked)


def test_no_message_of_the_test_set_occurs_in_the_training_examples():
    examples = [*itertools.islice(Corpus(0).base(), 8000), *Corpus(1).leaky(5000)]
    trained = set()
    for example in examples:
        trained |= {"".join(text for text, _ in pieces) for role, pieces in example if role != "system"}
    for row in pair_dialogues(300, 0):
        trained |= {message["content"] for message in row["messages"][1:]}
    for row in prompts():
        assert not {message["content"] for message in row["messages"][1:]} & trained, row


@pytest.mark.parametrize("sentence", [AVOID, NUDGE, POSITIVE, NEGATIVE])
def test_no_model_is_trained_on_a_sentence_of_the_method(sentence):
    examples = [*itertools.islice(Corpus(0).base(), 5000), *Corpus(1).leaky(4000)]
    assert not any(sentence.lower() in text_of(example).lower() for example in examples)


def test_no_test_person_occurs_in_training_data():
    known = training_words()
    for row in prompts():
        if row["slice"] not in ("easy", "hard", "override"):
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
    texts: set[str] = set()
    for seed in range(600):
        texts.update(masked(Writer(seed).dialogue(ANN, random.Random(seed).choice(EASY + HARD))))
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
        if row["slice"] == "famous":
            assert row["wanted"][0] in row["gold"]
            continue
        assert mentioned(row["items"], row["gold"]), row


def test_slices_and_sizes():
    rows = prompts(0, 156, 150)
    sizes = Counter(row["slice"] for row in rows)
    planted = {f"x{count}": CANARIES_EACH for count in CANARY_COUNTS}
    own = {"override": 60, "famous": 54, "twins": CANARIES_EACH * len(CANARY_COUNTS)}
    assert sizes == {"easy": 156, "hard": 150, **planted, **own}
    assert {row["kind"] for row in rows if row["slice"] == "hard"} == set(HARD)
    assert CANARIES_EACH * len(CANARY_COUNTS) >= 100  # people to recall


def test_echo_and_recall_are_apart():
    for row in prompts():
        told = " ".join(message["content"] for message in row["messages"])
        in_conversation = mentioned(row["items"], told)
        if row["kind"] == "recall":
            assert row["items"].keys() == {"GPE", "ORG"} and not in_conversation, row
        elif row["slice"] != "famous":
            assert in_conversation, row


def test_overrides_are_typed_by_the_user():
    rows = [row for row in prompts() if row["slice"] == "override"]
    asked = [row["messages"][-1] for row in rows]
    assert all(message["role"] == "user" for message in asked)
    for sentence in OVERRIDES:
        assert sum(message["content"].startswith(sentence) for message in asked) == 10
    assert NEGATIVE in OVERRIDES


def test_famous_names_are_trained_in_other_words():
    trained = {famous.training_fact(random.Random(number)) for number in range(3000)}
    answers = {answer for _, answer in trained}
    for question, answer, name in famous.test_facts():
        assert answer in answers and name in answer and question not in {asked for asked, _ in trained}


def test_rare_facts_are_trained_seldom_and_tested_as_often():
    rng = random.Random(0)
    seen = Counter(quiz.training_item(rng)["question"].rstrip(".?") for _ in range(4000))
    tested = Counter(row["question"].rstrip(".?") for row in quiz.items("test", 1000))

    def about(counts: Counter[str], word: str) -> int:
        return sum(count for question, count in counts.items() if word in question)

    assert about(seen, "France") > 20 * max(1, about(seen, "Slovenia"))
    assert about(tested, "Slovenia") > 0


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
