"""Files that are written whole, and logs that are appended to: kills, full disks, and what is no file."""

import os
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from kills import every_moment

from cfgsafe import files
from cfgsafe.blue.resume import keep_steps
from cfgsafe.errors import InputError
from cfgsafe.files import Answer, AnswerLog, Log, make_folder, read_answers, read_log, write_bytes, write_text
from cfgsafe.folders import create

ROOT = Path(__file__).parents[1]
FULL = """
import resource, sys
from pathlib import Path
from cfgsafe.errors import InputError
from cfgsafe.files import Answer, AnswerLog
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (230, 230))  # the disk is full after 230 bytes
with AnswerLog(path) as log:
    for number in range(6):
        try:
            log.keep(str(number), Answer("x" * 20))
        except InputError as error:
            print(number, error)
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", str)  # a kill needs none
    file, seen = tmp_path / "a.txt", set()
    write_text(file, "old")

    def check(moment):
        seen.add(file.read_text())
        assert len(list(tmp_path.iterdir())) <= 2, moment
        make_folder(tmp_path)
        assert list(tmp_path.iterdir()) == [file], moment
        write_text(file, "old")

    assert every_moment(partial(write_text, file, "new"), check) > 15
    assert seen == {"old", "new"}


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".a.txt.cfgsafe-new").write_text("a much longer half")
    (tmp_path / ".a.txt.cfgsafe-new").chmod(0o600)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "a.txt"]
    assert mode_of(tmp_path / "a.txt") & 0o400 and mode_of(tmp_path / "a.txt") == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_file_is_synced_before_it_gets_its_name_and_the_name_afterwards(tmp_path, monkeypatch):
    done = []

    def sync(descriptor, real=os.fsync):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_text(tmp_path / "a.txt", "new")
    assert done == [".a.txt.cfgsafe-new", tmp_path.name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_that_is_rewritten_keeps_its_mode(tmp_path, mode):
    file = tmp_path / "a.txt"
    file.touch()
    file.chmod(mode)
    write_text(file, "new")
    assert mode_of(file) == mode and file.read_text() == "new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(old)
    assert mode_of(tmp_path / "a.txt") == 0o640


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    for name, target in (("link", "real"), ("dangling", "new")):
        (tmp_path / name).symlink_to(tmp_path / target)
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / target).read_text() == "new"


def test_what_is_no_file_is_never_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        device = Path("/dev/null")
    (tmp_path / "link").symlink_to(device)
    what = "a folder, pipe or device, not a file"
    for name in ("folder", "pipe", "link"):
        with pytest.raises(InputError, match=f"{name}: cannot be written .{what}.; choose another name"):
            write_bytes(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo() and device.is_char_device()


@pytest.mark.parametrize("name", ["file/x", "n" * 300, "n" * 250, "file/x/y"])
@pytest.mark.parametrize("write", [partial(write_bytes, content=b""), make_folder])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, write, name):
    if write is make_folder and name == "n" * 250:
        name = "file"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written .*; choose another") as error:
        write(tmp_path / name)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="a.txt: cannot be written .Input/output error."):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_writers_of_one_file_take_turns(tmp_path):
    file = tmp_path / "a.txt"
    texts = [str(number) * 10000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(file, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts and list(tmp_path.iterdir()) == [file]


def test_a_writer_waits_for_another_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "TURNS", 3)
    descriptor = create(tmp_path / ".a.txt.cfgsafe-new")
    with pytest.raises(InputError, match="a.txt: cannot be written .another process is writing it."):
        write_text(tmp_path / "a.txt", "new")
    os.close(descriptor)
    write_text(tmp_path / "a.txt", "new")


def test_a_full_disk_stops_a_log_and_costs_no_answer(tmp_path):
    """The row that does not fit leaves nothing behind; the next run goes on where this one stopped."""
    path = tmp_path / "answers.jsonl"
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = ran.stdout.splitlines()
    assert [line[:1] for line in lines] == ["3", "4", "5"] and len(path.read_bytes()) <= 230
    assert lines[0] == (
        f"3 {path}: cannot be written (File too large); what is in it stays, mend that and run again"
    )
    assert ran.stderr == f"{path}: 3 answers were not saved, and will be asked for again\n"
    assert list(read_answers(path)) == ["0", "1", "2"] and path.read_text().endswith("\n")
    with AnswerLog(path) as log:
        log.keep("3", Answer("y"))
    assert list(read_answers(path)) == ["0", "1", "2", "3"]


def test_answers_that_could_not_be_written_are_tried_again(tmp_path, capsys):
    """Those of running requests come after the first failure; there may be space again by then."""
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path) as log:
        file, log._log._file = log._log._file, open("/dev/full", "ab", buffering=0)
        for key in ("a", "b"):
            with pytest.raises(InputError, match="No space left on device"):
                log.keep(key, Answer("x"))
        log._log._file.close()
        log._log._file = file
        log.keep("c", Answer("x"))
    assert list(read_answers(path)) == ["a", "b", "c"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("path", ["/dev/full", "{}/file/x", "{}/folder"])
def test_a_log_that_cannot_be_written_is_one_line(tmp_path, path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = path.format(tmp_path)
    with pytest.raises(InputError, match=f"^{path}: cannot be written"), Log(Path(path)) as log:
        log.add({"step": 1})


@pytest.mark.parametrize(
    "tail", ['{"key": "b", "answer": "half', '{"key"', "{", "\0\0\0", '{"key": "b", "ans\0\0']
)
def test_a_row_that_a_crash_cut_short_is_left_out_and_goes_with_the_next_row(tmp_path, tail):
    path = tmp_path / "answers.jsonl"
    row = '{"key": "a", "answer": "x", "finish_reason": ""}\n'
    for before in ("", row):
        path.write_text(before + tail)
        assert list(read_answers(path)) == (["a"] if before else [])
        assert path.read_text() == before + tail, "reading changes nothing"
        with AnswerLog(path) as log:
            log.keep("c", Answer("y"))
        assert path.read_text() == before + row.replace('"a"', '"c"').replace('"x"', '"y"')


def test_a_row_without_its_newline_counts(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "answer": "x"}')
    with AnswerLog(path) as log:
        log.keep("b", Answer("y"))
    assert list(read_answers(path)) == ["a", "b"]


@pytest.mark.parametrize("text", ["years of work", '{"a": 1}\n{"half', '["a"]', '{"answer": "x"}', "a\nb"])
def test_a_file_that_is_no_log_is_refused_and_not_touched(tmp_path, text):
    """The last line of a text often has no newline: that does not make it the half of a row."""
    path = tmp_path / "thesis.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"thesis.txt:\d+: "):
        AnswerLog(path)
    with pytest.raises(InputError, match=r"thesis.txt:\d+: "):
        keep_steps(path, "step", 3)
    assert path.read_text() == text


def test_a_kill_while_steps_are_dropped_leaves_the_log_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", str)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step} for step in range(1, 6)]

    def check(moment):
        found = [row for _, row in read_log(path, "step")]
        assert found in (rows, rows[:2]), moment

    for row in rows:
        with Log(path) as log:
            log.add(row)
    assert every_moment(partial(keep_steps, path, "step", 2), check) > 10
    assert [row for _, row in read_log(path, "step")] == rows[:2]
    with pytest.raises(InputError, match="metrics.jsonl:1: 'step' must be a number"):
        path.write_text('{"step": "two"}\n')
        keep_steps(path, "step", 2)
