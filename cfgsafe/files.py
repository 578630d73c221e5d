"""Files of JSON, JSONL and text: read with the place named in every error, written whole or not at all.

Run it: python train.py pairs --help      (every command reads and writes through this file)
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from cfgsafe.errors import CheckpointError, InputError


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, object) for each non-empty line; place is `file:line`, ready for an error message.

    Raises InputError naming the line that is not a JSON object.
    """
    try:
        lines = (
            Path(path).read_text(encoding="utf-8").split("\n")
        )  # splitlines() would cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); give a UTF-8 JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno}); one object a line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON {type(row).__name__}, not an object")
        if "\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise InputError(
                f"{path}:{number}: half of a surrogate pair (\\ud800 to \\udfff), which is not text; remove it"
            )
        yield f"{path}:{number}", row


def read_json(path: Path) -> dict:
    """A JSON object of a checkpoint; raises CheckpointError naming the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: not found or not readable ({_reason(error)}); give a complete checkpoint folder"
        ) from None
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


def make_folder(path: str | Path) -> Path:
    """Create `path` and prove it writable before any work starts; raises InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"--out {path}: cannot be written ({_reason(error)}); choose another folder"
        ) from None
    return path


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def read_answers(path: Path) -> dict[str, str]:
    """Key -> answer of a file that `answers` wrote; a line that a crash cut short is dropped."""
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    known = {}
    for place, row in read_jsonl(path):
        if not isinstance(row.get("key"), str) or not isinstance(row.get("answer"), str):
            raise InputError(
                f"{place}: needs 'key' and 'answer'; this file keeps answers between runs, so move what else it is away"
            )
        known[row["key"]] = row["answer"]
    return known
