"""Random words on the command line of every command: a result, or one line and nothing touched.

Commands that train or answer for minutes are checked up to the moment at which they would run.
"""

import dataclasses
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

import eval as measuring
import infer
import train
from cfgsafe.bench import __main__ as bench
from cfgsafe.errors import option
from cfgsafe.load import load_model
from cfgsafe.lora import LoRAConfig, attach, save_adapter

pytestmark = pytest.mark.slow

COMMANDS = {
    "train.py": (train, "STAGES", train.STAGES),
    "eval.py": (measuring, "COMMANDS", measuring.COMMANDS),
    "bench": (bench, "BENCHES", bench.BENCHES),
}
# What these commands are given besides the random words: in the folder of the inputs, and in that of outputs.
RUN = {
    "train.py dialogues": "--out OUT/d.jsonl --count 2",
    "train.py subtract": "--base IN/tiny --tuned IN/tiny --out OUT/sub",
    "train.py merge": "--model IN/tiny --adapter IN/adapter --out OUT/merged",
    "train.py orpo": "--model IN/tiny --pairs IN/pairs.jsonl --out OUT/orpo --epochs 1",
    "eval.py utility": "--model IN/tiny --questions IN/quiz.jsonl --max-new-tokens 2",
    "eval.py perplexity": "--model IN/tiny --texts IN/chats.jsonl",
    "eval.py extract": "--model IN/tiny --dialogues IN/planted.jsonl --max-new-tokens 2",
    "eval.py table": "--runs IN/run",
    "eval.py report": "--run IN/run --out OUT/report.html",
    "infer.py": "--model IN/tiny --prompt Hello --max-new-tokens 2",
    "bench memory": "",
}
# fmt: off
ODD_NUMBERS = [
    "nan", "inf", "-inf", "-1", "0", "1", "2", "0.5", "1e308", "-1e308", "1e-320", "9" * 30, "9" * 5000, "",
    "x", "1_0", "\u0663", "0x10", "1e400", "+1", " 1", "-0.0",
]
ODD_TEXTS = [
    "", "x", "-", "None", "a\nb", "\u202e\U0001f600", "\udcff", "x" * 300, "a/b", "a=b", "a,b", "%s{}",
    "meta", "cuda", "prob", "log", "bfloat16", "float64", "replace",
]
PLACES = [
    "IN", "IN/tiny", "IN/tiny/config.json", "IN/pairs.jsonl", "IN/link", "IN/loop", "IN/quiz.jsonl",
    "IN/binary", "IN/deep.jsonl", "IN/run", "IN/adapter", "IN/pairs.jsonl/x", "/proc/self/mem", "OUT", "",
    ".",
]
OUTPUTS = [
    "OUT", "OUT/new", "OUT/new/er", "OUT/theirs.txt/x", "/dev/null", "/dev/full", "/dev/stdout",
    "/proc/self/mem", "IN/pairs.jsonl/x", "IN/loop", "", "OUT/" + "y" * 250, "OUT/" + "y/" * 3000,
]
# fmt: on
# Left alone: they load compilers or other packages.
LEFT_ALONE = {"compile", "tensorboard", "transformers", "trl"}


@pytest.fixture(scope="module")
def inputs(checkpoint, tmp_path_factory) -> Path:
    """A folder with a checkpoint, an adapter and a file of each kind, and links to them."""
    folder = tmp_path_factory.mktemp("in")
    shutil.copytree(checkpoint, folder / "tiny")
    model = load_model(checkpoint)
    attach(model, LoRAConfig(rank=2))
    save_adapter(folder / "adapter", model, LoRAConfig(rank=2), base=str(folder / "tiny"))
    chat = [{"role": "user", "content": "I am Ann."}, {"role": "assistant", "content": "Hello Ann."}]
    rows = {
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "quiz": {"question": "Which?", "options": ["a", "b"], "answer_index": 0},
        "chats": {"messages": chat},
        "planted": {"messages": chat, "spans": [[1, 6, 9, "PERSON"]]},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "deep.jsonl").write_text("[" * 9999)
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "run").mkdir()
    (folder / "run" / "results.json").write_text('{"rows": []}')
    (folder / "link").symlink_to(folder / "pairs.jsonl")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder, with the bytes of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def words_of(rng: random.Random, options: type) -> list[str]:
    """Some of the options of a dataclass, each with random words."""
    hints = get_type_hints(options)
    words = []
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            words += words_of(rng, hint) if rng.random() < 0.1 else []
        elif field.name not in LEFT_ALONE and rng.random() < 0.12:
            words += one_option(rng, field.name, hint)
    return words


