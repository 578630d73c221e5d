"""Where a text holds a personal value: one rule for counts, masks, rewards and pairs.

A value counts where its letters and digits stand as whole words, whatever the case, the spelling (see
cfgsafe/pii/spelling.py) and what is between them: "Maria Keller" also as `_Maria_ Keller`,
`maria.keller@x.org`, "MariaKeller1980", "Keller, Maria" and over two lines, hyphenated too. What limits that:

- Parts of a PERSON's name count on their own, but only capitalised: "Will" is a name, "will" is not.
  Initials and titles ("J.", "Dr.") are no parts. In a script without capitals a part needs two letters.
- The words of a value may run together ("mariakeller") if they have 6 letters or more, or where each begins
  with a capital: "U.S." is not "us". Shorter values keep signs such as @ and # at their ends.
- Digits may be grouped in any way if they are 6 or more: +46 70 123 45 67 is (+46) 70-1234567. Otherwise
  what is between two digits counts, because 3.5 is not 3, 5. A number is no part of a longer one, and one
  below 1000 no part of 12.5, 1/12 or B12 either. 1980 stands in Keller1980, but not in 1980s.
- Chinese, Japanese, Thai, Lao, Khmer, Burmese and Tibetan values of two letters or more may stand inside
  running text. Katakana words end only at other letters; Korean ones must begin, but take endings.
- A single letter counts in its own case and marked as a value ("A", (A), **A**, Group: A), because "I" and
  "a" stand in every text. Masks hide it wherever it stands alone.

Out of scope: typing errors, inflection (Kellers, Hebrew and Arabic prefixes), letters without their accents,
transliteration (Müller as Mueller), translation, nicknames, initials (of M. Keller the last word counts),
other writings of a date or number (March for 03, 0046 for +46), and encodings (%20, &nbsp;, base64).

Run it: python -m pytest tests/test_matching.py
"""

import re
from functools import lru_cache

from cfgsafe.pii.spelling import Spelling, read

Place = tuple[int, int]  # start, end

LONG = 6  # letters and digits: from here on separators may come and go
YEAR = 4  # digits: from here on a number may follow a word directly
WORD = 3  # letters: from here on a digit may stand directly beside them
APART = "\0"  # no value reaches over it
GAP = re.compile(r"([*_~`]*[^\0█!?;|<>{}=]){,3}[*_~`]*")  # between the words of a value; █ is a mask
NUMBER_GAP = re.compile(r"[\s\-./()_:+]{,3}")  # between the digits of a long number
HYPHEN = re.compile(r"-\s?\n")  # a word goes on in the next line
IN_A_NUMBER = re.compile(r"[.,/:'-]")  # between two digits of one number
SOFT = " \n.,;:!?\"'()[]*_~`"  # at the ends of a short value, these need not be there
OPEN, CLOSE = re.compile(r"[\"'(\[*_`«“„]\Z"), re.compile(r"[\"')\]*_`»”“]")
LEAD, END = re.compile(r"[:=]\s?\Z|\A\Z|\n\Z"), re.compile(r"[.,;]?(?:\n|\Z)")  # around a value on its own
NUMBERING = re.compile(r"[.)]\s")
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u309f\u3400-\u9fff\U00020000-\U0003ffff]"
)
KATAKANA = re.compile("[\u30a0-\u30ff]")
KOREAN = re.compile("[\uac00-\ud7af]")


def places(text: str, label: str, value: str, bare: bool = False) -> list[Place]:
    """(start, end) of each place of `value`: first as a whole, then the parts of a PERSON's name.

    With `bare` also a single letter that nothing marks as a value.

    >>> places("Dear Ann, ann_lee", "PERSON", "Ann Lee")
    [(10, 17), (5, 8)]
    """
    given = _spelling_of_text(text)
    found = _whole(given, value, bare)
    if label == "PERSON":
        for turned in _last_name_first(value):
            found += _whole(given, turned)
        for part in name_parts(value):
            found += [place for place in _whole(given, part) if _is_name(text[slice(*place)], part)]
    return found


def mentions(text: str, label: str, value: str) -> bool:
    """Whether `text` holds `value`, or a capitalised part of it if it is a PERSON's name.

    >>> mentions("Mrs Lee", "PERSON", "Ann Lee"), mentions("York", "GPE", "New York")
    (True, False)
    """
    return bool(places(text, label, value))


