"""From the command line to one stage: subcommands, and one line for a mistake of the user.

An option that is given but has no effect is refused, because whoever gave it believes that it has one. The
rules stand beside the options, in the method `unused` of their dataclass, whose values code may set freely.

Run it: python train.py --help
"""

import os
import sys
from collections.abc import Callable, Mapping

import tyro

from cfgsafe.errors import CfgsafeError, InputError, option
from cfgsafe.fields import check_ranges
from cfgsafe.outputs import guard

# Subcommand -> (the dataclass of its options, the function that runs it).
Commands = Mapping[str, tuple[type, Callable]]


def run_subcommand(commands: Commands, description: str | None) -> None:
    """Read the subcommand and its options from the command line, and run it."""
    options_of: dict[str, Callable] = {name: options for name, (options, _) in commands.items()}
    options = tyro.extras.subcommand_cli_from_dict(options_of, description=description)
    run_of = dict(commands.values())
    run_command(run_of[type(options)], options)


def run_single(options_of: type, run: Callable, description: str | None) -> None:
    """Read the options of a script that has no subcommands from the command line, and run it."""
    run_command(run, tyro.cli(options_of, description=description))


def run_command(run: Callable, options: object) -> None:
    """Call `run(options)`. A `CfgsafeError` becomes one line on stderr, and its exit code."""
    try:
        check_ranges(options)
        check_used(options, sys.argv[1:])
        with guard(options):
            run(options)
    except CfgsafeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


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
