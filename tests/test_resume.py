"""A killed run goes on to the identical result: kill -9 at random moments, SIGTERM, other data."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_identity import overwrite

from cfgsafe.blue import loop, orpo, resume
from cfgsafe.blue.orpo import Options
from cfgsafe.errors import CfgsafeError, InputError
from cfgsafe.files import write_jsonl

ROOT = Path(__file__).parent.parent
STEPS = 24


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for n in range(12):
        rows.append({"prompt": f"Say {n}", "chosen": f" one {n * n}", "rejected": " two" * (n % 5 + 1)})
    write_jsonl(path, rows)
    return str(path)


def options(checkpoint: str, pairs: str, out: Path, **changes) -> Options:
    settings = {"lr": 1e-2, "epochs": 4, "lora_dropout": 0.1, "save_every": 5, "eval_pairs": pairs}
    return Options(checkpoint, pairs, str(out), **{**settings, **changes})


def command(checkpoint: str, pairs: str, out: Path) -> list[str]:
    paths = ["--model", checkpoint, "--pairs", pairs, "--eval-pairs", pairs, "--out", str(out)]
    settings = "--lr 1e-2 --epochs 4 --lora-dropout 0.1 --save-every 5".split()
    return [sys.executable, "train.py", "orpo", *paths, *settings]


def read_log(path: Path) -> list[dict]:
    """Its lines without the values that depend on the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("peak_memory_bytes", None)
    return lines


def outcome(out: Path) -> tuple:
    """What a run leaves: the adapters and the logs."""
    adapters = sorted(out.glob("epoch-*/adapter_model.safetensors"))
    weights = {path.parent.name: load_file(path) for path in adapters}
    return weights, read_log(out / "metrics.jsonl"), read_log(out / "eval.jsonl")


def assert_same(one: Path, other: Path) -> None:
    (weights, *logs), (expected, *wanted) = outcome(one), outcome(other)
    assert logs == wanted and weights.keys() == expected.keys()
    for epoch in expected:
        for key, weight in expected[epoch].items():
            assert torch.equal(weights[epoch][key], weight), (epoch, key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, checkpoint, pairs) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    orpo.run(options(checkpoint, pairs, out))
    assert not resume.states(out)
    return out


def start(checkpoint: str, pairs: str, out: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command(checkpoint, pairs, out), *more], cwd=ROOT, env=environment, **pipes)


def wait_for_step(out: Path, step: int) -> None:
    path, deadline = out / "metrics.jsonl", time.time() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.time() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(tmp_path, checkpoint, pairs, uninterrupted, kills):
    """Kills within one run, each later than the one before, each resumed."""
    out = tmp_path / "o"
    for moment in sorted(random.sample(range(1, STEPS), kills)):
        process = start(checkpoint, pairs, out, "--resume")
        wait_for_step(out, moment)
        process.kill()
        process.wait()
    last = start(checkpoint, pairs, out, "--resume")
    assert last.wait() == 0, last.stderr.read()
    assert_same(out, uninterrupted)


def test_every_saved_state_leads_to_the_same_end(tmp_path, checkpoint, pairs, uninterrupted, monkeypatch):
    """Also when the crash comes while a state is written, or right after an epoch."""
    for moment in (3, 6, 10, 12, 23):
        out, saved = tmp_path / str(moment), []

        def crash(*arguments, moment=moment, real=resume.save, saved=saved):
            saved.append(arguments[1])
            if len(saved) == moment:
                raise RuntimeError("the power is gone")
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(resume, "save", crash)
            with pytest.raises(RuntimeError):
                orpo.run(options(checkpoint, pairs, out, save_every=1))
        orpo.run(options(checkpoint, pairs, out, save_every=1, resume=True))
        assert_same(out, uninterrupted)


