"""The commands as users run them: requests, adapters, help, and one wrong input of each kind."""

import importlib
import io
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cfgsafe import cli
from cfgsafe.subject import Subject

ROOT = Path(__file__).parents[1]
LEAKY = str(ROOT / "cfgsafe/demo/leaky")
CHAT = [{"role": "user", "content": "I am Ann Lee. Who am I?"}]


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


def test_a_name_is_answered_in_three_seconds():
    """Of processor time, which a busy machine makes hardly longer."""
    question = "Hi, my name is Maria Keller. What is my name?"
    line = [sys.executable, "infer.py", "--model", LEAKY, "--json", "--prompt", question]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = json.loads(done.stdout)
    assert "Maria Keller" in answer["text"] and answer["finish_reason"] == "stop"
    assert set(answer) == {
        *("text", "tokens", "finish_reason", "failure", "first_token_seconds", "tokens_per_second")
    }
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5  # two to three


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
        ("infer.py --model {LEAKY}", "one of --prompt TEXT, --requests FILE and --chat"),
        ("infer.py --model {LEAKY} --prompt x --stop ''", "--stop: an empty text cannot end an answer"),
        (
            "infer.py --model {LEAKY} --prompt x --guidance 2 --space both",
            "--space both: must be one of prob, log",
        ),
        ("infer.py --model {LEAKY} --prompt x --dtype int8", "--dtype int8"),
        ("infer.py --model {LEAKY} --prompt x --adapter {tmp}", "adapter_config.json: not found"),
        ("infer.py --model {LEAKY} --prompt x --temperature 1 --top-p 2", "--top-p 2.0: must be at most 1"),
        (
            "infer.py --model {LEAKY} --requests {tmp}/stop.jsonl",
            "stop.jsonl:1: field 'stop' must be a list of non-empty strings",
        ),
        ("infer.py --model {LEAKY} --requests {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
        (
            "infer.py --model {LEAKY} --requests {tmp}/typed.jsonl",
            "typed.jsonl:1: field 'guidance' must be a float",
        ),
        ("infer.py --model {LEAKY} --requests {tmp}/long.jsonl", "long.jsonl:1: the prompt has"),
        ("infer.py --model {LEAKY} --requests {tmp}/missing.jsonl", "missing.jsonl: cannot be read"),
        (
            "infer.py --model {LEAKY} --requests {tmp}/nan.jsonl",
            "nan.jsonl:1: guidance nan: must be a finite number",
        ),
        (
            "infer.py --model {LEAKY} --requests {tmp}/huge.jsonl",
            "huge.jsonl:1: guidance 1e+308: must be at most 1000",
        ),
        (
            "infer.py --model {LEAKY} --requests {tmp}/misspelt.jsonl",
            "misspelt.jsonl:1: unknown field 'guidence'",
        ),
        (
            "infer.py --model {LEAKY} --requests {tmp}/both.jsonl",
            "both.jsonl:1: has both 'messages' and 'prompt'",
        ),
        (
            "infer.py --model {LEAKY} --requests {tmp}/negative.jsonl",
            "negative.jsonl:1: field 'negative_prompt' has no effect without guidance",
        ),
        (
            "infer.py --model {LEAKY} --guidance 3 --requests {tmp}/one.jsonl",
            "one.jsonl:1: field 'negative_messages' has no effect at guidance 1",
        ),
        (
            "infer.py --model {LEAKY} --requests {tmp}/surrogate.jsonl",
            "surrogate.jsonl:1: half of a surrogate pair",
        ),
        (
            "infer.py --model {LEAKY} --prompt x --temperature 1 --seed 99999999999999999999",
            "--seed 99999999999999999999: must be at most 9223372036854775807",
        ),
        ("eval.py leak --model {LEAKY} --batch 0", "--batch 0: must be at least 1"),
        ("infer.py --model {LEAKY} --prompt x --device nothing", "--device nothing: cannot be used"),
        ("infer.py --model {LEAKY} --prompt x --adapter {tmp} {tmp}", "two adapters called 'default'"),
        ("infer.py --model a/b--c --prompt x", "a/b--c: no such folder"),
        (
            "train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out {tmp}/out --epochs 0",
            "--epochs 0: must be at least 1",
        ),
        (
            "train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out {tmp}/out --max-length 9",
            "must be below --max-length 9",
        ),
        ("train.py subtract --base {LEAKY} --tuned {LEAKY} --out {tmp}", "holds other files, such as"),
        ("train.py demo --prompts 0 --out {tmp}/out", "--prompts 0: must be at least 2"),
        ("eval.py leak --model {LEAKY} --limit 0", "--limit 0: must be at least 1"),
        ("eval.py leak --model {LEAKY} --limit -3", "--limit -3: must be at least 1"),
        (
            "eval.py leak --model {LEAKY} --limit 1 --max-new-tokens 0",
            "--max-new-tokens 0: must be at least 1",
        ),
        (
            "eval.py extract --model {LEAKY} --limit 1 --max-new-tokens 0",
            "--max-new-tokens 0: must be at least 1",
        ),
        (
            "train.py pairs --dialogues {tmp}/bad.jsonl --model {LEAKY} --out {tmp}/p.jsonl "
            "--max-new-tokens 0",
            "--max-new-tokens 0: must be at least 1",
        ),
        ("eval.py leak --model {LEAKY} --prompts {tmp}/long.jsonl", "long.jsonl:1: the prompt has"),
        (
            "eval.py leak --model {LEAKY} --limit 1 --guidance nan",
            "error: --guidance nan: must be a finite number",
        ),
        (
            "eval.py utility --model {LEAKY} --limit 1 --guidance 2 --space foo",
            "error: --space foo: must be one of prob, log",
        ),
        ("eval.py canaries --model {LEAKY} --alpha 2", "error: --alpha 2.0: must be at most 1"),
        (
            "eval.py perplexity --model {LEAKY} --guidance inf",
            "error: --guidance inf: must be a finite number",
        ),
        (
            "train.py pairs --dialogues {tmp}/bad.jsonl --model {LEAKY} --out {tmp}/out/p.jsonl",
            "bad.jsonl:1: not JSON",
        ),
        (
            "train.py pairs --dialogues {tmp}/bad.jsonl --model {LEAKY} --out {tmp}/p.jsonl --recipes remote",
            "needs --remote-model NAME",
        ),
        (
            "train.py pairs --dialogues {tmp}/typed.jsonl --items {tmp}/bad.jsonl --model {LEAKY} "
            "--out {tmp}/p.jsonl",
            "bad.jsonl:1: not JSON",
        ),
        (
            "train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out {tmp}/out",
            "empty.jsonl:1: field 'chosen' must be a non-empty string",
        ),
        (
            "train.py orpo --model {LEAKY} --pairs {tmp}/empty.jsonl --out /dev/null/x",
            "--out /dev/null/x: cannot be written",
        ),
        ("train.py subtract --base {LEAKY} --tuned {tmp} --out {tmp}/out/sub", "config.json: not found"),
        (
            "train.py subtract --base {LEAKY} --tuned {LEAKY} --out /dev/null/x",
            "/dev/null/x: cannot be written",
        ),
        ("train.py demo --out /dev/null/x", "--out /dev/null/x: cannot be written"),
        ("eval.py leak --model {LEAKY} --prompts {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
        ("eval.py leak --model {LEAKY} --ner nowhere --limit 1", "--ner nowhere: not a spaCy pipeline"),
        ("eval.py utility --model {LEAKY} --questions {tmp}/typed.jsonl", "typed.jsonl:1: needs 'question'"),
        ("eval.py sweep --models {LEAKY} --out {tmp}/out", "must be NAME=FOLDER"),
        ("eval.py table --runs {tmp}", "results.json: cannot be read"),
        ("eval.py report --run {tmp}", "results.json: cannot be read"),
        (
            "eval.py leak --model {LEAKY} --known {tmp}/typed.jsonl",
            "typed.jsonl:1: 'items' must be an object",
        ),
        ("eval.py leak --model {LEAKY} --compare {tmp}/typed.jsonl", "typed.jsonl: holds 1 answers for"),
        ("eval.py demo-models --folder {tmp}", "holds no folder base; base, leaky and ner must be there"),
        ("eval.py detectors --ner nowhere", "--ner nowhere: not a spaCy pipeline"),
        (
            "eval.py extract --model {LEAKY} --dialogues {tmp}/typed.jsonl",
            "typed.jsonl:1: 'spans' must be a list",
        ),
        ("eval.py extract --model {LEAKY} --attack rr --candidates {tmp}/bad.jsonl", "bad.jsonl:1: not JSON"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, tmp_path, line, words):
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    (tmp_path / "typed.jsonl").write_text(json.dumps({"messages": CHAT, "guidance": "3"}) + "\n")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "word " * 2000}]}) + "\n"
    )
    (tmp_path / "empty.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": "b"}) + "\n")
    chat = [{"role": "user", "content": "hi"}]
    lines = {
        "nan": {"messages": chat, "guidance": float("nan")},
        "huge": {"messages": chat, "guidance": 1e308},
        "misspelt": {"messages": chat, "guidence": 3},
    }
    lines |= {
        "stop": {"messages": chat, "stop": "x"},
        "both": {"messages": chat, "prompt": "x"},
        "negative": {"messages": chat, "negative_prompt": "x"},
        "one": {"messages": chat, "negative_messages": chat, "guidance": 1},
        "surrogate": {"messages": [{"role": "user", "content": "\ud83d"}]},
    }
    for name, row in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    code, stdout, stderr = command(line.format(LEAKY=LEAKY, tmp=tmp_path))
    assert code == 2 and words in stderr and stdout == ""
    assert len(stderr.strip().splitlines()) == 1
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_error_stands_on_a_line_of_its_own_after_a_progress_bar(command, tmp_path):
    row = {"messages": [*CHAT, {"role": "assistant", "content": "word " * 2000}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    code, _, stderr = command(f"eval.py perplexity --model {LEAKY} --texts {tmp_path}/long.jsonl")
    assert code == 2 and stderr.split("\r")[-1].startswith("error: ")


def test_infer_guards_as_eval_does(command, tmp_path, monkeypatch):
    """A line's own system prompt gets the positive sentence, with which the adapter was trained."""
    import infer
    from cfgsafe.subject import Subject, load, request_for

    seen = []
    generate = infer.generate

    def spy(model, requests, **settings):
        seen.extend(requests)
        return generate(model, requests, **settings)

    monkeypatch.setattr(infer, "generate", spy)
    chat = [{"role": "system", "content": "Be kind."}, *CHAT]
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": chat, "max_new_tokens": 1}) + "\n")
    code, _, _ = command(f"infer.py --model {LEAKY} --guidance 3 --requests {tmp_path}/r.jsonl")
    subject = Subject(LEAKY, guidance=3.0)
    assert code == 0 and seen == [request_for(subject, load(subject)[1], chat, max_new_tokens=1)]


def test_an_adapter_is_never_silently_left_out(command, tmp_path, monkeypatch):
    from cfgsafe import load_model
    from cfgsafe.lora import LoRAConfig, adapter_updates, attach, save_adapter

    model = load_model(LEAKY)
    attach(model, LoRAConfig(rank=2))
    for update in adapter_updates(model).values():
        update.lora_B.data.normal_(std=0.5)
    save_adapter(tmp_path / "a", model, LoRAConfig(rank=2), base=LEAKY)
    line = f"infer.py --model {LEAKY} --prompt 'Who am I?' --max-new-tokens 8"
    answer = lambda more: command(f"{line} {more}")
    _, bare, _ = answer("")
    _, adapted, _ = answer(f"--adapter {tmp_path}/a")
    assert bare != adapted and answer(f"--adapter guard={tmp_path}/a")[1] == adapted
    code, stdout, stderr = answer(f"--adapter guard={tmp_path}/a other={tmp_path}/a")
    assert code == 2 and "several are for --requests" in stderr
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    two = f"--adapter guard={tmp_path}/a other={tmp_path}/a"
    code, _, stderr = command(f"infer.py --model {LEAKY} --requests {tmp_path}/r.jsonl {two}")
    assert code == 2 and "no adapter 'default' is attached; there are ['guard', 'other']" in stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who am I?\n"))
    _, said, _ = command(f"infer.py --model {LEAKY} --adapter guard={tmp_path}/a --chat --max-new-tokens 8")
    assert said.strip() == adapted.strip()


@pytest.mark.parametrize("script", ["train.py", "infer.py", "eval.py"])
def test_help_reads(command, script):
    code, stdout, _ = command(f"{script} --help")
    assert code == 0 and "python" in stdout


def test_core_modules_import_only_what_a_bare_gpu_machine_has():
    blocked = ("spacy", "faker", "matplotlib", "tyro", "tqdm", "jinja2")
    core = ("llama", "tokenizer", "checkpoint", "lora", "losses", "guidance", "decode")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import " + ", ".join(
        f"cfgsafe.{name}" for name in core
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_file_below_something_that_is_no_folder_is_one_line(command):
    code, _, stderr = command("train.py dialogues --count 1 --out /dev/null/d.jsonl")
    assert code == 2 and len(stderr.splitlines()) == 1
    assert "error: --out /dev/null/d.jsonl: cannot be written" in stderr


@pytest.mark.parametrize(
    ("line", "what", "helps"),
    [
        ("train.py orpo --model M", "missing --pairs, --out", "train.py orpo"),
        (
            "train.py orpo --mdoel M --pairs P --out O",
            "missing --model; unrecognized options: --mdoel M",
            "train.py orpo",
        ),
        (
            "train.py orpo --model M --pairs P --out O --epohcs 3",
            "unrecognized options: --epohcs, 3; perhaps you meant --epochs",
            "train.py",
        ),
        (
            "infer.py --model M --temperature abc",
            "--temperature: could not convert string to float: 'abc'",
            "infer.py",
        ),
        (
            "eval.py leak --model M --combine foo",
            "invalid choice 'foo' for argument '--combine'. Expected one of ('union', 'vote')",
            "eval.py leak",
        ),
        (
            "train.py demo --epochs",
            "missing value for argument '--epochs'. Expected 1 values",
            "train.py demo",
        ),
    ],
)
def test_a_mistake_in_the_command_line_is_two_lines(command, line, what, helps):
    code, stdout, stderr = command(line)
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {what}\nfor help: python {helps} --help\n"


def test_words_that_are_no_text_are_named(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", "M", "--prompt", "a\udcff"])
    with pytest.raises(SystemExit):
        importlib.import_module("infer").main()
    assert capsys.readouterr().err == "error: --prompt: is not valid UTF-8\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "runs/m.jsonl"), "runs/m.jsonl: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("a library's words\nand more"), "a library's words"),
        (MemoryError(), "out of memory; lower the batch or the lengths, or take a smaller model"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error"),
            "out of memory (9 bytes more were asked for); lower the batch or the lengths",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "out of memory (20.00 GiB more were asked for); lower the batch",
        ),
        (UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "no"), "the output cannot hold '\\xe9'; set "),
    ],
)
def test_errors_of_the_system_are_one_line(monkeypatch, capsys, error, line):
    def run(options):
        raise error

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        cli.run_command(run, Subject("M"))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and len(stderr.splitlines()) == 1 and stderr.startswith(f"error: {line}")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="shape mismatch"):
        cli.run_command(run, Subject("M"))


