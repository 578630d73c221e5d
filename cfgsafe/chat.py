"""A conversation on the terminal, streamed, whose guidance can be changed on the way.

    /guidance 3     steer with g = 3 from here on; /guidance off: no guidance
    /space log      guide in log space, or prob
    /reset          forget the conversation
    /quit           leave, as the end of the input does

Run it: python infer.py --model M --chat
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

from cfgsafe.decode import Completion, generate
from cfgsafe.errors import CfgsafeError
from cfgsafe.guidance import SPACES
from cfgsafe.llama import Llama
from cfgsafe.subject import Subject, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

HELP = "/guidance NUMBER or off, /space prob or log, /reset, /quit"


def chat(
    model: Llama,
    tokenizer: Tokenizer,
    subject: Subject,
    lines: Iterable[str],
    say: Callable[[str], None],
    **sampling,
) -> Messages:
    """Answer each of `lines`, a command or the user's words; `say` gets the text as it comes. Returns the conversation."""
    messages: Messages = []
    for line in lines:
        line = line.rstrip("\n")
        if line.startswith("/"):
            command, _, value = line[1:].partition(" ")
            if command == "quit":
                break
            if command == "reset":
                messages = []
                say("(forgotten)\n")
            else:
                subject, reply = change(subject, command, value.strip())
                say(f"({reply})\n")
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                completion = answer(model, tokenizer, subject, messages, say, **sampling)
                messages.append({"role": "assistant", "content": tokenizer.decode(completion.tokens).strip()})
            except CfgsafeError as error:
                messages.pop()
                say(f"({error}; /reset begins anew)\n")
    return messages


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    subject: Subject,
    messages: Messages,
    say: Callable[[str], None],
    **sampling,
) -> Completion:
    """Stream the answer to `messages`."""
    tokens: list[int] = []
    said = ""

    def show(_: int, token: int) -> None:
        nonlocal said
        tokens.append(token)
        text = tokenizer.decode(tokens).lstrip()
        if not text.endswith("\ufffd"):  # half of a character that the next token completes
            say(printable(text[len(said) :]))
            said = text

    completion = generate(model, [request_for(subject, tokenizer, messages, **sampling)], on_token=show)[0]
    say("\n")
    return completion


def change(subject: Subject, command: str, value: str) -> tuple[Subject, str]:
    """The subject after a command, and what to say of it."""
    if command == "guidance":
        if value == "off":
            return replace(subject, guidance=None), "no guidance"
        try:
            g = float(value)
        except ValueError:
            g = math.nan
        if math.isfinite(g):
            return replace(subject, guidance=g), f"guidance {g:g} in {subject.space} space"
    if command == "space" and value in SPACES:
        return replace(subject, space=value), f"{value} space"
    return subject, HELP


def printable(text: str) -> str:
    """Without control characters, which could steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def terminal_lines() -> Iterable[str]:
    """The user's lines, with a prompt where somebody types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


def terminal_say(text: str) -> None:
    print(text, end="", flush=True)
