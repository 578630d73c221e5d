"""The letters and digits of a text in one spelling, and where each stands in the text as it is written.

Source: Unicode's NFKC and full case folding (UAX 15 and 31): full-width letters, ligatures, accents that
are characters of their own, blanks that do not break a line.
Deviations: what cannot be seen (soft hyphens, zero-width characters, the Arabic tatweel) is left out, digits
of every script are 0 to 9, dashes and apostrophes have one form each, and the Turkish i is an i with its dot
or without it. No accent is left out, and no script is written in another.

Run it: python -m pytest tests/test_matching.py
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

FORMS = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("’‘ʼʹ`´", "'") | {"ı": "i"})
INVISIBLE = "\u0640\u034f\ufe0e\ufe0f"  # besides the category Cf: tatweel, grapheme joiner, forms of emoji
DOT = "\u0307"  # above an i, it is no accent
JOINED_MARKS = "\uff9e\uff9f"  # half-width voicing marks
JAMO = range(0x1160, 0x1200)  # vowels and last consonants of a Korean syllable


@dataclass(frozen=True)
class Spelling:
    """The letters and digits of a text, folded; letter k stands at starts[k] to ends[k] of the text.

    `gaps[k]` is what stands before letter k, and the last gap what stands after all of them: blanks and
    punctuation, with one blank, or one line break, for each run of white space. `capital` says which letters
    are capitals. A character that folds to two letters ("ß") gives both the same place.
    """

    text: str
    letters: str
    starts: list[int]
    ends: list[int]
    gaps: list[str]
    capital: list[bool]

    @property
    def is_number(self) -> bool:
        return self.letters.isdecimal()


def read(text: str) -> Spelling:
    """
    >>> read("Ａnn  (1)").letters, read("Ann  (1)").gaps
    ('ann1', ['', '', '', ' (', ')'])
    """
    letters: list[str] = []
    starts, ends, gaps, capital = [], [], [], []
    gap = ""
    for start, end in _characters(text):
        for form, is_letter, is_capital in _forms(text[start:end]):
            if is_letter:
                letters.append(form)
                starts.append(start)
                ends.append(end)
                gaps.append(_gap(gap) if gap else "")
                capital.append(is_capital)
                gap = ""
            else:
                gap += form
    gaps.append(_gap(gap) if gap else "")
    return Spelling(text, "".join(letters), starts, ends, gaps, capital)


def _characters(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each character, with the marks and the invisible characters behind it."""
    start = 0
    for at in range(1, len(text)):
        if text[at] < "\x80" or not _belongs_to_the_one_before(text[at]):
            yield start, at
            start = at
    if text:
        yield start, len(text)


@lru_cache(maxsize=4096)
def _belongs_to_the_one_before(character: str) -> bool:
    is_mark = unicodedata.category(character).startswith("M")
    return is_mark or _is_invisible(character) or character in JOINED_MARKS or ord(character) in JAMO


def _is_invisible(character: str) -> bool:
    return character in INVISIBLE or unicodedata.category(character) == "Cf"


@lru_cache(maxsize=4096)
def _forms(character: str) -> tuple[tuple[str, bool, bool], ...]:
    """(folded, whether it is a letter or digit, whether it is a capital) of each part of a character."""
    seen = "".join(part for part in character if not _is_invisible(part))
    forms: list[tuple[str, bool, bool]] = []
    for part in unicodedata.normalize("NFKC", seen).translate(FORMS):
        for form in part.casefold().translate(FORMS):
            if form == DOT and forms and forms[-1][0] == "i":
                continue
            digit = unicodedata.decimal(form, None)
            after_a_letter = bool(forms) and forms[-1][1]
            is_letter = form.isalnum() or (after_a_letter and unicodedata.category(form).startswith("M"))
            forms.append((form if digit is None else str(digit), is_letter, part.isupper() or part.istitle()))
    return tuple(forms)


@lru_cache(maxsize=4096)
def _gap(between: str) -> str:
    """The gap with one blank for each run of white space, or one line break, with the > of a quoted mail."""
    return re.sub(r"\s*\n[\s>]*|\s+", lambda run: "\n" if "\n" in run[0] else " ", between)
