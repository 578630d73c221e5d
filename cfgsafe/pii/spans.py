"""Where the personal values of a dialogue stand: the "spans" of our JSONL.

{"messages": [...], "spans": [[message, start, end, label], ...]} a line; characters start..end of that message's content.

Run it: python train.py dialogues --out dialogues.jsonl      (writes such a file)
"""

from cfgsafe.errors import InputError
from cfgsafe.tokenizer import Messages

Span = tuple[int, int, int, str]  # message, start, end, label


def check_spans(spans: object, messages: Messages, place: str) -> list[Span]:
    """`spans` if each of them lies inside its message; raises InputError naming `place`."""
    found = []
    for span in spans if isinstance(spans, list) else [None]:
        if (
            not isinstance(span, list)
            or len(span) != 4
            or not all(type(x) is int for x in span[:3])
            or not isinstance(span[3], str)
        ):
            raise InputError(f"{place}: 'spans' must be a list of [message, start, end, label]")
        number, start, end, label = span
        if not (0 <= number < len(messages) and 0 <= start < end <= len(messages[number]["content"])):
            raise InputError(f"{place}: span {span} lies outside the messages")
        found.append((number, start, end, label))
    return found
