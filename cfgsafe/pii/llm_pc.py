"""The dialogues of the LLM Privacy Challenge: scrubbed texts, and the personal items that were scrubbed from them.

Source: the NeurIPS 2024 LLM Privacy Challenge (github.com/QinbinLi/LLMPC-Blue): LLM-PC-development-scrubbed-data.jsonl holds
{"idx", "messages"} with placeholders such as [NAME-1]; line k of LLM-PC-development-pii.jsonl is the object placeholder -> value of
dialogue k. `messages` is a text in Llama-3.1's chat format, a text with a "user:" or "assistant:" before each turn, or a list.
Deviations: the date preamble of the system turn is left out, for the chat template writes its own. Keys that swallowed text
('Song Title]" by [NAME-3') count for the placeholder they end in.

Run it: python train.py pairs --dialogues scrubbed.jsonl --items pii.jsonl --model cfgsafe/demo/base --out pairs.jsonl
"""

import re
import sys

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii.spans import Span
from cfgsafe.tokenizer import Messages, check_messages

LABELS = {"NAME": "PERSON", "LOC": "GPE"}  # other kinds stay as they are
PLACEHOLDER = re.compile(r"\[([A-Z][A-Z_]*(?:-[A-Z0-9]+)+)\]")
LLAMA_TURN = re.compile(
    r"<\|start_header_id\|>(\w+)<\|end_header_id\|>(.*?)(?=<\|eot_id\|>|<\|start_header_id\|>|\Z)", re.DOTALL
)
PREAMBLE = re.compile(r"\s*Cutting Knowledge Date:[^\n]*\n(?:Today Date:[^\n]*\n?)?")
LINE_TURN = re.compile(r"^([Ss]ystem|[Uu]ser|[Aa]ssistant):", re.MULTILINE)


def lines(dialogues: str, items: str) -> list[tuple[str, object, dict[str, str]]]:
    """(file:line, "messages" as they stand, placeholder -> value) of each dialogue. Raises InputError naming file, line and field."""
    rows, values = list(read_jsonl(dialogues)), list(read_jsonl(items))
    if len(rows) != len(values):
        raise InputError(
            f"{dialogues} has {len(rows)} lines and {items} {len(values)}; line k of one must belong to line k of the other"
        )
    return [
        (place, row.get("messages"), by_placeholder(found, where))
        for (place, row), (where, found) in zip(rows, values, strict=True)
    ]


def read(dialogues: str, items: str) -> list[tuple[Messages, list[Span], str]]:
    """(messages with the values filled in, their spans, file:line) of each dialogue.

    A placeholder without a value stays; stderr says how many. Raises InputError naming file, line and field.
    """
    filled, missing = [], 0
    for place, scrubbed, values in lines(dialogues, items):
        messages, spans, without = fill(turns(scrubbed, place), values)
        filled.append((messages, spans, place))
        missing += without
    if missing:
        print(
            f"warning: {items}: {missing} placeholders of {dialogues} have no value and stay as they are",
            file=sys.stderr,
        )
    return filled


def turns(messages: object, place: str) -> Messages:
    """The turns of a dialogue in any of the three forms. Raises InputError naming `place`.

    >>> turns("user: I am [NAME-1].\\nassistant: Hello!", "x")
    [{'role': 'user', 'content': 'I am [NAME-1].'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    if not isinstance(messages, str):
        return check_messages(messages, place)
    if "<|start_header_id|>" in messages:
        found = [
            (role, PREAMBLE.sub("", text, count=1) if role == "system" else text)
            for role, text in LLAMA_TURN.findall(messages)
        ]
    else:
        before, *parts = LINE_TURN.split(
            messages
        )  # text before the first turn, then role, text, role, text ...
        if before.strip() or not parts:
            raise InputError(
                f"{place}: 'messages' must be a list, or a text whose turns begin with 'user:' or 'assistant:'"
            )
        found = list(zip(parts[::2], parts[1::2], strict=True))
    return check_messages(
        [{"role": role.lower(), "content": text.strip()} for role, text in found if text.strip()], place
    )


def by_placeholder(found: dict, place: str) -> dict[str, str]:
    """Placeholder -> value, without empty values; a placeholder's own key goes before one that swallowed text."""
    values: dict[str, str] = {}
    for key, value in sorted(found.items(), key=lambda item: "[" not in item[0]):
        if not isinstance(value, str):
            raise InputError(f"{place}: field {key!r} must be a string")
        if value.strip():
            values[key.rpartition("[")[2]] = value.strip()
    return values


def fill(messages: Messages, values: dict[str, str]) -> tuple[Messages, list[Span], int]:
    """Messages with values for placeholders, the values' spans, and how many placeholders have none."""
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
