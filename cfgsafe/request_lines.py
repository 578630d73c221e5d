"""Request lines: each line of a JSONL file becomes a `Request`, with defaults for what it leaves out.

A line has `prompt` (a chat-formatted string, in which control tokens are control tokens) or
`messages` (with plain text as content; an assistant's message at the end is begun, and is continued).
It may have
    negative_prompt or negative_messages    the negative side, only with guidance; without one,
                                            see `read_request`
    guidance, space, alpha                  how to guide
    temperature, top_k, top_p, seed         how to sample
    max_new_tokens, stop                    when to end; `stop` is a list of texts
    adapter                                 the name of an attached adapter, or null for the bare model

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

import json
from dataclasses import replace
from typing import TypeVar

from cfgsafe.errors import InputError, at
from cfgsafe.request import Request
from cfgsafe.settings import shown
from cfgsafe.subject import Subject, request_for
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages, with_system

T = TypeVar("T")

NUMBERS: dict[str, type[int] | type[float]] = {
    "alpha": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "max_new_tokens": int,
}
SIDES = {"prompt", "messages", "negative_prompt", "negative_messages"}
FIELDS = SIDES | {"adapter", "guidance", "space", "stop"} | set(NUMBERS)


def read_request(
    row: dict, place: str, tokenizer: Tokenizer, subject: Subject, defaults: Request, system: str | None
) -> Request:
    """The request of a line. Raises InputError naming the place and the field.

    What the line leaves out is taken from `subject` (guidance and space) and from `defaults` (the rest).
    Messages without a system prompt get `system`. Guided messages without a negative side then get the
    subject's two sentences, as in every evaluation.
    """
    unknown = sorted(set(row) - FIELDS)
    if unknown:
        raise InputError(f"{place}: unknown field {shown(unknown[0])}; there are {', '.join(sorted(FIELDS))}")
    guidance = _typed(row, "guidance", float, place, subject.guidance)
    space = _typed(row, "space", str, place, subject.space)
    prompt = _side(row, "", place, system)
    negative = _side(row, "negative_", place, system)
    if prompt is None:
        raise InputError(f"{place}: needs 'prompt' or 'messages'")
    adapter = row.get("adapter", defaults.adapter)
    if adapter is not None and not isinstance(adapter, str):
        raise InputError(f"{place}: field 'adapter' must be a name or null")
    sampling: dict = {"adapter": adapter, "stop": defaults.stop}
    for name, kind in NUMBERS.items():
        sampling[name] = _typed(row, name, kind, place, getattr(defaults, name))
    if "stop" in row:
        sampling["stop"] = stop_tokens(_texts(row["stop"], place), tokenizer)

    if negative is not None and guidance in (None, 1.0):
        field = "negative_prompt" if "negative_prompt" in row else "negative_messages"
        why = "without guidance" if guidance is None else "at guidance 1"
        raise InputError(f"{place}: field {field!r} has no effect {why}; leave it out, or set 'guidance'")
    if isinstance(prompt, list) and negative is None:
        subject = replace(subject, guidance=guidance, space=space)
        with at(place):
            return request_for(subject, tokenizer, prompt, **sampling)
    with at(place):
        sides = _encode(prompt, tokenizer), None if negative is None else _encode(negative, tokenizer)
    return Request(*sides, 1.0 if guidance is None else guidance, space, **sampling)


def stop_tokens(texts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that end an answer."""
    return tuple(tuple(tokenizer.encode(text)) for text in texts)


def _encode(side: Messages | str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_prompt(side) if isinstance(side, str) else tokenizer.encode_chat(side)


def _texts(texts: object, place: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{place}: field 'stop' must be a list of non-empty strings")
    return tuple(texts)


def _side(row: dict, prefix: str, place: str, system: str | None) -> Messages | str | None:
    """The messages or the chat-formatted string of one side; None when the line has neither.

    Messages without a system prompt get `system`.
    """
    messages, prompt = f"{prefix}messages", f"{prefix}prompt"
    if messages in row and prompt in row:
        raise InputError(f"{place}: has both {messages!r} and {prompt!r}; give one")
    if messages in row:
        chat = check_messages(row[messages], place)
        return chat if system is None or chat[0]["role"] == "system" else with_system(chat, system, "replace")
    return _typed(row, prompt, str, place, None)


def _typed(row: dict, name: str, kind: type, place: str, default: T) -> T:
    """The field as a `kind`, or the default when the line lacks it; an integer may stand for a float."""
    if name not in row:
        return default
    value = row[name]
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise InputError(f"{place}: field {name!r} must be a {kind.__name__}, not {json.dumps(value)[:80]}")
    try:
        return kind(value)
    except OverflowError:
        raise InputError(f"{place}: field {name!r} is larger than any float") from None
