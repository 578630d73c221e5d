"""What weights and data are, told by what their files hold, never by where the files are or by their date.

Answers that are kept between runs, and runs that are resumed, belong to the weights that gave them:
an adapter that was trained again into the same folder is another adapter.

Run it: python -m pytest tests/test_identity.py
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from cfgsafe.errors import InputError
from cfgsafe.files import check_regular
from cfgsafe.hub import OTHERS, WEIGHTS, resolve


def identity(*sources: str | Path | None) -> str:
    """A digest of checkpoints and adapters, given as folders or hub ids, in this order.

    Of each folder it covers the files that matter: weights, configuration, tokenizer and chat
    template. Without change the files of a run are read once. Raises CheckpointError and InputError.
    """
    parts: list[dict[str, str]] = []
    for source in sources:
        files = model_files(resolve(source)) if source else []
        with ThreadPoolExecutor() as pool:  # hashing does not hold Python's lock
            digests = list(pool.map(file_digest, files))
        parts.append({path.name: digest for path, digest in zip(files, digests, strict=True)})
    return digest_of(parts)


def contents(options: object, folders: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> dict[str, str]:
    """Option -> digest of what it names: checkpoints and adapters in `folders`, or `files`.

    Options without a value are left out. Raises CheckpointError and InputError.
    """
    found = {}
    for names, digest in ((folders, identity), (files, file_digest)):
        for name in names:
            value = getattr(options, name)
            sources = value if isinstance(value, tuple) else (value,)
            if any(sources):
                found[name] = digest_of([digest(source) for source in sources])
    return found


def digest_of(value: object) -> str:
    """A digest of a value, by its `repr`."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint or adapter that its answers depend on, sorted."""
    found: set[Path] = set()
    for pattern in WEIGHTS + OTHERS:
        found.update(folder.glob(pattern))
    return sorted(found)


def file_digest(path: str | Path) -> str:
    """SHA-256 of what a file holds. Raises InputError where it cannot be read.

    A file is read again only when it was written since the last call: the change time, unlike the
    date of modification, cannot be set.
    """
    try:
        check_regular(path)
        at = Path(path).stat()
        state = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
        return _read(str(path), state)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


@cache
def _read(path: str, state: tuple[int, ...]) -> str:
    """The digest of a file in this state, which is a part of the key of the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
