"""Where the personal values of a dialogue stand: the "spans" of our JSONL.

One object a line: {"messages": [...], "spans": [[message, start, end, label], ...]}. `message`
counts from 0; the value is the characters from start to end (exclusive) of that message's content.

Run it: python train.py dialogues --out dialogues.jsonl      (writes such a file)
"""

from cfgsafe.errors import InputError
from cfgsafe.settings import shown
from cfgsafe.tokenizer import Messages

Span = tuple[int, int, int, str]  # message, start, end, label


def check_spans(spans: object, messages: Messages, place: str) -> list[Span]:
    """`spans` as tuples, if each lies inside its message. Raises InputError naming `place`."""
    found = []
    rows: list = spans if isinstance(spans, list) else [None]
    for span in rows:
        if not _has_form(span):
            raise InputError(f"{place}: 'spans' must be a list of [message, start, end, label]")
        number, start, end, label = span
        if not (0 <= number < len(messages) and 0 <= start < end <= len(messages[number]["content"])):
            raise InputError(f"{place}: span {shown(span)} lies outside the messages")
        found.append((number, start, end, label))
    return found


def _has_form(span: object) -> bool:
    if not isinstance(span, list) or len(span) != 4:
        return False
    return all(type(x) is int for x in span[:3]) and isinstance(span[3], str)
