"""A conversation on the terminal: answers are streamed, and commands change the guidance.

    /guidance 3     guide with g = 3 from now on; /guidance off ends guidance
    /space log      guide in log space; or prob
    /reset          forget the conversation
    /quit           end the conversation, as the end of the input does

Run it: python infer.py --model M --chat
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

from cfgsafe.decode import Completion, generate
from cfgsafe.errors import CfgsafeError, InputError
from cfgsafe.fields import check_ranges
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
    system: str | None = None,
    **sampling,
) -> Messages:
    """Answer each line, a command or a message of the user; returns the conversation.

    `say` gets the text as it comes; `system` is the conversation's system prompt; `sampling` are other
    fields of `Request`.
    """
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    for line in lines:
        line = line.rstrip("\n")
        if line.startswith("/"):
            command, _, value = line[1:].partition(" ")
            if command == "quit":
                break
            if command == "reset":
                messages = list(opening)
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
    """Stream the answer to `messages` to `say`. Raises CfgsafeError, also for an answer that fails."""
    tokens: list[int] = []
    said = ""

    def on_token(_: int, token: int) -> None:
        nonlocal said
        tokens.append(token)
        text = tokenizer.decode(tokens).lstrip()
        if not text.endswith("\ufffd"):  # half of a character that the next token completes
            say(printable(text[len(said) :]))
            said = text

    request = request_for(subject, tokenizer, messages, **sampling)
    completion = generate(model, [request], on_token=on_token)[0]
    say("\n")
    if completion.failure:
        raise CfgsafeError(f"the answer failed: {completion.failure}")
    return completion


def change(subject: Subject, command: str, value: str) -> tuple[Subject, str]:
    """The subject after a command, and the reply to it."""
    if command == "guidance":
        if value == "off":
            return replace(subject, guidance=None), "no guidance"
        try:
            changed = replace(subject, guidance=float(value))
            check_ranges(changed)
            return changed, f"guidance {changed.guidance:g} in {subject.space} space"
        except (ValueError, InputError):
            return subject, HELP
    if command == "space" and value in SPACES:
        return replace(subject, space=value), f"{value} space"
    return subject, HELP


def printable(text: str) -> str:
    """The text without control characters, which could control the terminal."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def terminal_lines() -> Iterable[str]:
    """The lines of standard input, with a prompt when it is a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def terminal_say(text: str) -> None:
    print(text, end="", flush=True)
