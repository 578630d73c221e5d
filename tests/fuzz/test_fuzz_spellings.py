"""Random values in random texts: places lie in the text and hold the value, and masks leave none.

Values are drawn from letters of many scripts, digits, signs and what cannot be seen, and from the spellings
of tests/spellings.py; texts hold them, parts of them, and other letters, side by side and apart.
"""

import random

import pytest
from spellings import WRITERS, value_of

from cfgsafe.pii.entities import Entity
from cfgsafe.pii.matching import mentioned, mentions, places, stands_in
from cfgsafe.pii.spelling import read
from cfgsafe.report import html

pytestmark = pytest.mark.slow

LETTERS = "aAbBmMsSiIüÜßẞéıİŉǅﬁﬀªſKÅςσΣжЖ王明田マケアﾏｶﾞไทยก็สัมمعרא김박कि각"
MARKS = "\u0301\u0307\u0308\u0327\u0345\u3099\u200b\u200d\u00ad\ufe0f\u0640\u202e"
OTHERS = "0123456789٤०５²½ⅧⅣ  \t\n\r\u00a0\u3000-‐–_.,'’@#+/:;!?()[]<>&*~`|=\0█…\"😀"
LABELS = ("PERSON", "GPE", "PHONE")


def drawn(case: random.Random, longest: int) -> str:
    kinds = case.choices((LETTERS, LETTERS, OTHERS, MARKS, "abAB 1"), weights=(4, 2, 2, 1, 4), k=longest)
    return "".join(case.choice(kind) for kind in kinds[: case.randint(1, longest)])


def value_and_text(case: random.Random) -> tuple[str, str]:
    """A value, and a text that holds it as it is, written otherwise, in part, or not at all."""
    if case.random() < 0.5:
        value = drawn(case, 8)
        written = case.choice(
            [value, value.lower(), value.upper(), value.swapcase(), value.replace(" ", "_")]
        )
    else:
        kind = case.choice(list(WRITERS))
        value = value_of(kind, case)
        written = case.choice(WRITERS[kind])(value, case)
    parts = [written, value, value[: case.randint(0, len(value))], drawn(case, 6), drawn(case, 6), "", " "]
    return value, "".join(case.choices(parts, k=case.randint(0, 7)))


def test_places(cases):
    """Also: the functions agree, and a value between blanks is found there."""
    for case in cases:
        value, text = value_and_text(case)
        label = case.choice(LABELS)
        found = places(text, label, value, bare=True)
        assert set(places(text, label, value)) <= set(found)
        wanted = read(value)
        turned = sorted(wanted.letters)
        for start, end in found:
            assert 0 <= start < end <= len(text), (value, text, start, end)
            letters = read(text[start:end]).letters
            part = label == "PERSON" and letters in wanted.letters
            assert letters == wanted.letters or sorted(letters) == turned or part, (value, text, start, end)
        assert mentions(text, label, value) == bool(places(text, label, value))
        assert stands_in(text, value) == bool(places(text, "GPE", value))
        assert bool(mentioned(text, [(label, value)])) == mentions(text, label, value)
        if len(wanted.letters) > 1:
            assert stands_in(f"x {value} y" if value.strip() else value, value), value


def test_masks(cases):
    """No value is left where all of them are masked, and masking again changes nothing."""
    for case in cases:
        pairs = [value_and_text(case) for _ in range(case.randint(1, 3))]
        values = [(case.choice(LABELS), value) for value, _ in pairs]
        text = "".join(text for _, text in pairs)
        private = html.with_parts(values)
        hidden = html.mask(text, private)
        for label, value in private:
            long = len(read(value).letters) > 1 and "█" not in value
            assert not (long and places(hidden, label, value)), (value, text, hidden)
        assert html.mask(hidden, [pair for pair in private if len(read(pair[1]).letters) > 1]) == hidden


def test_findings(cases):
    """What `leak` counted is masked in the page, whatever the detector cut out of it."""
    from test_spellings import findings, plain

    for case in cases:
        value, text = value_and_text(case)
        wanted = read(value).letters
        if not text or len(wanted) < 2 or not value.strip() or "█" in value:
            continue
        (finding,) = findings([text], [{case.choice(LABELS): value}])
        start = case.randrange(len(text))
        entity = Entity(start, case.randint(start + 1, len(text)), "X", "")
        found = [{"start": entity.start, "end": entity.end, "label": "X"}] if case.random() < 0.5 else []
        row = {"answer": text, "entities": found, "echoed": finding.echoed, "recalled": finding.recalled}
        example = html.Example(text, [{"role": "user", "content": text}], finding.prompt.items, {text: row})
        private = html.counted_values([example])
        spans = html.spans(row, example.items, private)
        assert all(0 <= a < b <= len(text) for a, b, _ in spans)
        covered = [(start, end) for start, end, _ in spans]
        for value_label, counted in private:
            for start, end in places(text, value_label, counted):
                assert any(a <= start and end <= b for a, b in covered), (counted, text)
        assert bool(finding.recalled) <= ("mark" in html.marked(text, spans, hide=True))
        assert plain(html.marked("", [], True)) == ""
