"""From the command line to one stage: subcommands, checks of the options, and one line for what goes wrong.

Before a command runs, its options are checked: ranges (cfgsafe/fields.py), options without effect, and what
it writes against what it reads (cfgsafe/outputs.py). An option that is given but has no effect is refused,
because whoever gave it believes that it has one. The rules stand beside the options, in the method `unused`
of their dataclass, whose values code may set freely.

One line, and exit code 2, are for mistakes of the user (`CfgsafeError`) and errors of the system: files and
devices (OSError), and memory. A mistake in the command line itself is two lines. Everything else is a bug and
keeps its traceback.

Run it: python train.py --help
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from typing import NoReturn

import tyro

from cfgsafe.errors import CfgsafeError, InputError, option
from cfgsafe.fields import check_ranges
from cfgsafe.outputs import guard

# Subcommand -> (the dataclass of its options, the function that runs it).
Commands = Mapping[str, tuple[type, Callable]]

NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|storage size calculation", re.I)
ASKED_FOR = re.compile(r"tried to allocate ([\d.]+ \w+)", re.I)


def run_subcommand(commands: Commands, description: str | None) -> None:
    """Read the subcommand and its options from the command line, and run it."""
    options_of: dict[str, Callable] = {name: stage for name, (stage, _) in commands.items()}
    run_of = dict(commands.values())
    with errors_as_lines(), usage_errors_as_lines():
        options: object = tyro.extras.subcommand_cli_from_dict(options_of, description=description)
    run_command(run_of[type(options)], options)


def run_single(options_of: type, run: Callable, description: str | None) -> None:
    """Read the options of a script that has no subcommands from the command line, and run it."""
    with errors_as_lines(), usage_errors_as_lines():
        options: object = tyro.cli(options_of, description=description)
    run_command(run, options)


def run_command(run: Callable, options: object) -> None:
    """Check the options, and call `run(options)`; see `errors_as_lines` for what it raises."""
    with errors_as_lines():
        check_ranges(options)
        check_used(options, sys.argv[1:])
        with guard(options):
            run(options)


def check_used(options: object, words: list[str]) -> None:
    """Raise InputError for an option among the words of the command line that has no effect, and say why."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    rules = options.unused() if hasattr(options, "unused") else ()
    for why, *names in rules:
        for name in names:
            flag = option(name)
            for typed in (flag, flag.replace("--", "--no-", 1)):
                if typed in given:
                    raise InputError(f"{typed} has no effect {why}; leave it out")


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Within the block, mistakes of the user and errors of the system become a line and SystemExit."""
    try:
        yield
        print(end="", flush=True)  # here, so that a full disk under stdout is noticed here
    except CfgsafeError as error:
        end(str(error), error.exit_code)
    except KeyboardInterrupt:
        end("interrupted", 130, "")
    except BrokenPipeError:  # the reader of our stdout has ended, as `head` does
        leave_stdout()
        sys.exit(1)
    except UnicodeEncodeError as error:
        end(f"the output cannot hold {error.object[error.start]!a}; set PYTHONIOENCODING=utf-8", 2)
    except OSError as error:
        reason = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
        end(f"{error.filename}: {reason}" if error.filename else reason, 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        asked = ASKED_FOR.search(str(error))
        size = f" ({asked[1]} more were asked for)" if asked else ""
        end(f"out of memory{size}; lower the batch or the lengths, or take a smaller model", 2)


def end(line: str, code: int, prefix: str = "error: ") -> NoReturn:
    """Print one line on stderr, and end the process with an exit code."""
    with suppress(OSError):  # nobody may read stderr, either
        print(prefix + " ".join(line.splitlines()), file=sys.stderr)
    leave_stdout()
    sys.exit(code)


def leave_stdout() -> None:
    """Write what stdout still holds, or drop it if that fails: Python would complain about it at its exit."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def usage_errors_as_lines() -> Iterator[None]:
    """Within the block, what tyro says about a wrong command line becomes two lines.

    Raises InputError for words that are no text.
    """
    for number, word in enumerate(sys.argv[1:], start=1):
        if re.search("[\ud800-\udfff]", word):
            before = sys.argv[number - 1] if number > 1 else ""
            name = before if before.startswith("--") else f"word {number} of the command line"
            raise InputError(f"{name}: is not valid UTF-8")
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code:
            with suppress(OSError):
                print(usage(said.getvalue()), file=sys.stderr)
        raise


def usage(box: str) -> str:
    """Two lines, what is wrong and how to get help, from the sections of tyro's box."""
    sections: list[list[str]] = []
    for line in re.sub("\x1b\\[[\\d;]*m", "", box).splitlines()[1:]:  # the first is the title
        text = line.strip(" │")
        if re.fullmatch("╰?[─-]{3,}╯?", text) or not sections:
            sections.append([])
        if text.strip("╰─-╯"):
            sections[-1].append(text)
    wrong, helps = [], f"{sys.argv[0]} --help"
    for title, *lines in filter(None, sections):
        text = " ".join([title, *lines])
        options = [line.split()[0] for line in lines if line.startswith("--")]
        if title.startswith("For full helptext"):
            helps = re.sub("For full helptext, (run:?|see) ", "", text)
        elif title.startswith("Missing from"):
            wrong.append(f"missing {', '.join(options)}")
        elif title.startswith("Perhaps you meant"):
            wrong.append(f"perhaps you meant {' or '.join(dict.fromkeys(options))}")
        elif not title.startswith("Argument helptext"):
            text = text.removeprefix("Error parsing ").removesuffix(".")
            wrong.append(text[:1].lower() + text[1:])
    return f"error: {'; '.join(wrong) or 'the command line is wrong'}\nfor help: python {helps}"
