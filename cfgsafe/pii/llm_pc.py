"""The dialogues of the LLM Privacy Challenge: scrubbed texts and the personal items taken from them.

Source: the NeurIPS 2024 LLM Privacy Challenge (github.com/QinbinLi/LLMPC-Blue). Each line of
LLM-PC-development-scrubbed-data.jsonl holds {"idx", "messages"} with placeholders such as
[NAME-1]; line k of LLM-PC-development-pii.jsonl maps the placeholders of dialogue k to their
values. `messages` is a text in Llama-3.1's chat format, a text with "user:" or "assistant:" before
each turn, or a list.
Deviations: the date preamble of the system turn is left out, because the chat template writes its
own. A key with text before its placeholder ('Song Title]" by [NAME-3') counts for that placeholder.

Run it: python train.py pairs --dialogues D.jsonl --items I.jsonl --model cfgsafe/demo/base --out P.jsonl
"""

import re
import sys

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii.spans import Span
from cfgsafe.settings import shown
from cfgsafe.tokenizer import Messages, check_messages

LABELS = {"NAME": "PERSON", "LOC": "GPE"}  # other kinds stay as they are
PLACEHOLDER = re.compile(r"\[([A-Z][A-Z_]*(?:-[A-Z0-9]+)+)\]")
LLAMA_TURN = re.compile(
    r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(.*?)(?=<\|eot_id\|>|<\|start_header_id\|>|\Z)", re.DOTALL
)
PREAMBLE = re.compile(r"\s*Cutting Knowledge Date:[^\n]*\n(?:Today Date:[^\n]*\n?)?")
LINE_TURN = re.compile(r"^([Ss]ystem|[Uu]ser|[Aa]ssistant):", re.MULTILINE)


def lines(dialogues: str, items: str) -> list[tuple[str, object, dict[str, str]]]:
    """(file:line, "messages" as read, placeholder -> value) of each line. Raises InputError."""
    rows, values = list(read_jsonl(dialogues)), list(read_jsonl(items))
    if len(rows) != len(values):
        raise InputError(
            f"{dialogues} has {len(rows)} lines and {items} {len(values)}; "
            "line k of one must belong to line k of the other"
        )
    joined = []
    for (place, row), (items_place, found) in zip(rows, values, strict=True):
        joined.append((place, row.get("messages"), by_placeholder(found, items_place)))
    return joined


def read(dialogues: str, items: str) -> list[tuple[Messages, list[Span], str]]:
    """(messages with the values filled in, their spans, file:line) of each dialogue.

    A placeholder without a value stays; stderr says how many. Raises InputError naming file, line
    and field.
    """
    filled, missing = [], 0
    for place, scrubbed, values in lines(dialogues, items):
        messages, spans, without_value = fill(turns(scrubbed, place), values)
        filled.append((messages, spans, place))
        missing += without_value
    if missing:
        warning = f"{items}: {missing} placeholders of {dialogues} have no value and stay as they are"
        print(f"warning: {warning}", file=sys.stderr)
    return filled


def turns(messages: object, place: str) -> Messages:
    """The turns of a dialogue in any of the three forms. Raises InputError naming `place`.

    >>> turns("user: I am [NAME-1].\\nassistant: Hello!", "x")
    [{'role': 'user', 'content': 'I am [NAME-1].'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    if not isinstance(messages, str):
        return check_messages(messages, place)
    llama_format = "<|start_header_id|>" in messages
    if llama_format:
        found = LLAMA_TURN.findall(messages)
    else:
        before, *parts = LINE_TURN.split(messages)  # parts: role, text, role, text ...
        if before.strip() or not parts:
            raise InputError(
                f"{place}: 'messages' must be a list, "
                "or a text whose turns begin with 'user:' or 'assistant:'"
            )
        found = list(zip(parts[::2], parts[1::2], strict=True))
    split = []
    for role, text in found:
        if llama_format and role == "system":
            text = PREAMBLE.sub("", text, count=1)
        if text.strip():
            split.append({"role": role.lower(), "content": text.strip()})
    return check_messages(split, place)


def by_placeholder(found: dict, place: str) -> dict[str, str]:
    """Placeholder -> value, without empty ones; a placeholder's own key overrides a longer key.

    Raises InputError naming `place` and the field.
    """
    values: dict[str, str] = {}
    for key, value in sorted(found.items(), key=lambda item: "[" not in item[0]):
        if not isinstance(value, str):
            raise InputError(f"{place}: field {shown(key)} must be a string")
        if value.strip():
            values[key.rpartition("[")[2]] = value.strip()
    return values


def fill(messages: Messages, values: dict[str, str]) -> tuple[Messages, list[Span], int]:
    """(messages with values filled in, the values' spans, number of placeholders without value)."""
    filled, spans, missing = [], [], 0
    for number, message in enumerate(messages):
        text, copied, content = "", 0, message["content"]
        for found in PLACEHOLDER.finditer(content):
            value = values.get(found[1])
            if value is None:
                missing += 1
                continue
            text += content[copied : found.start()]
            kind = re.sub(r"-\d+$", "", found[1])
            spans.append((number, len(text), len(text) + len(value), LABELS.get(kind, kind)))
            text += value
            copied = found.end()
        filled.append({"role": message["role"], "content": text + content[copied:]})
    return filled, spans, missing
