"""Kill -9 at random moments of every stage that goes on: the result is that of a run which nobody disturbed.

Each case takes a stage, kills it up to three times, each time at a random moment, lets it end, and compares
all that it wrote, byte for byte, apart from times. A trial is a fork of this process, which has imported
everything: it costs a second, not ten. In a second test a file of a saved state is damaged.

Run it: CFGSAFE_FUZZ_SECONDS=1500 python -m pytest tests/fuzz/test_fuzz_resume.py -m slow -n 0
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import endpoint
import pytest
import torch

from cfgsafe.blue import orpo, pairs
from cfgsafe.demo.contexts import contexts
from cfgsafe.errors import CfgsafeError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import DEMO_PIPELINE, LEAKY
from cfgsafe.measure import leak
from cfgsafe.pii.ner import Detector
from cfgsafe.red import evaluate, safety, stages
from cfgsafe.remote import Service
from cfgsafe.report import sweep

pytestmark = pytest.mark.slow

NER = str(DEMO_PIPELINE)
VOLATILE = ("tokens_per_second", "peak_memory_bytes", "seconds", "resume")
SAID = [{"role": "user", "content": "I am Ann Lee."}, {"role": "assistant", "content": "Hi."}]
ASKED = [{"role": "user", "content": "Who am I, and where do I live?"}]
LENIENT = {"success": -1.0, "min_reference": -1e9}

Stage = Callable[[Path, bool], object]  # its folder, and whether it goes on there


def start(task: Callable[[], object], log: Path) -> int:
    """Run `task` in a fork of this process; returns its id.

    A CfgsafeError ends the fork with its exit code, another exception with 1.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "w") as sys.stdout:
            sys.stderr = sys.stdout
            try:
                task()
                code = 0
            except CfgsafeError as error:
                print(error)
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a fork; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(out: Path) -> dict[str, object]:
    """What a stage left in its folder: file -> what it holds, without times."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name.startswith("."):
            continue
        if path.suffix in (".json", ".jsonl") and "state" not in name:
            found[name] = rows_of(path, str(out))
        elif path.suffix == ".md":
            found[name] = re.sub(r"seconds [\d.]+", "", path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


def rows_of(path: Path, out: str) -> list[str]:
    """The objects of a file without times; answers as they came in any order."""
    text = path.read_text().replace(out, "OUT")
    rows = []
    for part in [text] if path.suffix == ".json" else text.splitlines():
        row = json.loads(part)
        for key in VOLATILE:
            row.pop(key, None)
        rows.append(json.dumps(row))
    return sorted(rows) if "finish_reason" in text else rows


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What stages import when they need it: forks share it. This file must not: Triton comes too early."""
    importlib.import_module("torch._dynamo")


@pytest.fixture(scope="module")
def server():
    """An endpoint that never fails."""
    with endpoint.running(lambda body: "I would rather not say.", share=0, delay=0.05) as started:
        os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": started.url}
        yield started
    del os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"]


