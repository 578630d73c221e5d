"""The exceptions a user can meet; cfgsafe/cli.py turns them into a line and an exit code.

    CfgsafeError            a mistake that the user can fix; its message is one line that says how
    |-- InputError          a file, line, field or option is wrong
    |-- CheckpointError     a checkpoint or adapter does not hold what it must (names the tensor)
    `-- ContextError        a prompt does not fit the model's context

Everything else that is raised is a bug and keeps its traceback.

Run it: python infer.py --model nowhere --prompt "Hello!"      (a CheckpointError, in one line)
"""

from collections.abc import Iterator
from contextlib import contextmanager

# What the method `unused` of a dataclass of options yields: (why, option, option, ...), options that have no
# effect as the others stand. The command line refuses them (cfgsafe/cli.py).
Unused = Iterator[tuple[str, ...]]


class CfgsafeError(Exception):
    """A mistake that the user can fix; `str(error)` is the one line that is shown."""

    exit_code = 2


class InputError(CfgsafeError):
    """A file, a line of it, a field or an option is wrong."""


class CheckpointError(CfgsafeError):
    """A checkpoint or adapter on disk is missing, incomplete or of another shape."""


class ContextError(CfgsafeError):
    """A prompt is longer than the model's context."""


@contextmanager
def at(place: str) -> Iterator[None]:
    """Name `place`, such as file:line, in an InputError of what knows of none, such as the chat template."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def option(name: str) -> str:
    """The option of a field, as it is typed.

    >>> option("max_grad_norm")
    '--max-grad-norm'
    """
    return f"--{name.replace('_', '-')}"