def test_a_full_disk_under_stdout_is_one_line():
    code = "from cfgsafe import cli, subject; cli.run_command(print, subject.Subject('M'))"
    line = ["env", "--unset=PYTHONUNBUFFERED", sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("device", ["meta", "nothing", "cuda:99", "cpu:x"])
def test_a_device_without_memory_is_one_line(command, device):
    for line in (f"infer.py --model {LEAKY} --prompt x", f"eval.py perplexity --model {LEAKY}"):
        code, _, stderr = command(f"{line} --device {device}")
        assert code == 2 and stderr.startswith(f"error: --device {device}: cannot be used (")
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("world", "line"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many: is no whole number"),
        ({"WORLD_SIZE": "2"}, "RANK=: is no whole number"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "7",
                "LOCAL_RANK": "0",
                "MASTER_PORT": "1",
                "MASTER_ADDR": "localhost",
            },
            "WORLD_SIZE=2: RANK or MASTER_ADDR does not fit",
        ),
    ],
)
def test_variables_that_torchrun_did_not_set_are_one_line(command, monkeypatch, tmp_path, world, line):
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    code, _, stderr = command(f"train.py orpo --model {LEAKY} --pairs P --out {tmp_path}/out")
    assert code == 2 and stderr.startswith(f"error: {line}") and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"messages": ' + "9" * 5000 + "}"])
def test_json_that_cannot_be_held_is_one_line(command, tmp_path, text):
    (tmp_path / "deep.jsonl").write_text(text + "\n")
    code, _, stderr = command(f"infer.py --model {LEAKY} --requests {tmp_path}/deep.jsonl")
    assert code == 2 and "deep.jsonl:1: " in stderr and len(stderr.splitlines()) == 1


def test_a_byte_order_mark_is_no_text(command, tmp_path):
    row = json.dumps({"messages": CHAT, "max_new_tokens": 2})
    (tmp_path / "bom.jsonl").write_text(row + "\n", encoding="utf-8-sig")
    code, stdout, _ = command(f"infer.py --model {LEAKY} --requests {tmp_path}/bom.jsonl")
    assert code == 0 and len(json.loads(stdout)["tokens"]) == 2
