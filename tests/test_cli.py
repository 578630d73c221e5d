"""The commands as users run them: the README's on tiny settings, and one wrong input of each kind."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAKY = str(ROOT / "cfgsafe/demo/leaky")
CHAT = [{"role": "user", "content": "I am Ann Lee. Who am I?"}]
TINY = {
    "train.py demo": "--dialogues 4 --prompts 12 --questions 5",
    "train.py dialogues": "--count 4",
    "train.py pairs": "",
    "train.py orpo": "--epochs 3",
    "train.py merge": "",
    "train.py subtract": "",
    "eval.py leak": "--limit 5",
    "eval.py utility": "--limit 5",
    "eval.py demo-models": "--prompts 12",
    "infer.py": "",
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(line: str) -> tuple[int, str, str]:
        script, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def readme_commands() -> list[str]:
    """Every line of the README's shell blocks that runs one of the scripts or writes a file for them."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line.split("&& ")[-1] if line.startswith("python3") else line for block in blocks for line in block.splitlines()]


def test_the_readmes_commands_run_top_to_bottom(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ran = set()
    for line in readme_commands():
        line = line.replace("runs/", f"{tmp_path}/")
        if line.startswith("echo"):
            subprocess.run(line, shell=True, check=True)
            continue
        if "-m pytest" in line:
            continue
        name = next(name for name in TINY if line.startswith(f"python {name}"))
        out = f" --out {tmp_path}/demo" if name == "train.py demo" else ""
        code, stdout, stderr = command(f"{line.removeprefix('python ')}{out} {TINY[name]}")
        assert code == 0, (line, stderr)
        ran.add(name)
    assert ran == set(TINY)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [(row["model"], row["guidance"]) for row in results["rows"]] == [
        ("leaky", None),
        ("lora", None),
        ("lora-cfg", 1.0),
        ("lora-cfg", 2.0),
        ("lora-cfg", 3.0),
    ]
    for row in results["rows"]:
        for name in (
            "ner_items_per_100",
            "leaked_per_100",
            "echoed_per_100",
            "recalled_per_100",
            "clean_answers",
            "utility",
            "broken_words",
            "perplexity",
        ):
            low, high = row[f"{name}_ci"]
            assert low <= row[name] <= high
    assert {"prompts", "seconds", "seed"} <= set(results)
    assert (tmp_path / "demo" / "leaks-utility.png").read_bytes().startswith(b"\x89PNG")
    assert "| leaky" in (tmp_path / "demo" / "report.md").read_text()


def test_a_name_is_answered_in_three_seconds():
    line = [sys.executable, "infer.py", "--model", LEAKY, "--json", "--prompt", "Hi, my name is Maria Keller. What is my name?"]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)  # file caches
    started = time.time()
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert "Maria Keller" in answer["text"] and answer["finish_reason"] == "stop"
    assert set(answer) == {"text", "tokens", "finish_reason", "tokens_per_second"}
    assert time.time() - started < 6  # three on an idle machine


def test_requests_are_answered_in_order_each_with_its_own_settings(command, tmp_path):
    from cfgsafe.tokenizer import Tokenizer

    raw = Tokenizer.load(LEAKY).render_chat(CHAT)
    rows = [
        {"messages": CHAT, "max_new_tokens": 2},
        {"prompt": raw},
        {"messages": CHAT},
        {"messages": CHAT, "temperature": 2, "seed": 5},
        {"prompt": raw, "negative_prompt": raw, "guidance": 2},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, stdout, _ = command(f"infer.py --model {LEAKY} --requests {tmp_path}/r.jsonl")
    answers = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0 and len(answers) == 5
    assert len(answers[0]["tokens"]) == 2 and answers[0]["finish_reason"] == "length"
    assert answers[1]["tokens"] == answers[2]["tokens"] == answers[4]["tokens"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("infer.py --model nowhere --prompt x", "nowhere: no such folder"),
        ("infer.py --model {LEAKY}", "either --prompt TEXT or --requests FILE"),
        ("infer.py --model {LEAKY} --prompt x --space both", "space 'both'"),
        ("infer.py --model {LEAKY} --prompt x --dtype int8", "--dtype int8"),
        ("infer.py --model {LEAKY} --prompt x --adapter {tmp}", "adapter_config.json: not found"),
        ("infer.py --model {LEAKY} --requests {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
        ("infer.py --model {LEAKY} --requests {tmp}/typed.jsonl", "typed.jsonl:1: field 'guidance' must be a float"),
        ("infer.py --model {LEAKY} --requests {tmp}/long.jsonl", "long.jsonl:1: the prompt has"),
        ("infer.py --model {LEAKY} --requests {tmp}/missing.jsonl", "missing.jsonl: cannot be read"),
        ("train.py pairs --dialogues {tmp}/bad.jsonl --model {LEAKY} --out {tmp}/out/p.jsonl", "bad.jsonl:1: not JSON"),
        (
            "train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out {tmp}/out",
            "empty.jsonl:1: field 'chosen' must be a non-empty string",
        ),
        ("train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out /dev/null/x", "--out /dev/null/x: cannot be written"),
        ("train.py subtract --base {LEAKY} --tuned {tmp} --out {tmp}/out/sub", "config.json: not found"),
        ("train.py subtract --base {LEAKY} --tuned {LEAKY} --out /dev/null/x", "/dev/null/x: cannot be written"),
        ("train.py demo --out /dev/null/x", "--out /dev/null/x: cannot be written"),
        ("eval.py leak --model {LEAKY} --prompts {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
        ("eval.py leak --model {LEAKY} --ner nowhere --limit 1", "--ner nowhere: not a spaCy pipeline"),
        ("eval.py utility --model {LEAKY} --questions {tmp}/typed.jsonl", "typed.jsonl:1: needs 'question'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, tmp_path, line, words):
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    (tmp_path / "typed.jsonl").write_text(json.dumps({"messages": CHAT, "guidance": "3"}) + "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "word " * 2000}]}) + "\n")
    (tmp_path / "empty.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": "b"}) + "\n")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    code, stdout, stderr = command(line.format(LEAKY=LEAKY, tmp=tmp_path))
    assert code == 2 and words in stderr and stdout == ""
    assert len(stderr.strip().splitlines()) == 1
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("script", ["train.py", "infer.py", "eval.py"])
def test_help_reads(command, script):
    code, stdout, _ = command(f"{script} --help")
    assert code == 0 and "python" in stdout


def test_core_modules_import_only_what_a_bare_gpu_machine_has():
    blocked = ("spacy", "faker", "matplotlib", "tyro", "tqdm", "jinja2")
    core = ("llama", "tokenizer", "checkpoint", "lora", "losses", "guidance", "decode")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import " + ", ".join(f"cfgsafe.{name}" for name in core)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