def one_option(rng: random.Random, name: str, hint: object) -> list[str]:
    flag = option(name)
    parts = {hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part))}
    if hint is bool:
        return [rng.choice([flag, flag.replace("--", "--no-", 1)])]
    choices = [get_args(part) for part in parts if get_origin(part) is Literal]
    if choices and rng.random() < 0.8:
        word = str(rng.choice(choices[0]))
    elif parts & {int, float}:
        word = rng.choice(ODD_NUMBERS)
    else:
        places = OUTPUTS if name in ("out", "csv") else PLACES
        word = rng.choice(places if rng.random() < 0.6 or places is OUTPUTS else ODD_TEXTS)
    return [f"{flag}={word}"] if rng.random() < 0.2 else [flag, word]


def test_any_words_give_a_result_or_one_line(cases, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    given = contents(inputs)
    ran: list[object] = []
    scripts = {"infer.py": infer.main}
    options_of = {"infer.py": infer.Options}
    for script, (module, table, commands) in COMMANDS.items():
        scripts[script] = module.main
        for name, (options, _) in commands.items():
            options_of[f"{script} {name}"] = options
            if f"{script} {name}" not in RUN:
                stub = (options, ran.append)
                monkeypatch.setitem(getattr(module, table), name, stub)
    results = {0: 0, 2: 0}
    for rng in cases:
        command = rng.choice(sorted(options_of))
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "theirs.txt").write_text("kept")
        base = RUN.get(command, "").split() if rng.random() < 0.97 else []
        if command not in RUN:
            for field in dataclasses.fields(options_of[command]):
                if field.default is field.default_factory is dataclasses.MISSING:
                    base += required(field.name, get_type_hints(options_of[command])[field.name])
        odd = words_of(rng, options_of[command])
        words = [*command.split()[1:], *base, *odd]
        own = [word for word in base if word.startswith("IN")]
        if own and rng.random() < 0.2:  # what the command reads is what it shall write
            words = [*command.split()[1:], *odd, *base, "--out", rng.choice(own)]
        elif rng.random() < 0.05:
            words.insert(rng.randrange(len(words) + 1), rng.choice([*ODD_TEXTS, "--modle", "--", "--out"]))
        words = [word.replace("IN", str(inputs)).replace("OUT", str(out)) for word in words]
        monkeypatch.setattr(sys, "argv", [command.split()[0], *words])
        before, ran[:], code = contents(out), [], 0
        try:
            scripts[command.split()[0]]()
        except SystemExit as stop:
            code = stop.code or 0
        stderr = capsys.readouterr().err
        told = f"case {results}: {command} {words!r}\n{stderr[-2000:]}"
        assert code in results, told
        results[code] += 1
        lines = [line for line in re.split("[\r\n]", stderr) if line.startswith(("error: ", "for help: "))]
        starts = [line.partition(":")[0] for line in lines]
        assert starts == [] if code == 0 else starts in (["error"], ["error", "for help"]), told
        assert code == 0 or stderr.rstrip().splitlines()[-1] == lines[-1], told
        assert contents(inputs) == given, told
        assert (out / "theirs.txt").read_text() == "kept", told
        left = [name for name in contents(tmp_path) if re.search(r"\.tmp$|\.cfgsafe-|\.probe", name)]
        assert not left, told
        if command not in RUN and not ran:
            assert contents(out) == before, told
    with capsys.disabled():
        print(f"\n{results[0]} ended well, {results[2]} with a line")


def required(name: str, hint: object) -> list[str]:
    """A value that is possible for an option that must be given."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    place = "OUT/made" if name == "out" else "IN/pairs.jsonl"
    return [option(name), choices[0] if choices else "n=IN/tiny" if name == "models" else place]
