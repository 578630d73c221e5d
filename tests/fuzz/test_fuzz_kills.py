"""Processes that write are killed at random: each folder, file and log is the old or the new, never half."""

import json
import os
import signal
import time
import traceback
from pathlib import Path

import pytest

from cfgsafe.blue.resume import keep_steps
from cfgsafe.errors import InputError
from cfgsafe.files import Answer, AnswerLog, Log, make_folder, read_answers, read_log, write_text
from cfgsafe.folders import lock, new_folder

pytestmark = pytest.mark.slow
NAMES = ("a.json", "b.json", "inside/c.json")
LONGEST = 0.05  # seconds until the kill


def write_on(place: Path, own: str, number: int) -> None:
    """Write into `place` until the kill: numbers that rise, in everything; logs of its own."""
    make_folder(place)
    text = "x" * (number % 7 * 3000)
    rows = read_log(place / f"{own}.jsonl", "step")
    with AnswerLog(place / f"answers-{own}.jsonl") as answers:
        for step in range(len(rows) + 1, 10**9):
            content = json.dumps([number, step, text])
            try:
                with new_folder(place / "o", replaces=("*",)) as temporary:
                    (temporary / "inside").mkdir()
                    for name in NAMES:
                        (temporary / name).write_text(content)
            except InputError as error:
                assert "writes there" in str(error)  # the other process does
            write_text(place / "file.json", content)
            with Log(place / f"{own}.jsonl") as log:
                log.add({"step": step, "text": text})
            answers.keep(f"{number} {step}", Answer(text))
            if step % 5 == 0:
                keep_steps(place / f"{own}.jsonl", "step", step - 1)
                with Log(place / f"{own}.jsonl") as log:
                    log.add({"step": step, "text": text})


def start(place: Path, own: str, number: int, sync: bool) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if not sync:
            os.fsync = str  # more kills in the same time
        write_on(place, own, number)
    except BaseException:
        traceback.print_exc()  # pytest shows it
    finally:
        os._exit(1)


def check(place: Path) -> None:
    """Everything in `place` is whole, and the next run clears the rest."""
    make_folder(place)
    if (place / "o").exists():
        contents = {(place / "o" / name).read_text() for name in NAMES}
        assert len(contents) == 1 and len(json.loads(contents.pop())) == 3
    if (place / "file.json").exists():
        assert len(json.loads((place / "file.json").read_text())) == 3
    for own in ("one", "two"):
        steps = [row["step"] for _, row in read_log(place / f"{own}.jsonl", "step")]
        assert steps == list(range(1, len(steps) + 1))
        read_answers(place / f"answers-{own}.jsonl")
    allowed = {"o", "file.json", "one.jsonl", "two.jsonl", "answers-one.jsonl", "answers-two.jsonl"}
    assert {path.name for path in place.iterdir()} <= allowed
    with lock(place), lock(place / "o"):
        pass


def test_fuzz_kills(cases, tmp_path):
    """Old or new is certain where a folder or file was once written: it never goes missing again."""
    place, seen, written = tmp_path / "runs", {}, set()
    for number, rng in enumerate(cases):
        owners = rng.sample(("one", "two"), rng.choice((1, 2)))
        children = [start(place, own, number, rng.random() < 0.3) for own in owners]
        for child in rng.sample(children, len(children)):
            time.sleep(rng.uniform(0, LONGEST))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "it ended by an exception of its own"
        if place.exists():
            check(place)
            there = {path.name for path in place.iterdir()}
            assert written <= there, f"{written - there} went missing"
            written |= there
            answers = {own: read_answers(place / f"answers-{own}.jsonl") for own in ("one", "two")}
            for own, found in answers.items():
                assert set(seen.get(own, ())) <= set(found), "an answer was lost"
                seen[own] = found
        if number % 20 == 19:  # so that logs stay short
            for path in place.glob("*.jsonl"):
                path.unlink()
            seen, written = {}, set()


def test_fuzz_kills_of_a_folder_that_is_made_by_two_renames(cases, tmp_path, monkeypatch):
    """Where names cannot be exchanged, the folder may be missing until the next run gives it back."""

    def rename(path, target, real=Path.rename):
        real(path, target)
        time.sleep(0.002)  # so that kills hit the moment between the two

    monkeypatch.setattr("cfgsafe.folders.EXCHANGE", 1 << 20)  # a flag that renameat2 refuses
    monkeypatch.setattr(Path, "rename", rename)
    place = tmp_path / "runs"
    for number, rng in enumerate(cases):
        child = start(place, "one", number, False)
        time.sleep(rng.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if place.exists():
            was = (place / "o").exists() or (place / ".o.cfgsafe-old").exists()
            check(place)
            assert (place / "o").exists() or not was
        if number % 20 == 19:
            for path in place.glob("*.jsonl"):
                path.unlink()
