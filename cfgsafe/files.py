"""Files of JSON, JSONL and text: errors name the line; a file is written whole or not at all.

Deviation: `Log` appends rows one by one, so that a crash loses at most the last one.

Run it: python train.py pairs --help      (every command reads and writes through this file)
"""

import errno
import json
import math
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

from cfgsafe.errors import CfgsafeError, CheckpointError, InputError
from cfgsafe.folders import beside, create, reason, sweep, sync

TURNS, TURN = 500, 0.02  # how often, and after how many seconds, a file is tried that another process writes

MOST_JSON = 2**27  # bytes of a file of JSON; the largest tokenizer.json have a quarter of it


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, object) for each non-empty line; place is `file:line`, for error messages.

    Raises InputError naming the line that is not a JSON object.
    """
    try:
        yield from _rows(Path(path).read_bytes(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); give a UTF-8 JSONL file") from None


def _rows(content: bytes, path: str | Path) -> Iterator[tuple[str, dict]]:
    """As `read_jsonl`, of the contents of a file. Raises UnicodeDecodeError too."""
    lines = content.decode("utf-8-sig").split("\n")  # splitlines() would cut at U+2028 inside a string
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
    except (RecursionError, ValueError):  # of a number with more than 4,300 digits
        raise InputError(f"{place}: lists inside lists too deep, or a number too long, to be read") from None
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
        raise error_class(f"{path}: {unreadable} ({reason(error)}); {advice}") from None
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

    Missing folders are created. A file that is there keeps its mode, and a link its target, which is
    replaced. Raises InputError naming the file, and for what is no file, such as a folder or a device.
    """
    target = Path(os.path.realpath(path))
    temporary = beside(target, "new")
    try:
        mode = _mode_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _create_in_turn(temporary, 0o666 if mode is None else 0o600)
        with open(descriptor, "wb") as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
                if mode is not None:
                    os.fchmod(descriptor, mode)
                temporary.replace(target)
            except BaseException:
                temporary.unlink()
                raise
        sync(target.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)}); choose another name") from None


def _mode_of(path: str | Path) -> int | None:
    """The mode of a file, None where there is none. Raises OSError, also for what is no file."""
    try:
        check_regular(path)
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def _create_in_turn(path: Path, mode: int) -> int:
    """As `folders.create`, after others that write the same file."""
    for _ in range(TURNS):
        with suppress(BlockingIOError):
            return create(path, mode)
        time.sleep(TURN)
    raise BlockingIOError(errno.EBUSY, "another process is writing it")


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write `rows`, one JSON object a line, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def make_folder(path: str | Path) -> Path:
    """Create the folder and prove that it is writable before any work starts; returns `path`.

    What killed runs left in it is cleared. Raises InputError.
    """
    try:
        real = Path(os.path.realpath(path))  # mkdir does not create the target of a link
        real.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=real):
            pass
        sweep(real)
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({reason(error)}); choose another folder"
        ) from None
    return Path(path)


class Log:
    """A JSONL file to which rows are appended: `with Log(path) as log: log.add({"step": 1})`.

    A row is in the file before `add` returns, whole or not at all, and survives the end of the process.
    It is not synced to the disk each time, which takes 40 times as long: a power failure costs the rows of
    the last seconds. Raises InputError when the file cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Self:
        try:
            self._file = open(self.path, "ab+", buffering=0)
            self._end_last_row()
        except OSError as error:
            raise self._failure(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: dict) -> None:
        """Append a row. One that does not fit on the disk leaves nothing behind."""
        line = (json.dumps(row) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):  # not of a device
                self._file.truncate(end)
            raise self._failure(error) from None

    def _end_last_row(self) -> None:
        """Cut off a row that a crash cut short; end one that only lacks its newline."""
        size = self._file.seek(0, os.SEEK_END)
        if size == 0 or os.pread(self._file.fileno(), 1, size - 1) == b"\n":
            return
        _, tail = _split_tail(self.path.read_bytes())
        if _is_json(tail):
            self._file.write(b"\n")
        else:
            self._file.truncate(size - len(tail))

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({reason(error)}); what is in it stays, mend that and run again"
        )


def read_log(path: Path, key: str) -> list[tuple[str, dict]]:
    """(place, row) of each row of a `Log` whose rows begin with `key`; [] where there is no file.

    A last row that a crash cut short is left out. Raises InputError naming a line that is no row, or that
    does not begin as one.
    """
    if not path.exists():
        return []
    try:
        lines, tail = _split_tail(path.read_bytes())
        rows = list(_rows(lines + tail if _is_json(tail) else lines, path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); move it away") from None
    start, cut = f'{{"{key}": '.encode(), tail.rstrip(b"\0")  # a power failure can leave zeros
    if not _is_json(tail) and cut[: len(start)] != start[: len(cut)]:
        number = lines.count(b"\n") + 1
        raise InputError(f"{path}:{number}: not a row that begins with {key!r}; move this file away")
    return rows


def _split_tail(content: bytes) -> tuple[bytes, bytes]:
    """The whole lines, and what follows the last of them."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


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
    `unwritten` are rows that could not be written; the end of the block tries once more. Without a path,
    answers are kept in memory only. Raises what `read_answers` raises.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.known: dict[str, Answer] = {} if path is None else read_answers(path)
        self._log: Log | None = None
        self.unwritten: list[dict] = []

    def __enter__(self) -> Self:
        if self.path is not None:
            self._log = Log(self.path).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            with suppress(InputError):  # which `keep` has raised before
                self._write(self._log)
            self._log.__exit__()
        if self.unwritten:
            count = len(self.unwritten)
            print(
                f"{self.path}: {count} answers were not saved, and will be asked for again", file=sys.stderr
            )

    def keep(self, key: str, answer: Answer) -> None:
        """Add an answer, and write it before the call returns. Threads must take turns.

        Raises InputError when it cannot be written; the next call tries again.
        """
        self.known[key] = answer
        if self._log is not None:
            self.unwritten.append({"key": key, "answer": answer.text, "finish_reason": answer.finish_reason})
            self._write(self._log)

    def _write(self, log: Log) -> None:
        while self.unwritten:
            log.add(self.unwritten[0])
            del self.unwritten[0]


def read_answers(path: Path) -> dict[str, Answer]:
    """Key -> answer of an `AnswerLog` file, {} where there is none. A row that a crash cut short is left out.

    Raises InputError naming the line that is not an answer.
    """
    known = {}
    for place, row in read_log(path, "key"):
        key, text, why = row.get("key"), row.get("answer"), row.get("finish_reason", "")
        if not (isinstance(key, str) and isinstance(text, str) and isinstance(why, str)):
            raise InputError(
                f"{place}: needs 'key' and 'answer'; this file keeps answers between runs, "
                "so move what else it is away"
            )
        known[key] = Answer(text, why)
    return known
