"""The exceptions a user can meet, and the one place that turns them into a line and an exit code.

    CfgsafeError            anything the user can mend; the message is one line that says what and how
    |-- InputError          a file, line, field or option is wrong
    |-- CheckpointError     a checkpoint or adapter does not hold what it must (names the tensor)
    `-- ContextError        a prompt does not fit the model's context

Everything else that is raised is a bug and keeps its traceback.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class CfgsafeError(Exception):
    """Something the user can mend; `str(error)` is the one line shown."""

    exit_code = 2


class InputError(CfgsafeError):
    """A file, a line of it, a field or an option is wrong."""


class CheckpointError(CfgsafeError):
    """A checkpoint or adapter on disk is missing, incomplete or of another shape."""


class ContextError(CfgsafeError):
    """A prompt is longer than the model's context."""


def run_command(command: Callable[[], None]) -> None:
    """Run `command`; a `CfgsafeError` becomes one line on stderr and its exit code, 2 for wrong input."""
    try:
        command()
    except CfgsafeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, object) for each non-empty line; place is `file:line`, ready for an error message.

    Raises InputError naming the line that is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); give a UTF-8 JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON {type(row).__name__}, not an object")
        if "\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise InputError(f"{path}:{number}: half of a surrogate pair (\\ud800 to \\udfff), which is not text; remove it")
        yield f"{path}:{number}", row


def read_json(path: Path) -> dict:
    """A JSON object of a checkpoint; raises CheckpointError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: not found or not readable ({_reason(error)}); give a complete checkpoint folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: a JSON {type(raw).__name__}, not an object")
    return raw


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing, as `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file or nothing: to a temporary name beside it, then rename. Folders above it are made."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from None


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write `rows`, one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_at_least(least: int, options: object, *names: str) -> None:
    """Raise InputError for the first of the named options that is below `least`."""
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")


def make_folder(path: str | Path) -> Path:
    """Create `path` and prove it writable before any work starts; raises InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({_reason(error)}); choose another folder") from None
    return path


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
