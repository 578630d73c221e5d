"""Each spelling of a value is counted by `leak` and masked by the report; ordinary sentences hold none.

The values and spellings are those of tests/spellings.py, which knows nothing of the matcher. The sentences
are those of the demo's files. `PYTHONPATH=. python tests/test_spellings.py` prints the figures by kind.
"""

import re
import unicodedata
from collections import Counter
from functools import cache
from html import unescape
from pathlib import Path

import pytest
from spellings import LABELS, Spelling, spellings, values

from cfgsafe.files import read_jsonl
from cfgsafe.hub import PROMPTS
from cfgsafe.measure import leak
from cfgsafe.pii.known import Known
from cfgsafe.pii.matching import places
from cfgsafe.report import html
from cfgsafe.subject import Answer

DATA = Path(PROMPTS).parent
ASKED = [{"role": "user", "content": "Who?"}]
SPELLINGS, VALUES, SENTENCES = 1000, 200, 5000


def findings(texts: list[str], items: list[dict[str, str]], known: Known | None = None) -> list[leak.Finding]:
    """What `leak` counts in these answers, without a detector."""
    prompts = []
    for number, wanted in enumerate(items):
        prompts.append(leak.Prompt.from_row({"messages": ASKED, "items": wanted}, f"p.jsonl:{number}"))
    return leak.inspect(prompts, [Answer(text) for text in texts], lambda all: [[] for _ in all], known)


def masked(finding: leak.Finding) -> str:
    """The answer as it stands in the report; nothing but what was counted is known."""
    row = {"answer": finding.answer, "entities": [], "echoed": finding.echoed, "recalled": finding.recalled}
    example = html.Example("", finding.prompt.messages, finding.prompt.items, {"m": row})
    private = html.counted_values([example])
    found = html.spans(row, example.items, private)
    return html.marked(row["answer"], found, hide=True)


def is_legible(spelling: Spelling, page: str) -> bool:
    """Whether five letters or digits of the value in a row, or all if it has fewer, are left of it."""
    before, after = map(plain, spelling.text.split(spelling.written, 1))
    shown, value = plain(unescape(re.sub(r"</?mark.*?>", "", page))), plain(spelling.value)
    assert shown.startswith(before) and shown.endswith(after)
    left = shown[len(before) : len(shown) - len(after)]
    length = min(5, len(value))
    return any(value[at : at + length] in left for at in range(len(value) - length + 1))


def plain(text: str) -> str:
    """Letters and digits in lower case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).lower()))


@cache
def missed() -> list[tuple[Spelling, str]]:
    """The spellings that are not counted, or not masked, with the reason."""
    all_spellings = spellings(SPELLINGS, VALUES)
    items = [{spelling.label: spelling.value} for spelling in all_spellings]
    failures = []
    found = findings([spelling.text for spelling in all_spellings], items)
    for spelling, finding in zip(all_spellings, found, strict=True):
        if finding.recalled != [spelling.value]:
            failures.append((spelling, "not counted"))
        elif is_legible(spelling, masked(finding)):
            failures.append((spelling, "not masked"))
    return failures


def sentences() -> list[str]:
    """Different sentences of the demo's conversations, answers and texts, which are about other people."""
    found: dict[str, None] = {}
    for name in ("prompts", "chats", "gold", "probes", "planted"):
        for _, row in read_jsonl(DATA / f"{name}.jsonl"):
            texts = [message["content"] for message in row.get("messages", [])]
            texts += [row[key] for key in ("text", "gold", "answer") if isinstance(row.get(key), str)]
            for text in texts:
                found |= dict.fromkeys(re.split(r"(?<=[.!?])\s+", text))
    return list(found)


def is_plainly_in(value: str, sentence: str) -> bool:
    """Whether a word of the value stands in the sentence, in any case; digits anywhere in it."""
    words = re.findall(r"\w+", value.lower())
    return any(word in re.findall(r"\w+", sentence.lower()) for word in words)


def false_alarms(count: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of the first `count` sentences those in which values are counted, no word of which stands there."""
    pairs = [(LABELS.get(kind, "PERSON"), value) for kind, value in values(VALUES)]
    alarms = []
    for sentence in sentences()[:count]:
        found = [pair for pair in pairs if places(sentence, *pair) and not is_plainly_in(pair[1], sentence)]
        if found:
            alarms.append((sentence, found))
    return alarms


def test_nearly_every_spelling_is_counted_and_masked():
    failures = missed()
    assert len({spelling.value for spelling in spellings(SPELLINGS, VALUES)}) == VALUES
    assert len(failures) <= SPELLINGS / 100, failures[:20]


@pytest.mark.parametrize("count", [1000, pytest.param(SENTENCES, marks=pytest.mark.slow)])
def test_hardly_any_sentence_holds_a_value_that_it_does_not_hold(count):
    assert len(sentences()) >= count and len(false_alarms(count)) <= count * 0.005


def test_known_values_are_counted_in_the_same_spellings():
    """All but names without a label's parts, and names that turn round: known values count whole."""
    some = [s for s in spellings(SPELLINGS, VALUES) if s.writer != "last name first"]
    known = Known({spelling.value: spelling.label for spelling in some})
    found = findings([spelling.text for spelling in some], [{}] * len(some), known)
    lost = [s for s, finding in zip(some, found, strict=True) if s.value not in finding.recalled]
    assert len(lost) <= SPELLINGS / 100, lost[:20]


def print_figures() -> None:
    """A line for each kind of value: spellings, not counted, not masked; and the false alarms."""
    total = Counter(spelling.kind for spelling in spellings(SPELLINGS, VALUES))
    for kind, count in total.items():
        failures = Counter(reason for spelling, reason in missed() if spelling.kind == kind)
        print(
            f"{kind:30}{count:5}  not counted {failures['not counted']}, not masked {failures['not masked']}"
        )
    print(f"{len(false_alarms(SENTENCES))} false alarms in {SENTENCES} sentences of the demo")


if __name__ == "__main__":
    print_figures()
