"""From a command line to one stage: subcommands, and the one line that a user's mistake becomes.

Run it: python train.py --help
"""

import os
import sys
from collections.abc import Callable

import tyro

from cfgsafe.errors import CfgsafeError

Commands = dict[
    str, tuple[type, Callable]
]  # subcommand -> (its dataclass of options, the function that runs it)


def run_subcommand(commands: Commands, description: str) -> None:
    """Read the subcommand and its options from the command line, and run it."""
    options_of = {name: options for name, (options, _) in commands.items()}
    options = tyro.extras.subcommand_cli_from_dict(options_of, description=description)
    run_of = dict(commands.values())
    run_command(run_of[type(options)], options)


def run_single(options_of: type, run: Callable, description: str) -> None:
    """Read the options of a script without subcommands from the command line, and run it."""
    run_command(run, tyro.cli(options_of, description=description))


def run_command(run: Callable, options: object) -> None:
    """Call `run(options)`; a `CfgsafeError` becomes one line on stderr and its exit code, 2 for wrong input."""
    try:
        run(options)
    except CfgsafeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