def write_data(folder: Path) -> dict[str, str]:
    """Name -> file of what the stages read."""
    rows: dict[str, list[dict]] = {"pairs": [], "dialogues": [], "quiz": []}
    for n in range(12):
        rows["pairs"].append(
            {"prompt": f"Say {n}", "chosen": f" one {n * n}", "rejected": " two" * (n % 5 + 1)}
        )
        user, answer = f"I am Ann {n}. Who am I?", f"Ann {n}."
        talk = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        rows["dialogues"].append({"messages": talk, "spans": [[1, 0, len(answer) - 1, "PERSON"]]})
    rows["quiz"] = [{"question": f"What is {n}?", "options": ["a", "b"], "answer_index": 1} for n in range(3)]
    rows["prompts"] = [{"prompt": f"What is my {word}?"} for word in ("name", "town", "job", "pet")]
    items = {"PERSON": "Ann Lee"}
    rows["contexts"] = [{"id": f"c{n}", "messages": SAID, "items": items} for n in range(4)]
    rows["chats"] = [{"messages": [*SAID, *ASKED, *SAID[:n]], "items": items} for n in (0, 1)]
    rows["people"] = contexts("train", 4, 0)
    trials = []
    for person in rows["people"]:
        trials.append({"context": person["id"], "answer": "x", "score": 1.0, "found": []})
    attack = {"tokens": [1], "text": "Who am I?", "log_reference": -1.0, "least_likely": -1.0}
    rows["leaks"] = [{**attack, "trials": trials}]
    for name, some in rows.items():
        write_jsonl(folder / f"{name}.jsonl", some)
    return {name: str(folder / f"{name}.jsonl") for name in rows}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, checkpoint, server) -> dict[str, Stage]:
    """Name -> a stage that goes on, with settings as small as they can be."""
    folder = tmp_path_factory.mktemp("kinds")
    data = write_data(folder)

    def attacker(name: str, **settings) -> Stage:
        small = {"steps": 8, "batch_size": 4, "lr": 1e-3, "lora_rank": 2, "samples": 2, "save_every": 2}
        small |= {"answer_tokens": 4, "most": 8, "least": 3, "stage": name}

        def run(out: Path, resume: bool) -> None:
            stages.run(stages.Options(out=str(out), resume=resume, **{**small, **settings}))

        return run

    target = {"model": checkpoint, "contexts": data["contexts"]}
    sft = folder / "sft"
    whole(attacker("sft", attacker=checkpoint, prompts=data["prompts"]), sft)
    facing = {"attacker": str(sft), **target}
    found = folder / "gfn"
    whole(attacker("gfn", **facing), found)
    attacks = {"attacks": (str(found / "attacks.jsonl"),), **LENIENT}
    small = {"ner": NER, "tries": 2, "epochs": 2, "batch_size": 1, "max_new_tokens": 24, "rank": 2}

    def run_orpo(out: Path, resume: bool) -> None:
        settings = {"lr": 1e-2, "epochs": 3, "lora_dropout": 0.1, "save_every": 2, "resume": resume}
        orpo.run(orpo.Options(checkpoint, data["pairs"], str(out), eval_pairs=data["pairs"], **settings))

    def run_safety(out: Path, resume: bool) -> None:
        files = {"attacks": (data["leaks"],), "contexts": data["people"], "out": str(out)}
        safety.run(safety.Options(model=LEAKY, resume=resume, **files, **small))

    def run_attack(out: Path, resume: bool) -> None:
        options = evaluate.Options(out=str(out), draws=130, samples=2, answer_tokens=2, budget=250, **target)
        options.attacker, options.attacks = (str(sft), f"found={found}"), (f"old={found / 'attacks.jsonl'}",)
        options.resume, options.most = resume, 8
        evaluate.run(options)

    def run_leak(out: Path, resume: bool) -> None:
        settings = {"prompts": data["chats"], "ner": NER, "max_new_tokens": 24, "batch": 1}
        leak.run(leak.Options(checkpoint, out=str(out), **settings))

    def run_sweep(out: Path, resume: bool) -> None:
        options = sweep.Options([f"m={checkpoint}"], str(out), [1.0, 2.0], ["log"], [0.0], ner=NER)
        options.prompts, options.questions = data["chats"], data["quiz"]
        options.answer_tokens, options.quiz_tokens, options.batch = 12, 12, 1
        sweep.run(options)

    def run_pairs(out: Path, resume: bool) -> None:
        options = pairs.Options(data["dialogues"], LEAKY, str(out / "pairs.jsonl"), ner=NER)
        options.recipes, options.service = ("remote",), Service(remote_model="m", concurrency=1)
        pairs.run(options)

    return {
        "orpo": run_orpo,
        "sft": attacker("sft", attacker=checkpoint, prompts=data["prompts"]),
        "gfn": attacker("gfn", budget=60, **facing),
        "ppo": attacker("gfn", objective="ppo", **facing),
        "smooth": attacker("smooth", attacker=str(sft), **attacks),
        "adapt": attacker("adapt", budget=30, **facing, **attacks),
        "safety": run_safety,
        "attack": run_attack,
        "leak": run_leak,
        "sweep": run_sweep,
        "pairs": run_pairs,
    }


