"""Folders and files that are replaced whole, whatever kills the process; locks; what killed runs leave."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfgsafe.errors import InputError
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
