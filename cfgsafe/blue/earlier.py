"""What an earlier run left in the folder of a new one: it stays until the new run has ended well.

A new run finds an empty place: the results of the run before stand in OUT/earlier meanwhile. If the new run
fails before it has saved anything, all is put back; if it fails later, they stay there, and a line says so.

Run it: python train.py orpo --model M --pairs P --out O      (twice)
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfgsafe.folders import beside, is_main_process

EARLIER = "earlier"
# What a run that failed is worth keeping for; of the patterns that it writes to.
SAVED = ("state-*", "epoch-*", "adapter", "attacks.jsonl", "attacks-*.jsonl", "results.json", "safety.jsonl")

_busy: set[Path] = set()  # folders of runs in this process: a stage may run another into its own folder


@contextmanager
def replacing(out: Path, names: tuple[str, ...], *, resumed: bool) -> Iterator[None]:
    """Keep what an earlier run left in `out` under the patterns `names` until the block has ended well.

    A run that is resumed goes on with what is there, and every run with answers that are kept.
    """
    names = tuple(name for name in names if not name.startswith("answers"))
    if out in _busy or not is_main_process():
        yield
        return
    _put_back(out)  # a kill came while names were moved
    aside = out / EARLIER
    if not resumed and aside.exists():
        _delete(_matching(out, names))  # what a run has left that failed, or was killed
    elif not resumed:
        _move(_matching(out, names), _moving(out))
        if _moving(out).exists():
            _moving(out).rename(aside)
    _busy.add(out)
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if not resumed and aside.exists():
            return_or_keep(out, names)
        raise
    finally:
        _busy.remove(out)
    if aside.exists():
        left = beside(aside, "new")  # is cleared by the next run, if this is killed
        aside.rename(left)
        shutil.rmtree(left)


def return_or_keep(out: Path, names: tuple[str, ...]) -> None:
    """After an error: put the earlier run back, or say where it is. A kill does neither."""
    aside = out / EARLIER
    if _matching(out, tuple(set(SAVED) & set(names))):
        print(f"{out}: what the earlier run left there is in {aside}", file=sys.stderr)
        return
    _delete(_matching(out, names))
    aside.rename(_moving(out))
    _put_back(out)


def _put_back(out: Path) -> None:
    """Move the names that are between `out` and OUT/earlier to `out`."""
    moving = _moving(out)
    if moving.exists():
        _move(sorted(moving.iterdir()), out)
        moving.rmdir()


def _move(paths: list[Path], folder: Path) -> None:
    for path in paths:
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _matching(out: Path, names: tuple[str, ...]) -> list[Path]:
    return sorted(path for name in names for path in out.glob(name))


def _moving(out: Path) -> Path:
    """The folder that holds what is on its way from `out` to OUT/earlier, or back."""
    return out / f"{EARLIER}.part"
