"""Options that are given but have no effect are refused, in one line that names the option and says why."""

import importlib
import re
import shlex
import sys

import pytest

SERVICE = "--concurrency 4 --timeout 5 --attempts 2 --price-in 1 --price-out 1"
UNGUIDED = "--space log --positive x --negative x --system-prompt replace"
# The words of a command; the options that have no effect there, each with its value; and why.
RULES = (
    ("eval.py leak --model M", UNGUIDED, "without --guidance"),
    ("eval.py leak --model M", "--alpha 0.1", "on greedy answers without --guidance"),
    ("eval.py leak --model M", "--combine vote", "with one detector"),
    ("eval.py leak --model M --ner presidio", "--combine vote", "with one detector"),
    ("eval.py utility --model M", UNGUIDED, "without --guidance"),
    ("eval.py utility --model M", "--alpha 0.1", "on greedy answers without --guidance"),
    ("eval.py utility --model M", f"--remote-model J {SERVICE}", "without --score judge"),
    ("eval.py utility --model M", "--shots F", "without --protocol cot5"),
    ("eval.py utility --model M --score loglik", "--max-new-tokens 8", "with --score loglik"),
    ("eval.py perplexity --model M", UNGUIDED, "without --guidance"),
    ("eval.py canaries --model M", UNGUIDED, "without --guidance"),
    ("eval.py extract --model M", UNGUIDED, "without --guidance"),
    ("eval.py extract --model M", "--alpha 0.1", "on greedy answers without --guidance"),
    (
        "eval.py extract --model M",
        "--samples 4 --candidates F --base B --ner N --seed 1",
        "without --attack rr",
    ),
    ("eval.py detectors", "--combine vote", "with one detector"),
    ("eval.py report --run R --show-pii", "--ner N", "with --show-pii"),
    ("infer.py --model M --prompt x", f"{UNGUIDED} --skip", "without --guidance"),
    (
        "infer.py --model M --prompt x --guidance 3 --system-prompt replace",
        "--system x",
        "with --system-prompt replace",
    ),
    ("infer.py --model M --prompt x", "--alpha 0.1", "on greedy answers without --guidance"),
    ("infer.py --model M --prompt x", "--top-k 5 --top-p 0.5 --seed 1", "on greedy answers"),
    ("infer.py --model M --prompt x", "--batch 4", "on a single request"),
    ("infer.py --model M --chat", "--explain --json --skip --batch 4", "in a --chat"),
    ("infer.py --model M --chat", "--top-k 5 --top-p 0.5 --seed 1", "on greedy answers"),
    (
        "train.py pairs --dialogues D --model M --out O --no-cfg-aware",
        "--system-prompt replace",
        "with --no-cfg-aware",
    ),
    (
        "train.py orpo --model M --pairs P --out O --init-adapter A",
        "--rank 16 --alpha 32 --targets q_proj --lora-bits 1.58",
        "with --init-adapter, which has its own",
    ),
    ("train.py orpo --model M --pairs P --out O", "--gamma 1 --retain 2", "on the loss of --objective orpo"),
    (
        "train.py orpo --model M --pairs P --out O --objective simpo",
        "--retain 2",
        "on the loss of --objective simpo",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective npo",
        "--gamma 1",
        "on the loss of --objective npo",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective dpo-idk",
        "--gamma 1 --retain 2",
        "on the loss of --objective dpo-idk",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective graddiff",
        "--beta 1 --gamma 1",
        "on the loss of --objective graddiff",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective sft",
        "--beta 1 --gamma 1 --retain 2",
        "on the loss of --objective sft",
    ),
    ("train.py orpo --model M --pairs P --out O", "--fsdp", "in a single process"),
    ("train.py pairs --dialogues D --model M --out O", f"--remote-model J {SERVICE}", "without a remote"),
    (
        "train.py pairs --dialogues D --model M --out O --recipes remote remote+begin --remote-model J",
        "--batch 4 --device cuda --dtype bfloat16",
        "where only an endpoint is asked",
    ),
)


def cases() -> list:
    found = []
    for line, options, why in RULES:
        for given in re.findall(r"--\S+(?: [^-]\S*)?", options):
            found.append(pytest.param(line, given, why, id=f"{line.split(' --')[0]} {given} {why}"))
    return found


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line up to the end of its check of options: what it writes to stderr."""

    def call(line: str) -> str:
        script, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script.removesuffix(".py")).main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize(("line", "given", "why"), cases())
def test_an_option_without_effect_is_refused(run, line, given, why):
    name = given.split()[0]
    stderr = run(f"{line} {given}")
    assert stderr.startswith(f"error: {name} has no effect {why}") and len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        "eval.py leak --model nowhere --guidance 1 --space log --positive x --negative x --alpha 0.1",
        "eval.py leak --model nowhere --ner presidio,presidio --combine vote",
        "eval.py perplexity --model nowhere --alpha 0.1",
        "eval.py canaries --model nowhere --alpha 0.1 --batch 2",
        "eval.py utility --model nowhere --score loglik --alpha 0.1 --batch 2",
        "eval.py extract --model nowhere --attack rr --alpha 0.1 --samples 2 --seed 1",
        "infer.py --model nowhere --prompt x --temperature 1 --alpha 0.1 --top-k 5 --top-p 0.5 --seed 1",
        "infer.py --model nowhere --prompt x --explain --alpha 0.1",
        "infer.py --model nowhere --prompt x --guidance 2 --space log --negative x --skip",
        "infer.py --model nowhere --chat --space log --negative x --alpha 0.1",
        "infer.py --model nowhere --requests R --space log --negative x --skip --alpha 0.1 --seed 1",
    ],
)
def test_an_option_that_counts_is_taken(run, line):
    assert "has no effect" not in run(line)


@pytest.mark.parametrize("given", ["--space prob", "--space=prob"])
def test_the_default_typed_out_is_refused_too(run, given):
    """Whoever types it believes that it counts."""
    assert "--space has no effect" in run(f"eval.py leak --model M {given}")


def test_an_underscore_hides_no_option(run):
    assert "--top-k has no effect" in run("infer.py --model M --prompt x --top_k 5")
