"""Where a text holds a personal value: one rule for counts, masks, rewards, pairs and quiz options.

A value counts where it stands as whole words, in any case. A part of a PERSON's name counts too,
but only capitalised: "Will" is a name, "will" is not.

Run it: python -m pytest tests/test_matching.py
"""

import re


def places(text: str, label: str, value: str) -> list[tuple[int, int]]:
    """(start, end) of each place of `value`: first as a whole, then the parts of a PERSON's name.

    >>> places("Dear Ann, ann lee", "PERSON", "Ann Lee")
    [(10, 17), (5, 8)]
    """
    found = [match.span() for match in _whole_words(value, re.IGNORECASE).finditer(text)]
    if label == "PERSON":
        for part in _capitalised_parts(value):
            found += [match.span() for match in _whole_words(part).finditer(text)]
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
    taken: dict[str, list[tuple[int, int]]] = {}  # label -> its places so far
    for label, value in sorted(values, key=rank):
        covered = taken.setdefault(label, [])
        new = [place for place in places(text, label, value) if not _overlaps(place, covered)]
        if new:
            found.add((label, value))
            covered += new
    return [pair for pair in values if pair in found]


def _overlaps(place: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    start, end = place
    return any(start < last and first < end for first, last in others)


def stands_in(text: str, value: str) -> bool:
    """Whether `text` holds the whole `value`, in any case.

    The cheap test comes first, because hardly any of thousands of known values occurs in a given
    text.
    """
    return value.lower() in text.lower() and bool(_whole_words(value, re.IGNORECASE).search(text))


def _whole_words(words: str, flags: int = 0) -> re.Pattern[str]:
    """Matches `words` where no letter, digit or underscore stands directly before or after them."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", flags)


def _capitalised_parts(name: str) -> list[str]:
    """The capitalised words of a name, as they are and in capitals, but not the name itself."""
    parts = set()
    for part in name.split():
        if part[0].isupper():
            parts |= {part, part.upper()}
    return sorted(parts - {name})
