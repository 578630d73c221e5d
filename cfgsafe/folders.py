"""Folders that are replaced whole, and locks: a kill at any moment leaves the old or the new, never half.

Source: flock(2), which the kernel releases when a process ends, however it ends, and renameat2(2), which
exchanges two names in one step. What is written is on disk (fsync) before what it replaces is deleted.
Deviations: where two names cannot be exchanged (some network file systems, macOS), a folder is replaced by
two renames, and a kill between them is mended by the next run that writes there. A file system without
locks gets a warning instead of a lock.

Beside NAME stand, while it is written, `.NAME.cfgsafe-lock`, `-new` and `-old`. What a killed process left of
them is cleared by the next run that writes there.

Run it: python train.py merge --help      (its --out is such a folder)
"""

import ctypes
import errno
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cfgsafe.errors import InputError

OURS = ("*.safetensors", "*.json", "*.jinja")  # files that we write
LEFTOVER = re.compile(r"\.(.+)\.cfgsafe-(lock|new|old)")
EXCHANGE, CWD = 2, -100  # of renameat2(2): RENAME_EXCHANGE, AT_FDCWD
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # flock(2) where there are none

_held: set[Path] = set()  # what this process has locked


@contextmanager
def new_folder(folder: str | Path, replaces: tuple[str, ...] = OURS) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` if the block succeeds, and else is removed.

    An existing `folder` is replaced only if the names of all its files match `replaces`, so that
    nobody loses other files; it keeps its mode, and its files keep theirs. Raises InputError when there
    are others, when it cannot be written, or what `lock` raises.
    """
    folder = Path(os.path.realpath(folder))
    try:
        with lock(folder):
            mend(folder)
            exists = _check_replaceable(folder, replaces)
            temporary = beside(folder, "new")
            temporary.mkdir(mode=0o700 if exists else 0o777)
            try:
                yield temporary
                _sync_tree(temporary)
                if exists:
                    _copy_modes(folder, temporary)
                    _exchange(temporary, folder)
                else:
                    temporary.rename(folder)
                sync(folder.parent)
            finally:
                mend(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)}); choose another folder") from None


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing `path`, a file or a folder, which need not exist, in the block.

    A path that this process has locked is not locked again, and of the processes that torchrun starts only
    the main one locks. Raises InputError that says who has it, or that nothing can be written there.
    """
    path = Path(os.path.realpath(path))
    if path in _held or not is_main_process():
        yield
        return
    missing = [place for place in (path, *path.parents) if not os.path.exists(place)]
    file, descriptor = _open_lock(path)
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        file.unlink(missing_ok=True)  # before it is free, so that nobody waits for a file that is gone
        os.close(descriptor)
        for place in missing:  # those that are empty folders now, after an error
            with suppress(OSError):
                place.rmdir()


def mend(folder: Path) -> None:
    """Clear what a killed process left beside `folder`, which this process has locked.

    Where the kill came between two renames, the old folder gets its name back.
    """
    new, old = beside(folder, "new"), beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clear what killed processes left in `folder`; what a live one is writing stays. Raises OSError."""
    for left in list(folder.iterdir()) if is_main_process() else ():
        found = LEFTOVER.fullmatch(left.name)
        path = folder / found[1] if found else None
        if path is None or path in _held:
            continue
        with suppress(InputError, OSError):  # another process writes there, or it is not ours to delete
            if left.is_dir():
                with lock(path):
                    mend(path)
            else:
                descriptor = create(left)
                left.unlink()
                os.close(descriptor)


def beside(path: Path, kind: str) -> Path:
    """The name of a file or folder that stands beside `path` while that is written."""
    if not path.name:
        raise InputError(f"{path}: is the root of the file system; choose another folder")
    return path.with_name(f".{path.name}.cfgsafe-{kind}")


def create(path: Path, mode: int = 0o666) -> int:
    """A descriptor of the new file `path`, which is locked; one that a killed process left is deleted first.

    Raises BlockingIOError while another process has the file, and OSError.
    """
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW
        try:
            descriptor, is_new = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(path, flags), False
            except FileNotFoundError:
                continue  # its process has just ended
        try:
            try_lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise
        if not _is_still_there(path, descriptor):  # another process took it for one that was left
            os.close(descriptor)
        elif is_new:
            return descriptor
        else:
            path.unlink()
            os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock an open file; False where the file system has no locks. Raises BlockingIOError."""
    try:
        import fcntl
    except ImportError:  # not Unix
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Why something could not be read or written, in the words of the system."""
    return getattr(error, "strerror", None) or str(error)


def _open_lock(path: Path) -> tuple[Path, int]:
    """The lock's file and its descriptor: beside `path`, or in that folder where only that is writable."""
    places = [beside(path, "lock"), path / beside(path, "lock").name]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = places[0] if os.access(path.parent, os.W_OK) or not path.is_dir() else places[1]
        descriptor = create(file)
    except BlockingIOError:
        raise InputError(
            f"{path}: {_holder(file)} writes there; wait for it, or choose another name"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason(error)}); choose another name") from None
    if not try_lock(descriptor):
        print(f"warning: {path}: no locks there; start no second run that writes there", file=sys.stderr)
    with suppress(OSError):  # a full disk
        os.write(descriptor, _this_process().encode())
    return file, descriptor


def _this_process() -> str:
    """What the lock tells others; of the command line only script and stage: the rest may be secret."""
    stage = sys.argv[1] if len(sys.argv) > 1 and re.fullmatch("[a-z-]{1,20}", sys.argv[1]) else ""
    command = f"{Path(sys.argv[0]).name} {stage}".strip()
    return (
        f"process {os.getpid()} on {platform.node()} ({command}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"
    )


def _holder(file: Path) -> str:
    with suppress(OSError):
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.startswith("process ") and text.isprintable():
            return text
    return "another process"


def is_main_process() -> bool:
    """Not one of those that torchrun starts beside the main one; cfgsafe/parallel.py."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_replaceable(folder: Path, replaces: tuple[str, ...]) -> bool:
    """Whether `folder` exists. Raises InputError when it is no folder, or holds other files."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: cannot be written (a file has that name); choose another folder")
    others = []
    for path in folder.iterdir():
        if not (any(map(path.match, replaces)) or LEFTOVER.fullmatch(path.name)):
            others.append(path.name)
    if others:
        raise InputError(f"{folder}: holds other files, such as {min(others)!r}; choose another folder")
    return True


def _copy_modes(old: Path, new: Path) -> None:
    """Give the folder `new`, and its files that `old` has too, the modes that they have there."""
    for path in new.iterdir():
        if path.is_file() and (old / path.name).is_file():
            path.chmod(stat.S_IMODE((old / path.name).stat().st_mode))
    new.chmod(stat.S_IMODE(old.stat().st_mode))


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def _exchange(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; the old one stands beside it afterwards."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 and renameat2(CWD, os.fsencode(new), CWD, os.fsencode(folder), EXCHANGE) == 0:
        return
    folder.rename(beside(folder, "old"))
    new.rename(folder)
