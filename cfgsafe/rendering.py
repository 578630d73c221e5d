"""Chat templates, rendered in a process of their own that bounds their time and memory.

A template comes with a checkpoint from elsewhere. Jinja2's sandbox keeps it from files and objects,
but not from `{% for i in range(99999) %}` inside another one, or from `"x" * 10**10`. No check inside
a process ends such a call, since Python gives no other code a turn before it returns. Here a second
Python process renders, and the operating system ends it.
Bounded: SECONDS of CPU time of a rendering, compiling included; MEMORY of the process; CHARACTERS of the
text and of messages about errors. Not bounded: memory on macOS, which does not know the limit; what an
escape from the sandbox could do, with the rights of the user.
Source: the filters, globals and extensions are those of transformers' `apply_chat_template`.
This file imports nothing of cfgsafe, since the second process runs it as a script and must start fast.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "Hello!"
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

SECONDS = 5  # CPU time; a template of a usual size needs less than 0.01
MEMORY = 2**30  # bytes of address space
CHARACTERS = 2**24
SHOWN = 300  # characters of an error
FILE = "<template>"  # what Jinja2 calls a template from a string


class TemplateError(Exception):
    """A template was not rendered; `str(error)` is one line that says why."""


class Renderer:
    """The process that renders. It starts with the first template; threads take turns."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it: a fork must not share its pipes

    def render(self, template: str, context: dict | None) -> str:
        """The text of a template with the variables of `context`, made of JSON's types.

        With None it is only compiled. Raises TemplateError.
        """
        with self._lock:
            reply = self._ask(json.dumps([template, context]).encode() + b"\n")
        if "error" in reply:
            raise TemplateError(f"the chat template {reply['error']}")
        return reply["text"]

    def _ask(self, line: bytes) -> dict:
        if self._process is None or self._owner != os.getpid():
            command = [sys.executable, "-P", __file__, str(self.seconds)]  # -P: no file here hides a package
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing)
            self._owner = os.getpid()
        process = self._process
        assert process.stdin and process.stdout
        reply = b""
        try:
            with suppress(BrokenPipeError):  # it ended before it read
                process.stdin.write(line)
                process.stdin.flush()
            reply = process.stdout.readline()
        finally:  # also when Ctrl-C leaves a reply unread
            if not reply.endswith(b"\n"):
                self._process = None
                process.kill()
                process.communicate()
        if not reply:
            return {"error": self._end(process.returncode)}
        return json.loads(reply)

    def _end(self, code: int) -> str:
        """Why the process ended, from its exit code."""
        if code == -signal.SIGPROF:
            return f"takes more than {self.seconds:g} s; mend it"
        return f"has ended its process (exit code {code}); mend it, or check that jinja2 is installed"


RENDERER = Renderer()


def main(seconds: float) -> None:
    """The second process: renders each line of standard input, and writes a line for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, whatever that is at
        reply = _reply(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


def _reply(line: bytes) -> bytes:
    try:
        template, context = json.loads(line)
        render = _compile(template)
        text = "" if context is None else render(context)
        if len(text) > CHARACTERS:
            return _error(f"writes more than {CHARACTERS} characters; mend it")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return _error(f"needs more than {MEMORY // 2**20} MiB of memory; mend it")
    except _Refusal as refusal:
        return _error(f"refuses this conversation: {_line_of(refusal)}")
    except Exception as error:  # a template may fail in any way
        why = f"{type(error).__name__}: {_line_of(error)}"
        return _error(f"fails{_place(error)} ({why}); mend it or the conversation")


def _error(text: str) -> bytes:
    return json.dumps({"error": text}).encode()


def _line_of(error: Exception) -> str:
    """The message of an error as one line of printable characters, at most SHOWN."""
    try:
        text = str(error)[: 2 * SHOWN]
    except Exception:  # it may show what the template made
        return "no message"
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _place(error: Exception) -> str:
    """The line of the template at which it failed."""
    number, step = getattr(error, "lineno", None), error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == FILE:
            number = step.tb_lineno
        step = step.tb_next
    return f" in line {number}" if number else ""


@lru_cache(maxsize=8)
def _compile(template: str) -> Callable[[dict], str]:
    """The function that renders a template, with the filters and globals of transformers."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks answers for training; it renders its content."""

        tags = {"generation"}

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template).render


class _Refusal(Exception):
    """The template itself refuses a conversation."""


def _tojson(x: object, indent: int | None = None, **options) -> str:
    return json.dumps(x, indent=indent, **{"ensure_ascii": False, **options})


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


if __name__ == "__main__":
    main(float(sys.argv[1]))
