"""What counts as the same personal value: cases by hand; the three functions agree on any text."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfgsafe.pii.matching import mentioned, mentions, places, stands_in

LETTERS = st.text("aAbB éÉßñЖж_1-.'", max_size=12)  # a few letters only, so that values occur in texts
VALUES = LETTERS.filter(str.strip)
LABELS = st.sampled_from(["PERSON", "GPE"])


@pytest.mark.parametrize(
    ("text", "label", "value", "found"),
    [
        ("Hello Ann Lee", "PERSON", "Ann Lee", ["Ann Lee", "Ann", "Lee"]),  # first the whole name
        ("hello ann lee", "PERSON", "Ann Lee", ["ann lee"]),  # the whole name in any case
        ("hello ann", "PERSON", "Ann Lee", []),  # a part only when capitalised
        ("ANN and LEE", "PERSON", "Ann Lee", ["ANN", "LEE"]),  # or in capitals
        ("ANn", "PERSON", "Ann Lee", []),  # but in no other mixture
        ("Will will", "PERSON", "Will", ["Will", "will"]),  # a single name is a whole value
        ("Jan de Boer, de", "PERSON", "de Boer", ["de Boer", "Boer"]),  # "de" is no capitalised part
        ("New house in York", "GPE", "New York", []),  # only persons have parts
        ("new york, NEW YORK", "GPE", "New York", ["new york", "NEW YORK"]),
        ("Annual sleep", "PERSON", "Ann Lee", []),  # inside words
        ("Ann2 _Ann_ Lee's", "PERSON", "Ann Lee", ["Lee"]),  # digits and _ belong to words, ' does not
        ("(Ann),Lee-Smith", "PERSON", "Ann Lee", ["Ann", "Lee"]),
        ("ÉMILE Émile émile", "PERSON", "Émile Zola", ["ÉMILE", "Émile"]),  # letters of any script
        ("Émile", "PERSON", "mile", []),
        ("жанна", "GPE", "ЖАННА", ["жанна"]),
        ("call +1 (2) now, +1 (2)3", "PHONE", "+1 (2)", ["+1 (2)"]),  # no character is special
        ("a.c abc", "URL", "a.c", ["a.c"]),
        ("New  York", "GPE", "New York", []),  # blanks count
        ("Ann Ann Ann", "PERSON", "Ann Ann", ["Ann Ann", "Ann", "Ann", "Ann"]),  # no overlap of wholes
        ("", "PERSON", "Ann", []),
    ],
)
def test_places_by_hand(text, label, value, found):
    assert [text[start:end] for start, end in places(text, label, value)] == found
    assert mentions(text, label, value) == bool(found)


def test_spans_of_a_name_and_its_parts_overlap():
    assert places("Dear Ann Lee", "PERSON", "Ann Lee") == [(5, 12), (5, 8), (9, 12)]


def test_only_the_whole_value_stands_in_a_text():
    assert stands_in("to new york.", "New York") and stands_in("NEW YORK", "New York")
    assert not stands_in("Ann", "Ann Lee") and not stands_in("Annual", "Ann") and not stands_in("", "Ann")


def test_many_known_values_are_looked_up_without_a_pattern_each(monkeypatch):
    """No pattern is compiled for a value whose letters do not occur at all."""
    monkeypatch.setattr(re, "compile", lambda *_: pytest.fail("compiled"))
    rng = random.Random(0)
    names = ["".join(rng.choices("bcdfg", k=8)) for _ in range(1000)]
    assert not any(stands_in("Hello Ann Lee", name) for name in names)


@given(LETTERS, LABELS, VALUES)
def test_a_value_is_mentioned_exactly_where_it_has_a_place(text, label, value):
    assert mentions(text, label, value) == bool(places(text, label, value))


@given(LETTERS, VALUES)
def test_a_value_stands_in_a_text_exactly_where_it_has_a_place_without_parts(text, value):
    assert stands_in(text, value) == bool(places(text, "GPE", value))


@given(LETTERS, LABELS, VALUES)
def test_a_value_between_words_is_found_at_its_place(text, label, value):
    start = len(text) + 1
    around = f"{text} {value} {text}"
    assert stands_in(around, value) and mentions(around, label, value)
    assert any(a <= start + len(value) and start <= b for a, b in places(around, label, value))


@given(LETTERS, st.lists(st.tuples(LABELS, VALUES), max_size=4, unique=True))
def test_what_several_values_mention_together(text, values):
    """A label is mentioned if one of its values is; one value alone, exactly if it is."""
    found = mentioned(text, values)
    assert found == [pair for pair in values if pair in found]
    assert all(mentions(text, *pair) for pair in found)
    assert {label for label, _ in found} == {label for label, value in values if mentions(text, label, value)}
    for pair in values:
        assert bool(mentioned(text, [pair])) == mentions(text, *pair)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ann Lee", ["Ann Lee"]),
        ("Ann, Ann Lee", ["Ann Lee"]),  # the longer name has both places
        ("Lee", ["Ann Lee"]),  # a part of two names is one place
        ("Bob Lee", ["Bob Lee"]),  # a whole name before a part of another
        ("Ann Bob Lee", ["Ann Lee", "Bob Lee"]),
        ("Ann and Mrs Lee", ["Ann Lee"]),  # one person
        ("ann", ["Ann"]),  # in lower case a whole value, but no part of one
        ("Zoe", []),
    ],
)
def test_a_place_counts_for_one_value_of_a_label(text, found):
    names = ["Ann", "Ann Lee", "Bob Lee"]
    assert mentioned(text, [("PERSON", name) for name in names]) == [("PERSON", name) for name in found]
