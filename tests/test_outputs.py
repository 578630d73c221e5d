"""What a command writes is never what it reads, nor a device: every command, input and kind of link."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eval as measuring
import train
from cfgsafe import cli
from cfgsafe.bench.__main__ import BENCHES
from cfgsafe.errors import InputError
from cfgsafe.fields import declared
from cfgsafe.outputs import File, Folder, Input, Output, guard

SCRIPTS = {"train": train.STAGES, "eval": measuring.COMMANDS, "bench": BENCHES}
OPTIONS = {}
for script, commands in SCRIPTS.items():
    OPTIONS |= {f"{script} {name}": options for name, (options, _) in commands.items()}
NO_OUTPUT = {"eval canaries", "eval detectors", "eval demo-models"}
NAMED = {("eval attack", "attacker"), ("eval attack", "attacks"), ("eval sweep", "models")}  # NAME=PATH
ATTACKED = {("train attacker", "model"), ("eval attack", "model")}


def output_of(options_of: type) -> tuple[str, Output]:
    """The name of the field of the one output of a command, and what it declares."""
    ((name, (output,)),) = [pair for pair in declared(options_of, Output) if pair[1]]
    return name, output


def inputs_of(options_of: type) -> list[str]:
    return [name for name, found in declared(options_of, Input) if found]


CASES = []
for command, options_of in OPTIONS.items():
    if command not in NO_OUTPUT:
        CASES += [(command, name) for name in inputs_of(options_of)]


def build(command: str, **values: str) -> object:
    """Options with these values and, where nothing has a default, names of nothing."""
    options_of = OPTIONS[command]
    given = {}
    for field in dataclasses.fields(options_of):
        bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = values.get(field.name, "nothing-of-that-name" if bare else None)
        if value is not None:
            several = str(field.type).startswith(("tuple", "list"))
            text = f"n={value}" if (command, field.name) in NAMED else value
            given[field.name] = (text,) if several else text
    if command == "train attacker":
        given["stage"] = "sft"
    return options_of(**given)


def refused(options: object, monkeypatch, capsys) -> str:
    """The one line with which a command ends that may not run."""
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        cli.run_command(lambda options: pytest.fail("it ran"), options)
    stdout, stderr = capsys.readouterr()
    assert stop.value.code == 2 and stdout == "" and len(stderr.splitlines()) == 1
    return stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_command_that_writes_declares_what():
    with_one = {command for command in OPTIONS if any(dict(declared(OPTIONS[command], Output)).values())}
    assert set(OPTIONS) - with_one == NO_OUTPUT


@pytest.mark.parametrize("link", ["itself", "symbolic link", "hard link"])
@pytest.mark.parametrize(("command", "source"), CASES)
def test_no_command_overwrites_its_input(tmp_path, monkeypatch, capsys, command, source, link):
    name, output = output_of(OPTIONS[command])
    out = tmp_path / "out"
    if isinstance(output, Folder) and link != "hard link":
        given = tmp_path / "given"
        given.mkdir()
        (given / "config.json").write_text("{}")
        link == "itself" or out.symlink_to(given)
        out = given if link == "itself" else out
    elif isinstance(output, Folder):
        given = tmp_path / "given.jsonl"
        given.write_text("{}\n")
        out.mkdir()
        if not output.writes:
            pytest.skip("nothing of this command can be a link to a file")
        os.link(given, out / output.writes[0].replace("*", "1"))
    else:
        given = tmp_path / "given"
        given.mkdir()
        file = given / "results.json"
        file.write_text("{}\n")
        given = given if source in ("run", "runs") else file
        if link == "itself":
            out = file
        elif link == "symbolic link":
            out.symlink_to(file)
        else:
            os.link(file, out)
    before = contents(tmp_path)
    line = refused(build(command, **{source: str(given), name: str(out)}), monkeypatch, capsys)
    flag = "--target" if (command, source) in ATTACKED else f"--{source.replace('_', '-')}"
    assert "would overwrite" in line and flag in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", sorted(set(OPTIONS) - NO_OUTPUT))
def test_an_output_is_a_file_or_a_folder(tmp_path, monkeypatch, capsys, command):
    name, output = output_of(OPTIONS[command])
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    wrong = ["", "/dev/null", "/dev/stdout", "/dev/fd/1", tmp_path / "pipe", tmp_path / "file" / "x"]
    wrong += [tmp_path / ("x" * 240), tmp_path / "loop", tmp_path / ("x/" * 3000)]
    wrong += [tmp_path / "file"] if isinstance(output, Folder) else []
    wrong += [tmp_path / "folder"] if isinstance(output, File) else []
    before = sorted(tmp_path.rglob("*"))
    for value in wrong:
        line = refused(build(command, **{name: str(value)}), monkeypatch, capsys)
        assert line.startswith(f"error: --{name}")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_what_is_only_read_from_the_folder_that_is_written_may_stay(tmp_path):
    """Training from pairs in --out, tuning on attacks in --out, a table of the run that it is put beside."""
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "attacks-gfn.jsonl").write_text("")
    (tmp_path / "results.json").write_text("")
    (tmp_path / "report.html").write_text("of an earlier call")
    here = str(tmp_path)
    for options in (
        build("train orpo", pairs=f"{here}/pairs.jsonl", out=here),
        build("train safety", attacks=f"{here}/attacks-gfn.jsonl", out=here),
        build("eval table", runs=here, out=f"{here}/table.md"),
        build("eval report", run=here, out=f"{here}/report.html"),
        build("train redteam-demo", blue=f"{here}/blue", out=here),
        build("train attacker", attacker=here, out=f"{here}/gfn"),
    ):
        with guard(options):
            pass


def test_an_adapter_of_the_same_run_is_not_trained_away(tmp_path):
    (tmp_path / "epoch-3").mkdir()
    options = build("train orpo", init_adapter=f"{tmp_path}/epoch-3", out=str(tmp_path))
    with pytest.raises(InputError, match="would overwrite .*/epoch-3, which --init-adapter reads"):
        with guard(options):
            pass


def test_an_input_inside_a_folder_that_is_replaced_counts(tmp_path):
    (tmp_path / "merged" / "adapter").mkdir(parents=True)
    options = build("train merge", adapter=f"{tmp_path}/merged/adapter/best", out=f"{tmp_path}/merged")
    (tmp_path / "merged" / "adapter" / "best").mkdir()
    with pytest.raises(InputError, match="would overwrite .*/best, which --adapter reads"):
        with guard(options):
            pass


def test_the_files_beside_an_output_count(tmp_path):
    (tmp_path / "p-test.jsonl").write_text("{}\n")
    options = build("train pairs", dialogues=f"{tmp_path}/p-test.jsonl", out=f"{tmp_path}/p.jsonl")
    with pytest.raises(InputError, match="would overwrite .*/p-test.jsonl, which --dialogues reads"):
        with guard(options):
            pass


@pytest.mark.parametrize("command", ["train orpo", "eval utility"])
def test_two_processes_do_not_write_one_output(tmp_path, monkeypatch, capsys, command):
    out = tmp_path / "out"
    holds = f"from cfgsafe.folders import lock\nwith lock({str(out)!r}):\n    print('', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holds], stdin=-1, stdout=-1, text=True) as other:
        other.stdout.readline()
        line = refused(build(command, out=str(out)), monkeypatch, capsys)
        other.communicate("\n")
    assert f"process {other.pid}" in line and "writes there" in line
    with guard(build(command, out=str(out))):
        pass
