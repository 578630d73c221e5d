"""Folders and files that are replaced whole, whatever kills the process; locks; what killed runs leave."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from kills import every_moment

from cfgsafe import folders
from cfgsafe.errors import InputError
from cfgsafe.files import make_folder
from cfgsafe.folders import lock, new_folder

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from cfgsafe.folders import lock
sys.argv = ["train.py", "orpo", "--api-key", "sk-secret"]
with lock(PATH):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a path, and ends them."""
    running = []

    def hold(path: Path, **environment: str) -> subprocess.Popen:
        code = HOLD.replace("PATH", repr(str(path)))
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, **environment}
        )
        running.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def write_folder(folder: Path, content: str) -> None:
    with new_folder(folder) as temporary:
        (temporary / "file.json").write_text(content)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "new") as temporary:
        (temporary / "half.json").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        write_folder(tmp_path / "new", content)
    assert (tmp_path / "new" / "file.json").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files, such as 'thesis.txt'"):
        write_folder(tmp_path / "mine", "")
    with pytest.raises(InputError, match="a file has that name"):
        write_folder(tmp_path / "mine" / "thesis.txt", "")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", ["/dev/null/x/y", "/", "{}/" + "n" * 300, "{}/" + "m" * 250])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path, place):
    with pytest.raises(InputError, match="cannot be written|root of the file system") as error:
        write_folder(Path(place.format(tmp_path)), "")
    assert "\n" not in str(error.value)


def test_a_second_process_is_told_who_writes(tmp_path, holder):
    out = tmp_path / "runs" / "orpo"
    process = holder(out)
    (tmp_path / "link").symlink_to(out)
    for name in (out, tmp_path / "link"):
        with pytest.raises(InputError) as error, lock(name):
            pass
        who = rf"process {process.pid} on \S+ \(train.py orpo, since \d+-\d+-\d+ \d+:\d+:\d+\)"
        assert error.match(rf"^{out}: {who} writes there; wait for it, or choose another name$")
        assert "secret" not in str(error.value)
    with lock(out / "inside"), lock(out.parent):
        pass
    with pytest.raises(InputError, match="writes there"):
        write_folder(out, "")


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    process = holder(tmp_path / "o")
    process.kill()
    process.wait()
    with lock(tmp_path / "o"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_locked_once_in_a_process(tmp_path):
    """Stages run others, into the same folder and into folders inside."""
    with lock(tmp_path / "new" / "o"), lock(tmp_path / "new" / "o"), lock(tmp_path / "new" / "o" / "blue"):
        write_folder(tmp_path / "new" / "o" / "red", "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "o", "red", "file.json"]


def test_a_lock_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), lock(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_anything_is_written_leaves_no_empty_folder(tmp_path):
    out = tmp_path / "runs" / "new"
    with pytest.raises(InputError), lock(out):
        make_folder(out)
        raise InputError("p.jsonl: holds no pair")
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    with lock(out):
        pass
    assert out.is_dir()


def test_only_the_main_process_of_several_locks(tmp_path, holder, monkeypatch):
    holder(tmp_path, WORLD_SIZE="2", RANK="0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with lock(tmp_path):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="writes there"), lock(tmp_path):
        pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with lock(tmp_path / "o"):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/o: no locks there; start no second run that writes there\n"
    )


def fill(folder: Path, content: str) -> None:
    """A folder of three files, one of them in a folder inside."""
    with new_folder(folder, replaces=("*",)) as temporary:
        (temporary / "inside").mkdir()
        for name in ("a.json", "b.json", "inside/c.json"):
            (temporary / name).write_text(content)


def content_of(folder: Path) -> set[tuple[str, str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {(str(path.relative_to(folder)), path.read_text()) for path in files}


def whole(content: str) -> set[tuple[str, str]]:
    return {(name, content) for name in ("a.json", "b.json", "inside/c.json")}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(tmp_path, monkeypatch, can_exchange):
    """Without an exchange of names there is a moment without a folder; the next run gives it back."""
    monkeypatch.setattr(os, "fsync", str)  # a kill needs none, and they take most of the time
    if not can_exchange:
        monkeypatch.setattr(folders, "EXCHANGE", 1 << 20)  # a flag that renameat2 refuses
    folder, seen, gaps = tmp_path / "runs" / "o", set(), 0
    fill(folder, "old")

    def check(moment):
        nonlocal gaps
        if not folder.exists():
            gaps += 1
            make_folder(folder.parent)
        found = content_of(folder)
        assert found in (whole("old"), whole("new")), moment
        seen.update(text for _, text in found)
        fill(folder, "old")
        assert [path.name for path in folder.parent.iterdir()] == ["o"], moment

    assert every_moment(partial(fill, folder, "new"), check) > 25
    assert seen == {"old", "new"} and (gaps == 0) == can_exchange


def test_a_kill_at_any_moment_leaves_no_part_of_a_first_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", str)
    out = tmp_path / "runs"

    def check(moment):
        assert content_of(out / "o") in (set(), whole("new")), moment
        shutil.rmtree(out / "o", ignore_errors=True)
        make_folder(out)
        assert list(out.iterdir()) == [], moment

    assert every_moment(partial(fill, out / "o", "new"), check) > 25


def test_what_a_live_process_writes_is_not_cleared(tmp_path, holder):
    holder(tmp_path / "state-1")
    theirs = {tmp_path / ".state-1.cfgsafe-lock", tmp_path / ".state-1.cfgsafe-new" / "half"}
    (tmp_path / ".state-1.cfgsafe-new").mkdir()
    (tmp_path / ".state-1.cfgsafe-new" / "half").touch()
    (tmp_path / ".state-2.cfgsafe-new").mkdir()
    (tmp_path / ".x.json.cfgsafe-new").touch()
    (tmp_path / ".mine.old").touch()
    with new_folder(tmp_path / "state-3") as temporary:
        make_folder(tmp_path)
        assert temporary.exists()
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == theirs | {tmp_path / ".mine.old"} and not (tmp_path / ".state-2.cfgsafe-new").exists()


def test_modes_are_the_umasks_or_those_before(tmp_path):
    old = os.umask(0o027)
    try:
        write_folder(tmp_path / "o", "x")
        file = tmp_path / "o" / "file.json"
        assert mode_of(tmp_path / "o") == 0o750 and mode_of(file) == 0o640
        file.chmod(0o600)
        (tmp_path / "o").chmod(0o700)
        write_folder(tmp_path / "o", "y")
        assert mode_of(tmp_path / "o") == 0o700 and mode_of(file) == 0o600 and file.read_text() == "y"
    finally:
        os.umask(old)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    write_folder(tmp_path / "real", "old")
    for name, target in (("link", "real"), ("dangling", "new")):
        (tmp_path / name).symlink_to(tmp_path / target)
        write_folder(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "file.json").read_text() == "new"


def test_what_is_written_is_on_the_disk_before_the_old_goes(tmp_path, monkeypatch):
    """Each file and folder is synced, and the names are, before anything is deleted."""
    fill(tmp_path / "o", "old")
    done = []

    def sync(descriptor, real=os.fsync):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    def delete(path, *arguments, real=shutil.rmtree, **options):
        done.append("deleted" if Path(path).exists() else "")
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "rmtree", delete)
    fill(tmp_path / "o", "new")
    steps = [step for step in done if step]
    assert steps[-2:] == [tmp_path.name, "deleted"]
    assert set(steps[:-2]) == {".o.cfgsafe-new", "a.json", "b.json", "inside", "c.json"}