def mentioned(text: str, values: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (label, value) pairs that `text` mentions, in their order.

    A place in the text counts for one value of its label: for one that stands there whole before one
    of which it holds a part, and for a long name before a part of it that is a value as well.

    >>> mentioned("Ann Lee, Ann", [("PERSON", "Ann"), ("PERSON", "Ann Lee"), ("PERSON", "Bob Lee")])
    [('PERSON', 'Ann Lee')]
    """

    def rank(pair: tuple[str, str]) -> tuple[bool, bool]:
        label, value = pair
        longer = [other for kind, other in values if kind == label and len(other) > len(value)]
        return any(stands_in(other, value) for other in longer), not stands_in(text, value)

    found: set[tuple[str, str]] = set()
    taken: dict[str, list[Place]] = {}  # label -> its places so far
    for label, value in sorted(values, key=rank):
        covered = taken.setdefault(label, [])
        new = [place for place in places(text, label, value) if not _overlaps(place, covered)]
        if new:
            found.add((label, value))
            covered += new
    return [pair for pair in values if pair in found]


def _overlaps(place: Place, others: list[Place]) -> bool:
    start, end = place
    return any(start < last and first < end for first, last in others)


def stands_in(text: str, value: str) -> bool:
    """Whether `text` holds the whole `value`, in any spelling."""
    return bool(_whole(_spelling_of_text(text), value))


def exact_places(text: str, words: str) -> list[Place]:
    """Where exactly these words stand, in any case: for what is no personal value, such as a quiz's options.

    >>> exact_places("-3 or _Ice_", "-3"), exact_places("-3 or _Ice_", "ice")
    ([(0, 2)], [(7, 10)])
    """
    pattern = rf"(?<![^\W_]){re.escape(words)}(?![^\W_])"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


_spelling_of_text = lru_cache(maxsize=256)(read)
_spelling_of_value = lru_cache(maxsize=65536)(read)  # a value is looked for in every text


def _whole(given: Spelling, value: str, bare: bool = False) -> list[Place]:
    """The places of a whole value, from left to right, without overlaps.

    The cheap test comes first, because hardly any of thousands of known values occurs in a given text.
    """
    wanted = _spelling_of_value(value)
    at = given.letters.find(wanted.letters)
    if at < 0:
        return []
    if not wanted.letters:  # only signs
        signs = re.escape(value.strip())
        return [match.span() for match in re.finditer(signs, given.text)] if signs else []
    found = []
    while at >= 0:
        end = at + 1
        if _is_place(wanted, given, at, bare):
            found.append(_with_its_ends(wanted, given, at))
            end = at + len(wanted.letters)
        at = given.letters.find(wanted.letters, end)
    return found


def _is_place(value: Spelling, text: Spelling, at: int, bare: bool) -> bool:
    """Whether the letters of `value`, which stand at letter `at` of `text`, are the value."""
    end = at + len(value.letters)
    if not (_is_edge(value, text, at, True) and _is_edge(value, text, end, False)):
        return False
    if len(value.letters) < LONG and not _has_its_signs(value, text, at, end):
        return False
    if len(value.letters) == 1 and not _is_marked(value, text, at, bare):
        return False
    inner = range(1, len(value.letters))
    return all(_is_same_gap(value, k, text, at + k) for k in inner if value.gaps[k] != text.gaps[at + k])


def _is_edge(value: Spelling, text: Spelling, at: int, is_first: bool) -> bool:
    """Whether a word, and not only a part of one, begins with letter `at` of the text, or ends before it."""
    if at in (0, len(text.letters)):
        return True
    if text.starts[at - 1] == text.starts[at]:
        return False  # inside a character
    before, after = text.letters[at - 1], text.letters[at]
    if value.is_number and len(value.letters) < YEAR:
        return _is_apart(before, text.gaps[at], after)
    if text.gaps[at]:
        return True
    outer, inner = (before, after) if is_first else (after, before)
    if outer.isdecimal():
        return not inner.isdecimal() and len(value.letters) >= WORD
    if inner.isdecimal():
        return len(value.letters) >= (WORD if is_first else LONG)
    takes_endings = not is_first and KOREAN.match(inner) and len(value.letters) > 1
    return _is_boundary(value, text, at) or bool(takes_endings)


def _is_apart(before: str, gap: str, after: str) -> bool:
    """Whether a small number is none of a larger one, and no part of a word."""
    one_number = before.isdecimal() and after.isdecimal() and IN_A_NUMBER.fullmatch(gap)
    return gap not in ("", "_") and not one_number  # an index: H_2


def _is_boundary(value: Spelling, text: Spelling, at: int) -> bool:
    """Whether a word may begin with letter `at`, although another letter stands directly before it."""
    before, after = text.letters[at - 1], text.letters[at]
    if len(value.letters) == 1:
        return False
    for script in (KATAKANA, KOREAN):
        if bool(script.match(before)) != bool(script.match(after)):
            return True
    if UNSPACED.match(before) or UNSPACED.match(after):
        return True
    several = any(value.gaps[1:-1])
    return several and text.capital[at] and not text.capital[at - 1]


def _is_same_gap(value: Spelling, k: int, text: Spelling, at: int) -> bool:
    """Whether the text may have its gap before letter `at` where the value has another before letter k."""
    wanted, given = value.gaps[k], text.gaps[at]
    before, after = value.letters[k - 1], value.letters[k]
    is_long = len(value.letters) >= LONG
    if before.isdecimal() and after.isdecimal():
        digits = sum(map(str.isdecimal, value.letters))
        free = digits >= LONG and NUMBER_GAP.fullmatch(given)
        return bool(free) or wanted.replace("\n", " ") == given.replace("\n", " ")
    if any(UNSPACED.match(letter) or KATAKANA.match(letter) for letter in (before, after)):
        return bool(GAP.fullmatch(given)) if wanted else len(given) < 2
    if not given:
        return is_long or text.capital[at]
    if wanted:
        return bool(GAP.fullmatch(given))
    if HYPHEN.fullmatch(given):
        return True
    begins = before.isdecimal() != after.isdecimal() or (value.capital[k] and not value.capital[k - 1])
    return is_long and begins and bool(GAP.fullmatch(given))


def _has_its_signs(value: Spelling, text: Spelling, at: int, end: int) -> bool:
    """Whether the signs at the ends of a short value, such as @ and #, stand in the text as well."""
    first, last = _signs(value)
    return text.gaps[at].endswith(first) and text.gaps[end].startswith(last)


def _signs(value: Spelling) -> tuple[str, str]:
    return value.gaps[0].lstrip(SOFT), value.gaps[-1].rstrip(SOFT)


def _is_marked(value: Spelling, text: Spelling, at: int, bare: bool) -> bool:
    """Whether a single letter or digit stands alone, in its own case, and a letter as what it is: a value."""
    before, after = text.gaps[at], text.gaps[at + 1]
    if value.capital[0] != text.capital[at]:
        return False
    if (OPEN.search(before) and CLOSE.match(after)) or any(_signs(value)):
        return True
    if before.endswith(("'", "-")) or after.startswith(("'", "-")):  # I'm, A-level, 5-year
        return False
    if value.is_number and not bare:
        first_in_its_line = before.endswith("\n") or (at == 0 and not before)
        return not (first_in_its_line and NUMBERING.match(after))
    return bare or bool(LEAD.search(before) and END.match(after))


def _with_its_ends(value: Spelling, text: Spelling, at: int) -> Place:
    """The place with the signs at the ends of the value, where the text has them too: +46, (c)."""
    end = at + len(value.letters)
    start, stop = text.starts[at], text.ends[end - 1]
    first, last = value.text[: value.starts[0]], value.text[value.ends[-1] :]
    if first and text.text.endswith(first, 0, start):
        start -= len(first)
    if last and text.text.startswith(last, stop):
        stop += len(last)
    return start, stop


@lru_cache(maxsize=65536)
def _last_name_first(name: str) -> list[str]:
    """The name with its last word in front, if that is another order."""
    words = name.split()
    return [" ".join([words[-1], *words[:-1]])] if len(set(words)) > 1 else []


@lru_cache(maxsize=65536)
def name_parts(name: str) -> tuple[str, ...]:
    """The words of a longer name that count on their own: capitalised or without case, no initials or titles.

    >>> name_parts("Dr. Jan de Boer")
    ('Jan', 'Boer')
    """
    words, parts = name.split(), []
    for word in words if len(words) > 1 else []:
        letters = _spelling_of_value(word).letters
        if not word.endswith(".") and len(letters) > 1 and (word[0].isupper() or _has_no_case(word)):
            parts.append(word)
    return tuple(dict.fromkeys(parts))


def _has_no_case(word: str) -> bool:
    return word.isalpha() and word.lower() == word.upper()


def _is_name(written: str, part: str) -> bool:
    """Whether a part of a name is written as one: like the part, in capitals, or with one in front."""
    same = _spelling_of_text(written).capital == _spelling_of_value(part).capital
    return same or written.isupper() or written.istitle()
