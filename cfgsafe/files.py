"""Files of JSON, JSONL and text: errors name the line; a file is written whole or not at all.

Deviation: `AnswerLog` appends answers one by one, so that a crash loses at most the last one.

Run it: python train.py pairs --help      (every command reads and writes through this file)
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from cfgsafe.errors import CfgsafeError, CheckpointError, InputError

MOST_JSON = 2**27  # bytes of a file of JSON; the largest tokenizer.json have a quarter of it


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, object) for each non-empty line; place is `file:line`, for error messages.

    Raises InputError naming the line that is not a JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); give a UTF-8 JSONL file") from None
    lines = text.split("\n")  # splitlines() would cut at U+2028 inside a string
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _parse_line(line, place)


def _parse_line(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}"
        raise InputError(f"{place}: not JSON ({where}); one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON {type(row).__name__}, not an object")
    if "\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
        raise InputError(
            f"{place}: half of a surrogate pair (\\ud800 to \\udfff), which is not text; remove it"
        )
    return row


def read_json(path: Path) -> dict:
    """The JSON object in a file of a checkpoint. Raises CheckpointError naming the file."""
    unreadable = "not found or not readable"
    value = read_json_value(path, CheckpointError, unreadable, "give a complete checkpoint folder")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}, not an object")
    return value


def read_json_value(path: Path, error_class: type[CfgsafeError], unreadable: str, advice: str) -> object:
    """The JSON value in a file, of any kind.

    Raises `error_class` with the line "{path}: {unreadable} ({reason}); {advice}", or that it is
    not JSON.
    """
    try:
        check_regular(path, MOST_JSON)
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise error_class(f"{path}: {unreadable} ({_reason(error)}); {advice}") from None
    except ValueError as error:
        raise error_class(f"{path}: not JSON ({error})") from None


def check_regular(path: str | Path, most: float = math.inf) -> None:
    """Raise OSError unless `path` is a regular file of at most `most` bytes.

    To read a pipe or a device may never end.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("a folder, pipe or device, not a file")
    if found.st_size > most:
        raise OSError(f"{found.st_size:,} bytes, more than the {most:,} that are read")


def parse_json(text: str) -> object:
    """The value of a JSON text.

    Raises ValueError, also for what Python's reader lets pass: NaN and Infinity, numbers too large for
    a float, a key that stands twice in an object, and lists inside lists beyond Python's stack.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_no_twins)
    except RecursionError:
        raise ValueError("too many lists and objects inside each other") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:100]!r} stands twice in an object")
        found[key] = value
    return found


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, which is then changed.

    Missing folders are created. Raises InputError naming the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # its folder may be none
            temporary.unlink()
        raise InputError(f"{path}: cannot be written ({_reason(error)})") from None


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write `rows`, one JSON object a line, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def make_folder(path: str | Path) -> Path:
    """Create the folder and prove that it is writable before any work starts. Raises InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = _reason(error)
        raise InputError(f"--out {path}: cannot be written ({reason}); choose another folder") from None
    return path


@dataclass(frozen=True)
class Answer:
    """A model's answer, and why it ended: a `Completion.finish_reason`, or "" where that is not known."""

    text: str
    finish_reason: str = ""

    @property
    def cut(self) -> bool:
        """Whether the limit of tokens ended it, so that what would have come next was not seen."""
        return self.finish_reason == "length"

    @property
    def broken(self) -> bool:
        """Whether the model gave none: numbers that are not finite, or an error, ended it. It says nothing
        about what the model knows, so measures count it apart, never as clean."""
        return self.finish_reason in ("impossible", "failed")


class AnswerLog:
    """Answers that are kept between runs, in a JSONL file with one {"key", "answer", "finish_reason"} a line.

    `known` maps keys to answers. Within a `with` block `keep` adds an answer and writes it at once.
    Without a path, answers are kept in memory only. Raises what `read_answers` raises.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, Answer] = {} if path is None else read_answers(path)
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, key: str, answer: Answer) -> None:
        """Add an answer, and write it before the call returns. Threads must take turns."""
        if self._file is not None:
            row = {"key": key, "answer": answer.text, "finish_reason": answer.finish_reason}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self.known[key] = answer


def read_answers(path: Path) -> dict[str, Answer]:
    """Key -> answer of an `AnswerLog` file, {} where there is none. A line cut by a crash is removed.

    Raises InputError naming the line that is not an answer.
    """
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    known = {}
    for place, row in read_jsonl(path):
        key, text, reason = row.get("key"), row.get("answer"), row.get("finish_reason", "")
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(reason, str)):
            raise InputError(
                f"{place}: needs 'key' and 'answer'; this file keeps answers between runs, "
                "so move what else it is away"
            )
        known[key] = Answer(text, reason)
    return known


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