def test_a_crash_while_saving_leaves_the_state_before(
    tmp_path, checkpoint, pairs, uninterrupted, monkeypatch
):
    out = tmp_path / "o"

    def torn(tensors, path):
        if "state-000010" in str(path):
            Path(path).write_bytes(b"half")
            raise RuntimeError("the power is gone")
        real(tensors, path)

    real = resume.save_file
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", torn)
        with pytest.raises(RuntimeError):
            orpo.run(options(checkpoint, pairs, out))
    assert [path.name for path in resume.states(out)] == ["state-000005"]
    orpo.run(options(checkpoint, pairs, out, resume=True))
    assert_same(out, uninterrupted)


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, checkpoint, pairs, uninterrupted):
    out = tmp_path / "o"
    process = start(checkpoint, pairs, out, "--save-every", "1000")
    wait_for_step(out, 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with --resume" in errors.splitlines()[-1]
    assert len(resume.states(out)) == 1
    orpo.run(options(checkpoint, pairs, out, resume=True))
    assert_same(out, uninterrupted)


def test_a_finished_run_is_left_alone(tmp_path, checkpoint, pairs, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")}
    orpo.run(options(checkpoint, pairs, uninterrupted, resume=True))
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")}


def test_another_run_cannot_be_resumed(tmp_path, checkpoint, pairs):
    out = tmp_path / "o"
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(orpo, "write_adapter")
        with pytest.raises(NameError):
            orpo.run(options(checkpoint, pairs, out, save_every=2))
    with pytest.raises(InputError, match="--lr 0.5: the run in .* began with 0.01"):
        orpo.run(options(checkpoint, pairs, out, resume=True, lr=0.5))
    copy = tmp_path / "other.jsonl"
    copy.write_text(Path(pairs).read_text().replace("Say 3", "Say 4"))
    with pytest.raises(InputError, match="--pairs.*: holds something else than when the run in .* began"):
        orpo.run(options(checkpoint, str(copy), out, resume=True))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("model", "model.safetensors"),
        ("init-adapter", "adapter_model.safetensors"),
        ("pairs", ""),
        ("eval-pairs", ""),
    ],
)
def test_new_contents_at_the_same_path_are_noticed(
    tmp_path, checkpoint, pairs, uninterrupted, monkeypatch, finished, option, file
):
    """Of the same size and date, and also after the last step: the adapters there belong to the old files."""
    paths = {name: tmp_path / name for name in ("model", "init-adapter", "pairs", "eval-pairs")}
    shutil.copytree(checkpoint, paths["model"])
    shutil.copytree(uninterrupted / "epoch-1", paths["init-adapter"])
    for name in ("pairs", "eval-pairs"):
        shutil.copy(pairs, paths[name])
    given = {"eval_pairs": str(paths["eval-pairs"]), "init_adapter": str(paths["init-adapter"])}
    settings = options(
        str(paths["model"]), str(paths["pairs"]), tmp_path / "o", epochs=1, save_every=2, **given
    )

    def torn(*_):
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch, nullcontext() if finished else pytest.raises(RuntimeError):
        if not finished:
            patch.setattr(orpo, "report", torn)
        orpo.run(settings)
    orpo.run(replace(settings, resume=True, out=str(shutil.copytree(tmp_path / "o", tmp_path / "copy"))))
    changed = paths[option] / file
    other = changed.read_bytes()
    overwrite(changed, other.replace(b"Say 3", b"Say 4") if b"Say 3" in other else other[:-1] + b"A")
    with pytest.raises(
        InputError, match=f"^--{option}.*: holds something else than when the run in .* began"
    ):
        orpo.run(replace(settings, resume=True))


# Saved states and logs that are damaged: one line that says what to do.


@pytest.fixture(scope="module")
def killed(tmp_path_factory, checkpoint, pairs) -> Path:
    """The folder of a run that ended after step 7, with the state of step 5."""
    out = tmp_path_factory.mktemp("killed") / "o"
    real = loop.take_step

    def dies(run, step, lr, what):
        if what == "step 8":
            raise RuntimeError("the power is gone")
        return real(run, step, lr, what)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(loop, "take_step", dies)
        orpo.run(options(checkpoint, pairs, out))
    return out


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def make_infinite(path: Path) -> None:
    """Spoil a moment of the optimiser, and write its digest anew."""
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if name.endswith(".exp_avg"))[0, 0] = torch.inf
    save_file(tensors, path)
    edit_json(path.with_name("state.json"), files=resume.digests(path.parent))


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (
            "state-000005/state.safetensors",
            cut,
            "state.safetensors: not what was saved there; delete .*000005 ",
        ),
        (
            "state-000005/state.safetensors",
            Path.unlink,
            "state.safetensors: not what was saved there; delete ",
        ),
        ("state-000005/state.safetensors", make_infinite, "exp_avg holds a number that is not finite"),
        (
            "state-000005/state.json",
            Path.unlink,
            r"state.json: cannot be read \(No such file.*; delete .*000005",
        ),
        ("state-000005/state.json", cut, "state.json: not JSON"),
        ("state-000005/state.json", partial(Path.write_text, data="[]"), "state.json: damaged"),
        ("state-000005/state.json", partial(edit_json, format=0), "of another version"),
        ("state-000005/state.json", partial(edit_json, step="5"), "state.json: damaged; delete"),
        ("state-000005/state.json", partial(edit_json, step=4), "state.json: is of step 4; delete"),
        ("state-000005/state.json", partial(edit_json, files=None), "state.json: damaged; delete"),
        (
            "state-000005/state.json",
            partial(edit_json, files={}),
            "state.safetensors: not what was saved there",
        ),
        (
            "config.json",
            Path.unlink,
            "config.json: not found, and without it nobody knows what state-000005 ",
        ),
        ("config.json", partial(edit_json, format=None), "config.json: damaged, or of another version"),
        ("config.json", partial(edit_json, contents=[]), "config.json: damaged, or of another version"),
        ("config.json", partial(edit_json, contents={}), "--model .*: holds something else"),
        ("metrics.jsonl", partial(Path.write_text, data="3\n"), "metrics.jsonl:1: a JSON int, not an object"),
        ("metrics.jsonl", partial(Path.write_text, data="{}\n"), "metrics.jsonl:1: 'step' must be a number"),
        (
            "metrics.jsonl",
            partial(Path.write_text, data='{"step": 2}\n{"step": 1}\n'),
            "metrics.jsonl:2: 'step'",
        ),
        ("metrics.jsonl", partial(Path.write_bytes, data=b"\xff\n"), "metrics.jsonl: cannot be read"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path, checkpoint, pairs, killed, file, damage, words):
    out = Path(shutil.copytree(killed, tmp_path / "o"))
    damage(out / file)
    with pytest.raises(CfgsafeError, match=words) as error:
        orpo.run(options(checkpoint, pairs, out, resume=True))
    assert "\n" not in str(error.value)


