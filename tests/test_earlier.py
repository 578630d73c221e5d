"""What an earlier run left in a folder, while a new one runs there, fails or is killed."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from kills import every_moment

from cfgsafe.blue.earlier import EARLIER, replacing
from cfgsafe.errors import InputError
from cfgsafe.files import make_folder

NAMES = ("epoch-*", "metrics.jsonl", "config.json", "answers.jsonl")
FILES = ("epoch-1/adapter.safetensors", "epoch-2/adapter.safetensors", "metrics.jsonl", "config.json")


def write(out: Path, text: str, files=FILES) -> None:
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


def is_whole(out: Path, text: str) -> bool:
    return all((out / name).exists() and (out / name).read_text() == text for name in FILES)


def run(out: Path, text: str, files=FILES, *, fails=False, resumed=False) -> None:
    make_folder(out)
    with replacing(out, NAMES, resumed=resumed):
        assert resumed or (out / EARLIER).exists() or not list(out.glob("epoch-*"))
        with replacing(out, ("metrics.jsonl",), resumed=False):  # a stage runs another in its folder
            write(out, text, files)
        if fails:
            raise InputError("no")


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder of a run that has ended well, with answers and a file that is not the run's."""
    run(tmp_path / "o", "old")
    (tmp_path / "o" / "answers.jsonl").write_text("paid")
    (tmp_path / "o" / "notes.txt").write_text("mine")
    return tmp_path / "o"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_earlier_run_goes_when_the_new_one_has_ended(out):
    run(out, "new")
    assert is_whole(out, "new") and len(list(out.iterdir())) == 6
    assert (out / "answers.jsonl").read_text() == "paid" and (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("files", [(), ("config.json",), ("config.json", "metrics.jsonl")])
def test_a_run_that_fails_at_its_start_leaves_all_as_it_was(out, files, capsys):
    before = contents(out)
    with pytest.raises(InputError):
        run(out, "new", files, fails=True)
    assert contents(out) == before and capsys.readouterr().err == ""


def test_a_run_that_fails_later_leaves_the_earlier_one_aside_and_says_where(out, capsys):
    with pytest.raises(InputError):
        run(out, "new", FILES[:1], fails=True)
    assert is_whole(out / EARLIER, "old") and (out / FILES[0]).read_text() == "new"
    assert capsys.readouterr().err == f"{out}: what the earlier run left there is in {out / EARLIER}\n"
    with pytest.raises(InputError):
        run(out, "resumed", FILES[:2], fails=True, resumed=True)
    assert is_whole(out / EARLIER, "old") and (out / FILES[0]).read_text() == "resumed"
    run(out, "new", resumed=True)
    assert is_whole(out, "new") and not (out / EARLIER).exists()


def test_a_new_run_meets_nothing_of_one_that_failed(out):
    before = contents(out)
    with pytest.raises(InputError):
        run(out, "failed", fails=True)
    with replacing(out, NAMES, resumed=False):
        assert {path.name for path in out.iterdir()} == {EARLIER, "answers.jsonl", "notes.txt"}
        write(out, "new")
    assert is_whole(out, "new")
    with pytest.raises(InputError):
        run(out, "failed", fails=True)
    with pytest.raises(InputError):
        run(out, "failed again", (), fails=True)
    assert contents(out) == before | dict.fromkeys(FILES, "new")


@pytest.mark.parametrize("then", ["fails at once", "is resumed", "ends"])
def test_a_kill_at_any_moment_loses_neither_run(out, then):
    before = contents(out)

    def check(moment):
        ended = is_whole(out, "new")
        if then == "fails at once":
            with pytest.raises(InputError, match="^no$"):
                run(out, "later", (), fails=True)
            assert ended or is_whole(out, "old") or is_whole(out / EARLIER, "old"), moment
        else:
            run(out, "new", resumed=then == "is resumed")
            assert is_whole(out, "new") and len(list(out.iterdir())) == 6, moment
        kept = {path.name for path in out.iterdir()} & {"answers.jsonl", "notes.txt"}
        assert len(kept) == 2, moment
        shutil.rmtree(out)
        for name, text in before.items():
            write(out, text, (name,))

    assert every_moment(partial(run, out, "new"), check) > 15
