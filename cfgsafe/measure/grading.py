"""Which option an answer gives: the exact score of short and of worked answers.

Source: the rules for short answers are ours, made after real ones ("The answer is (C).", "3", "The
correct answer is: 4. Paris"); worked answers are read by TIGER-Lab's chain, see mmlu_pro.letter.
A short answer gives
1. the option that stands directly after "answer is", by its words, its letter or its line number;
2. otherwise the only option whose words it holds;
3. otherwise the option that it begins with or that stands after "option", again by words, letter or
   number. Where it holds the words of several options, it must be one of those.
Words win: where an option is itself a number or a letter, "3" is that option, not the third line;
"3. ice" is the third line if its words are "ice".
Of two options that overlap ("York", "New York") the longer one is meant, of two that differ in
their capitals the one written so. Case and the last full stop do not matter otherwise. Whoever
names two options gets no credit. A denial ("not fire") is not understood.

Run it: python -m pytest tests/test_grading.py
"""

import re

from cfgsafe.measure.mmlu_pro import LETTERS, letter, one_line
from cfgsafe.pii.matching import exact_places

ANSWER_IS = re.compile(r"\banswer(?: is|:)", re.IGNORECASE)
BEGINNING = re.compile(r"\A|\b(?:option|choice)\b", re.IGNORECASE)
OPENING = re.compile(r"[\s:*\"'(]*(?:option |choice )?[*\"'(]*", re.IGNORECASE)  # before what is given
LABEL = re.compile(r"([A-J]|\d+)(?=\s*\Z|\n|[.:;,)*](?!\d))")  # stands alone: no word goes on after it
AFTER_LABEL = re.compile(r"[.:)*]+\s*")  # "3. ice", "(C) ice"
ANOTHER = re.compile(r"[)*]*,?(?: or| and)? ", re.IGNORECASE)  # "(B) or (C)" decides nothing

Place = tuple[int, int, int]  # start, end, index of the option


def exact(text: str, row: dict) -> bool | None:
    """Whether a short answer is right; None if it names no option."""
    found = chosen(text, row["options"])
    right = _words(row["options"][row["answer_index"]])
    return all(_words(row["options"][index]) == right for index in found) if found else None


def exact_words(text: str, row: dict) -> bool | None:
    """Whether an answer names the right option alone, by its words; None if it names none.

    For questions whose options were not shown, so that no letter or number means one.
    """
    found = {_words(row["options"][index]) for _, _, index in worded(text, row["options"])}
    return found == {_words(row["options"][row["answer_index"]])} if found else None


def exact_letter(text: str, row: dict) -> bool | None:
    """Whether a worked answer ends in the right letter; None if it gives none."""
    given = letter(text)
    return None if given is None else given == LETTERS[row["answer_index"]]


def chosen(text: str, options: list[str]) -> list[int]:
    """Indices of the options that a short answer gives: one, none, or several that contend.

    >>> chosen("The answer is (B).", ["ice", "fire"]), chosen("2", ["ice", "fire"])
    ([1], [1])
    >>> chosen("3", ["5", "3", "4"]), chosen("ice or fire", ["ice", "fire"])
    ([1], [0, 1])
    """
    text = re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", text)
    named = worded(text.replace("\n", " "), options)
    decided = _given(text, ANSWER_IS, named, len(options))
    if decided is not None:
        return [decided]
    found = sorted({index for _, _, index in named})
    begun = None if len(found) == 1 else _given(text, BEGINNING, named, len(options))
    return found if begun is None or (found and begun not in found) else [begun]


def worded(text: str, options: list[str]) -> list[Place]:
    """Where the options' words stand, without places inside a longer option's place."""
    found = []
    for index, option in enumerate(options):
        words = _words(option)
        for start, end in exact_places(text, words):
            same_case = len(words) > 1 or text[start:end] == words
            if same_case and not _inside_number(text, start, end):
                found.append((start, end, index))
    return [place for place in found if not any(_beats(text, options, other, place) for other in found)]


def _beats(text: str, options: list[str], other: Place, place: Place) -> bool:
    """Whether `other` covers more than `place`, or the same words with the right capitals."""
    if other[:2] == place[:2]:
        written = text[place[0] : place[1]]
        return _words(options[other[2]]) == written != _words(options[place[2]])
    return other[0] <= place[0] and place[1] <= other[1]


def _inside_number(text: str, start: int, end: int) -> bool:
    """Whether the place is a part of a longer number: the 3 of 3.5, 1/3, -3 or 3 %."""
    before = text[start].isdigit() and re.search(r"(?:\d[.,]|[-−/^])\Z", text[:start])
    after = text[end - 1].isdigit() and re.match(r"[.,]\d| ?%|[/^]", text[end:])
    return bool(before or after)


def _given(text: str, lead: re.Pattern[str], named: list[Place], count: int) -> int | None:
    """The option that stands directly after the first `lead` that has one, unless another is joined to it."""
    for found in lead.finditer(text):
        first = _at(text, found.end(), named, count)
        if first:
            index, end = first
            joint = ANOTHER.match(text, end)
            second = joint and _at(text, joint.end(), named, count)
            return None if second else index
    return None


def _at(text: str, start: int, named: list[Place], count: int) -> tuple[int, int] | None:
    """(index, end) of the option that stands at `start`: its whole line, its words, its letter or number."""
    opening = OPENING.match(text, start)
    begin = opening.end() if opening else start
    label = LABEL.match(text, begin)
    line = _line(label[1], count) if label else None
    here = [place for place in named if start <= place[0] <= begin < place[1]]  # a bracket may be theirs
    if label and line is not None:
        after = AFTER_LABEL.match(text, label.end())
        follows = [place for place in named if after and place[0] == after.end() and place[2] == line]
        if follows or not here:
            return line, follows[0][1] if follows else label.end()
    return (here[0][2], here[0][1]) if len(here) == 1 else None


def _line(label: str, count: int) -> int | None:
    """The index that a letter or a line number stands for; None beyond the options."""
    index = LETTERS.index(label) if label in LETTERS else int(label) - 1
    return index if 0 <= index < count else None


def _words(option: str) -> str:
    """The option as it may stand in a sentence: single spaces, no full stop at its end."""
    words = one_line(option)
    return words.rstrip(".") or words