def test_without_its_damaged_state_a_run_goes_on(tmp_path, checkpoint, pairs, killed, uninterrupted):
    """As the message advises; and a state that a killed process was deleting is none."""
    out = Path(shutil.copytree(killed, tmp_path / "o"))
    (out / "state-000005").rename(out / "state-000005.deleted")
    orpo.run(options(checkpoint, pairs, out, resume=True))
    assert_same(out, uninterrupted)
    assert not list(out.glob("state-*"))


def test_a_state_of_a_gpu_can_be_gone_on_from_without_one(tmp_path, checkpoint, pairs, killed, uninterrupted):
    """--device is free; the GPU's random numbers are then not needed."""
    out = Path(shutil.copytree(killed, tmp_path / "o"))
    file = out / "state-000005" / "state.safetensors"
    save_file({**load_file(file), resume.GPU_RNG: torch.zeros(16, dtype=torch.uint8)}, file)
    edit_json(file.with_name("state.json"), files=resume.digests(file.parent))
    orpo.run(options(checkpoint, pairs, out, resume=True))
    assert_same(out, uninterrupted)


def test_an_option_that_the_run_began_with_cannot_be_left_out(tmp_path, checkpoint, pairs, killed):
    """Its path may change, but the held-out pairs are a part of the run."""
    out = Path(shutil.copytree(killed, tmp_path / "o"))
    with pytest.raises(InputError, match="--eval-pairs: holds something else than when the run in"):
        orpo.run(options(checkpoint, pairs, out, resume=True, eval_pairs=None))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, checkpoint, pairs, monkeypatch):
    """The loss is finite, and the step that follows it spoils the weights."""
    real = loop.take_step

    def spoils(run, step, lr, what):
        values = real(run, step, lr, what)
        if what == "step 5":
            next(iter(run.parameters.values())).data[0, 0] = torch.nan
        return values

    monkeypatch.setattr(loop, "take_step", spoils)
    with pytest.raises(InputError, match="after step 5 .*lora_A.* not finite; start anew with a lower --lr"):
        orpo.run(options(checkpoint, pairs, tmp_path / "o"))
    assert not resume.states(tmp_path / "o")


def test_a_log_is_cut_without_touching_what_stays(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step":1,  "x": 0.10}\n\n{"step":2}\n{"step":2, "y": 1}\n{"step":3}\n{"st')
    assert resume.keep_steps(path, "step", 2) == 2
    assert path.read_bytes() == b'{"step":1,  "x": 0.10}\n{"step":2}\n{"step":2, "y": 1}\n'
    assert resume.keep_steps(path, "step", 0) == 0 and path.read_bytes() == b""
    assert resume.keep_steps(tmp_path / "none", "step", 3) == 0


def test_an_earlier_run_stays_until_a_new_one_has_ended(
    tmp_path, checkpoint, pairs, uninterrupted, monkeypatch
):
    """It is as it was after an error at the start, and stands aside after one later on."""
    out = Path(shutil.copytree(uninterrupted, tmp_path / "o"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(pairs).read_text() + "{")
    with pytest.raises(InputError):
        orpo.run(options(checkpoint, pairs, out, eval_pairs=str(broken)))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def torn(out, epoch, values, real=orpo.report):
        if epoch == 2:
            raise RuntimeError("the power is gone")
        real(out, epoch, values)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(orpo, "report", torn)
        orpo.run(options(checkpoint, pairs, out))
    assert_same(out / "earlier", uninterrupted)
    orpo.run(options(checkpoint, pairs, out, resume=True))
    assert_same(out, uninterrupted)
    assert not (out / "earlier").exists()
