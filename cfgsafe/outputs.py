"""One guard over what a command writes: never an input of the same run, and only files and folders.

    out: Annotated[str, Folder(writes=("epoch-*", "metrics.jsonl"))]     # on the dataclass of options
    prompts: Annotated[str, Input()]

The fields of a command's options declare what it reads and what it writes. `guard` compares the two with
links resolved, before anything is read or created (cfgsafe/cli.py), and locks what will be written.
Deviation: what an option leaves to its default, such as report.html in the folder of the run, is the
command's own affair.

Run it: python train.py subtract --base M --tuned N --out M      (one line, and M stays as it is)
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from cfgsafe.errors import InputError, option
from cfgsafe.fields import declared
from cfgsafe.folders import lock, reason

T = TypeVar("T", "Input", "Output")

LONGEST_NAME = 200  # bytes of a file's name: systems take 255, and temporary names are longer
STREAMS = ("/dev/std", "/dev/fd/", "/proc/")  # names of open files, which cannot be replaced


def itself(value: str) -> tuple[str]:
    """The one path that a value names."""
    return (value,)


@dataclass(frozen=True)
class Input:
    """A file or folder that the command reads, or a name of something else, such as a hub id.

    `paths` gives the files and folders of a value that is no path alone, such as NAME=FOLDER.
    """

    paths: Callable[[str], Iterable[str | Path]] = itself


@dataclass(frozen=True)
class Output:
    """A file or a folder that the command writes."""

    def fits(self, mode: int) -> bool:
        """Whether what exists there, with this mode, can be written: no device, pipe or socket."""
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def written(self, path: Path) -> Iterator[Path]:
        """The files and folders that may be overwritten."""
        yield path


@dataclass(frozen=True)
class File(Output):
    """A file; `also` are others beside it, as patterns of {name}, {stem} and {suffix}."""

    also: tuple[str, ...] = ()

    def fits(self, mode: int) -> bool:
        """As Output.fits."""
        return stat.S_ISREG(mode)

    def written(self, path: Path) -> Iterator[Path]:
        """As Output.written."""
        yield path
        for pattern in self.also:
            yield path.with_name(pattern.format(name=path.name, stem=path.stem, suffix=path.suffix))


@dataclass(frozen=True)
class Folder(Output):
    """A folder; `writes` are patterns of what the command writes there. "*": it replaces all of it."""

    writes: tuple[str, ...] = ()

    def fits(self, mode: int) -> bool:
        """As Output.fits."""
        return stat.S_ISDIR(mode)

    def written(self, path: Path) -> Iterator[Path]:
        """As Output.written."""
        for pattern in self.writes:
            yield from path.glob(pattern)


InputPath = Annotated[str, Input()]
OutputFile = Annotated[str, File()]


def several(value: str) -> list[str]:
    """The paths of a value that separates them by commas, as --ner does."""
    return value.split(",")


Detectors = Annotated[str, Input(several)]


@contextmanager
def guard(options: object) -> Iterator[None]:
    """Check what the options write against what they read, and lock it within the block.

    Raises InputError that names the options, before anything is created.
    """
    outputs = list(declared_paths(options, Output))
    for flag, value, output in outputs:
        check_place(f"{flag} {value}", value, output)
    for flag, value, output in outputs:
        for source, text, given in declared_paths(options, Input):
            for path in given.paths(text):
                if text and spoils(Path(value), output, Path(path)):
                    raise InputError(
                        f"{flag} {value}: would overwrite {path}, which {source} reads; choose another"
                    )
    with ExitStack() as stack:
        for _, value, _ in outputs:
            stack.enter_context(lock(value))
        yield


def declared_paths(options: object, kind: type[T]) -> Iterator[tuple[str, str, T]]:
    """(option, value, what the field declares) of each value of the options that is an input or an output."""
    for name, found in declared(type(options), kind):
        value = getattr(options, name)
        for each in found:
            for text in value if isinstance(value, list | tuple) else [value]:
                if text is not None:
                    yield flag_of(options, name), text, each


def flag_of(options: object, name: str) -> str:
    """The option of a field, which may have another name on the command line (tyro.conf.arg)."""
    for each in dict(declared(type(options), object))[name]:
        known_as = getattr(each, "name", None)
        if isinstance(known_as, str):
            return option(known_as)
    return option(name)


def check_place(place: str, value: str, output: Output) -> None:
    """Raise InputError where the output cannot be: on a device, below a file, where nobody may write."""
    if not value:
        raise InputError(f"{place.strip()}: is empty; give a name")
    path = Path(os.path.abspath(value))
    if str(path).startswith(STREAMS):
        raise InputError(f"{place}: is an open stream, not a file; give the name of a file")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"{place}: is longer than {LONGEST_NAME} bytes; give a shorter name")
    mode = mode_of(place, path)
    if mode is not None and not output.fits(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a device or a pipe"
        raise InputError(f"{place}: is {what}; give another name")
    parent = path
    while not os.path.lexists(parent):
        parent = parent.parent
    if parent != path and not parent.is_dir():
        raise InputError(f"{place}: cannot be written ({parent} is no folder); choose another place")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{place}: cannot be written ({parent} is not writable); choose another place")


def mode_of(place: str, path: Path) -> int | None:
    """The mode of a file or folder, links resolved; None where there is none. Raises InputError."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({reason(error)}); choose another place") from None


def spoils(out: Path, output: Output, source: Path) -> bool:
    """Whether writing the output `out` would change `source`, an input, or what lies in it."""
    if not os.path.exists(source):
        return False
    if is_same(out, source) or any(
        is_same(path, source) or lies_in(source, path) for path in output.written(out)
    ):
        return True
    return isinstance(output, File) and out.exists() and lies_in(out, source)


def is_same(path: Path, other: Path) -> bool:
    """Whether both names, links of any kind resolved, are one file or folder."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path, links resolved, lies in the folder."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