def whole(stage: Stage, out: Path) -> float:
    """Run a stage that nobody disturbs; returns its seconds."""
    began = time.monotonic()
    log = out.with_name(f"{out.name}.log")
    assert wait(start(partial(stage, out, False), log)) == 0, log.read_text()
    return time.monotonic() - began


def test_killed_at_random_moments_every_stage_ends_with_the_same_result(cases, kinds, tmp_path, capsys):
    torch.set_num_threads(1)
    Detector(NER)  # imports spaCy, which forks then share
    expected, seconds = {}, {}
    for name, stage in kinds.items():
        whole(stage, tmp_path / f"first-{name}")  # reads the files into the system's memory
        seconds[name] = whole(stage, tmp_path / f"whole-{name}")
        expected[name] = outcome(tmp_path / f"whole-{name}")
        assert outcome(tmp_path / f"first-{name}") == expected[name], name
    kills, amid = Counter(), Counter()
    for number, rng in enumerate(cases):
        name = rng.choice(list(kinds))
        out, log = tmp_path / f"case-{number}", tmp_path / f"case-{number}.log"
        for attempt in range(rng.randint(1, 3)):
            resume = attempt > 0 or rng.random() < 0.5
            child = start(partial(kinds[name], out, resume), log)
            time.sleep(rng.uniform(0, seconds[name]))
            os.kill(child, signal.SIGKILL)
            code = wait(child)
            assert code in (0, -signal.SIGKILL), (name, log.read_text())
            kills[name] += code != 0
            amid[name] += code != 0 and out.exists() and any(out.iterdir())
        assert wait(start(partial(kinds[name], out, True), log)) == 0, (name, log.read_text())
        assert outcome(out) == expected[name], name
    with capsys.disabled():
        counts = ", ".join(f"{name} {kills[name]} ({amid[name]})" for name in kinds)
        print(f"\nkills (with files in the folder): {counts}; {kills.total()} ({amid.total()}) in all")


def damage(rng: random.Random, path: Path) -> str:
    """Spoil a file as a bad disk, a full one or a hand would; returns how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "empty", "delete", "noise", "other"))
    place = rng.randrange(len(content))
    if how == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "empty":
        content.clear()
    elif how == "noise":
        content[place : place + 20] = rng.randbytes(20)
    elif how == "other":
        content[:] = rng.choice((b"[]", b"{}", b"null", b'{"step": 1}', b"\xff", b"9" * 5000, b"[" * 5000))
    path.write_bytes(content)
    if how == "delete":
        path.unlink()
    return how


def test_a_damaged_state_is_one_line_or_makes_no_difference(cases, kinds, tmp_path, capsys):
    torch.set_num_threads(1)
    Detector(NER)
    expected, seconds = {}, {}
    states: dict[str, Path] = {}
    for name in ("orpo", "sft", "gfn", "smooth"):
        seconds[name] = whole(kinds[name], tmp_path / f"whole-{name}")
        expected[name] = outcome(tmp_path / f"whole-{name}")
        while name not in states:  # a run that was killed when it had a state
            out = tmp_path / f"killed-{name}"
            shutil.rmtree(out, ignore_errors=True)
            child = start(partial(kinds[name], out, False), tmp_path / "log")
            deadline = time.monotonic() + 60
            while not list(out.glob("state-*")) and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            wait(child)
            if list(out.glob("state-*/state.json")):
                states[name] = out
    codes = Counter()
    for number, rng in enumerate(cases):
        name = rng.choice(list(states))
        out, log = tmp_path / f"damaged-{name}", tmp_path / f"damaged-{number}.log"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(states[name], out)
        path = rng.choice([*sorted(out.glob("state-*/*")), out / "config.json"])
        how = damage(rng, path)
        code = wait(start(partial(kinds[name], out, True), log))
        said = log.read_text()
        assert code in (0, 2), (name, path.name, how, said)
        assert code == 0 or len(said.splitlines()) == 1, (name, path.name, how, said)
        assert code == 2 or outcome(out) == expected[name], (name, path.name, how)
        codes[code] += 1
    with capsys.disabled():
        print(f"\nrefused {codes[2]}, went on to the same result {codes[0]}")
