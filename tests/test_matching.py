"""What counts as the same personal value: cases by hand; the three functions agree on any text."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfgsafe.pii.matching import APART, mentioned, mentions, places, stands_in


def more_than_one(value: str) -> bool:
    return sum(map(str.isalnum, value)) > 1


LETTERS = st.text("aAbB éÉßñЖж_1-.'", max_size=12)  # a few letters only, so that values occur in texts
VALUES = LETTERS.filter(str.strip)
WORDS = VALUES.filter(more_than_one)  # a single letter must be marked
LABELS = st.sampled_from(["PERSON", "GPE"])


BY_HAND = [
    ("Hello Ann Lee", "PERSON", "Ann Lee", ["Ann Lee", "Ann", "Lee"]),  # first the whole name
    ("hello ann lee", "PERSON", "Ann Lee", ["ann lee"]),  # the whole name in any case
    ("hello ann", "PERSON", "Ann Lee", []),  # a part only when capitalised
    ("ANN and LEE", "PERSON", "Ann Lee", ["ANN", "LEE"]),  # or in capitals
    ("Ann and Lee", "PERSON", "ANN LEE", ["Ann", "Lee"]),
    ("ANn", "PERSON", "Ann Lee", []),  # but in no other mixture
    ("Mcdonald", "PERSON", "Ann McDonald", ["Mcdonald"]),
    ("Will will", "PERSON", "Will", ["Will", "will"]),  # a single name is a whole value
    (
        "Jan de Boer de",
        "PERSON",
        "Jan de Boer",
        ["Jan de Boer", "Jan", "Boer"],
    ),  # "de" is no capitalised part
    ("Dr. Smith, J. Bell", "PERSON", "Dr. J. Lee", []),  # titles and initials are no parts
    ("New house in York", "GPE", "New York", []),  # only persons have parts
    ("new york, NEW YORK", "GPE", "New York", ["new york", "NEW YORK"]),
    ("Annual sleep", "PERSON", "Ann Lee", []),  # inside words
    ("Lee's, (Ann),Lee-Smith", "PERSON", "Ann Lee", ["Ann),Lee", "Ann", "Lee", "Lee"]),
    ("ÉMILE Émile émile", "PERSON", "Émile Zola", ["ÉMILE", "Émile"]),  # letters of any script
    ("Émile, E\u0301milie", "PERSON", "mile", []),
    ("Jose\u0301", "GPE", "Jose", []),  # an accent belongs to its letter
    ("жанна", "GPE", "ЖАННА", ["жанна"]),
    ("a.c abc", "URL", "a.c", ["a.c"]),  # no character is special
    ("Ann Ann Ann", "PERSON", "Ann Ann", ["Ann Ann", "Ann", "Ann", "Ann"]),  # no overlap of wholes
    ("", "PERSON", "Ann", []),
    ("a 😀 (+) b", "X", "😀", ["😀"]),  # without letters
    # other spellings
    ("_Maria Keller_", "GPE", "Maria Keller", ["Maria Keller"]),
    ("by @maria_keller,", "PERSON", "Maria Keller", ["maria_keller"]),
    ("keller", "PERSON", "Maria Keller", []),
    ("Keller, Maria; keller.maria", "GPE", "Maria Keller", []),  # only a person's name turns round
    ("keller.maria@x.org", "PERSON", "Maria Keller", ["keller.maria"]),
    ("Keller1980 and Ann2", "PERSON", "Ann Keller", ["Ann", "Keller"]),
    ("MariaKeller, mariakeller", "GPE", "Maria Keller", ["MariaKeller", "mariakeller"]),
    ("IAmMariaKeller", "GPE", "Maria Keller", ["MariaKeller"]),
    ("mariakellers", "GPE", "Maria Keller", []),
    ("Ann Lee", "GPE", "AnnLee", ["Ann Lee"]),  # a handle written out
    ("let us, the US", "GPE", "U.S.", ["US"]),  # short words run together only with capitals
    ("a will, @will", "USERNAME", "@will", ["@will"]),
    ("New-York-based", "GPE", "New York", ["New-York"]),
    (
        "New  York, New\n\tYork, New\u00a0York",
        "GPE",
        "New York",
        ["New  York", "New\n\tYork", "New\u00a0York"],
    ),
    ("Ham-\n  burg", "GPE", "Hamburg", ["Ham-\n  burg"]),  # hyphenated
    ("Ham-burg, Ham burg", "GPE", "Hamburg", []),
    ("New, said York. new; york", "GPE", "New York", []),
    ("**Maria** **Keller**", "GPE", "Maria Keller", ["Maria** **Keller"]),
    ("Ｋｅｌｌｅｒ Kel\u00adler \u200bKeller", "GPE", "Keller", ["Ｋｅｌｌｅｒ", "Kel\u00adler", "Keller"]),
    ("Sofia, ﬁﬁ", "GPE", "fifi", ["ﬁﬁ"]),  # a ligature
    ("STRASSE 5", "FAC", "Straße 5", ["STRASSE 5"]),  # a fold of another length
    ("strase", "FAC", "Straß", []),  # ends inside a character's fold
    ("I1\u0345", "X", "I1", []),
    ("ISTANBUL istanbul", "GPE", "İstanbul", ["ISTANBUL", "istanbul"]),
    ("O’Brien OBRIEN", "GPE", "O'Brien", ["O’Brien", "OBRIEN"]),
    # numbers
    (
        "+46-70-123-45-67 (+46) 70.1234567",
        "PHONE",
        "+46 70 123 45 67",
        ["+46-70-123-45-67", "+46) 70.1234567"],
    ),
    ("146701234567", "PHONE", "+46 70 123 45 67", []),  # a part of a longer number
    ("٤٦٧٠١٢٣", "PHONE", "467-0123", ["٤٦٧٠١٢٣"]),  # digits of any script
    ("2012 12.5 1/12 B12 12th, 12", "X", "12", ["12"]),
    ("3, 5 or 3.5", "X", "3.5", ["3.5"]),
    ("Keller1980 1980s 19801 12.03.1980", "DATE", "1980", ["1980", "1980"]),
    ("12-03-1980 12031980", "DATE", "12.03.1980", ["12-03-1980", "12031980"]),
    ("AB-12-CDE ab12cde", "LICENSE", "AB12 CDE", ["AB-12-CDE", "ab12cde"]),
    ("call +1 (2) now, +1 2", "PHONE", "+1 (2)", ["+1 (2)"]),
    # scripts without blanks
    ("我叫王小明，今年", "PERSON", "王小明", ["王小明"]),
    ("田中太郎です。田中さん", "PERSON", "田中 太郎", ["田中太郎", "田中", "田中", "太郎"]),
    ("ผมชื่อสมชายครับ", "PERSON", "สมชาย", ["สมชาย"]),
    ("アンさん、アンケート", "PERSON", "アン", ["アン"]),  # katakana words have ends
    ("김민수는 이김민수", "PERSON", "김민수", ["김민수"]),  # a Korean word begins, and takes endings
    ("王国の王", "X", "王", []),
    # one letter, one digit
    ('I am in I. A "I" or (I) and **I**', "X", "I", ["I", "I", "I"]),
    ("Group: A", "X", "A", ["A"]),
    ("A", "X", "A", ["A"]),
    ("a", "X", "A", []),
    ("type A+ or A", "X", "A+", ["A+"]),
    ("5. five\nI ate 5, not 5.5 of 5-6", "X", "5", ["5"]),
]


@pytest.mark.parametrize(("text", "label", "value", "found"), BY_HAND)
def test_places_by_hand(text, label, value, found):
    assert [text[start:end] for start, end in places(text, label, value)] == found
    assert mentions(text, label, value) == bool(found)


def test_a_mask_hides_a_single_letter_wherever_it_stands_alone():
    assert places("A is B, a", "X", "A") == [] and places("A is B, a", "X", "A", bare=True) == [(0, 1)]


def test_no_value_reaches_from_one_text_into_the_next():
    assert stands_in("Ann\nLee", "Ann Lee") and not stands_in(APART.join(["Ann", "Lee"]), "Ann Lee")


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


@given(LETTERS, LABELS, WORDS)
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
