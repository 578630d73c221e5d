"""Options that are given but have no effect are refused, in one line that names the option and says why."""

import importlib
import re
import shlex
import sys

import pytest

from cfgsafe.red.attacker import Facts

SERVICE = "--concurrency 4 --timeout 5 --attempts 2 --price-in 1 --price-out 1"
UNGUIDED = "--space log --positive x --negative x --system-prompt replace"
SYSTEM_PROMPTS = f"{UNGUIDED} --system-prompt add"
TARGET = (
    "--target T --adapter A --guidance 2 --alpha 0.1 --batch 4 --temperature 1 --top-p 0.5 --answer-tokens 5 "
    "--budget 5 --remote-model J --contexts F --known F --samples 3 --reward leak --guard G --ner N "
    f"{SYSTEM_PROMPTS} {SERVICE}"
)
EXPLORATION = (
    "--objective ppo --lr-log-z 1 --beta 1 --gamma 1 --reward-temperature 2 --min-temperature 1 "
    "--max-temperature 3 --noise 1 --min-fluency 1 --novelty 2 --updates 2 --capacity 9 --tolerance 1 "
    "--likeness edit"
)
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
    ("eval.py utility --model M --protocol cloze", "--max-new-tokens 8", "with --score loglik"),
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
        "--system-prompt replace --swapped 0",
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
        "--retain 2 --nll chosen",
        "on the loss of --objective simpo",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective npo",
        "--gamma 1",
        "on the loss of --objective npo",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective dpo-idk",
        "--gamma 1 --retain 2 --nll chosen",
        "on the loss of --objective dpo-idk",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective graddiff",
        "--beta 1 --gamma 1",
        "on the loss of --objective graddiff",
    ),
    (
        "train.py orpo --model M --pairs P --out O --objective sft",
        "--beta 1 --gamma 1 --retain 2 --nll chosen",
        "on the loss of --objective sft",
    ),
    ("train.py relearn --model M --rows R --facts F --out O", UNGUIDED, "without --guidance"),
    ("train.py relearn --model M --rows R --facts F --out O", "--alpha 0.1", "on greedy answers"),
    ("train.py orpo --model M --pairs P --out O", "--fsdp", "in a single process"),
    (
        "train.py distil --model M --prompts P --out O --adapter A",
        "--rank 16 --lora-alpha 32 --targets q_proj",
        "with --adapter, which has its own",
    ),
    ("train.py distil --model M --prompts P --out O --temperature 0", "--samples 2", "on greedy answers"),
    ("train.py safety --model M --attacks F --out O", "--space log --negative x", "without --guidance"),
    (
        "train.py safety --model M --attacks F --out O --temperature 0",
        "--alpha 0.1",
        "on greedy answers without --guidance",
    ),
    (
        "train.py safety --model M --attacks F --out O --adapter A",
        "--rank 4 --lora-alpha 8",
        "with --adapter, which has its own",
    ),
    ("eval.py attack --attacker A --target T --out O", f"{SYSTEM_PROMPTS} {SERVICE}", "without"),
    ("eval.py attack --attacker A --target T --out O --temperature 0", "--top-p 0.5", "on greedy answers"),
    (
        "eval.py attack --attacker A --target T --out O --temperature 0",
        "--alpha 0.1",
        "on greedy answers without --guidance",
    ),
    (
        "eval.py attack --attacker A --remote-model T --out O",
        f"{SYSTEM_PROMPTS} --alpha 0.1 --batch 4",
        "on the model of an endpoint",
    ),
    (
        "eval.py attack --attacks F --remote-model T --out O",
        "--device cuda --dtype bfloat16",
        "where no model is loaded",
    ),
    (
        "eval.py attack --attacker A --target T --out O --reward guard --guard G",
        "--known F --ner N",
        "with --reward guard",
    ),
    ("eval.py attack --attacker A --target T --out O", "--prompts F", "without --template list"),
    (
        "eval.py attack --attacks F --target T --out O",
        "--prompts F --template list --least 3 --most 9",
        "without a checkpoint as --attacker",
    ),
    (
        "eval.py attack --attacker {stage} --target T --out O",
        "--prompts F --template list --least 3 --most 9",
        "without a checkpoint as --attacker",
    ),
    ("train.py attacker --stage sft --attacker A --out O --prompts F", TARGET, "in --stage sft"),
    ("train.py attacker --stage smooth --attacker A --out O --attacks F", TARGET, "in --stage smooth"),
    ("train.py attacker --stage sft --attacker A --out O --prompts F", EXPLORATION, "in --stage sft"),
    ("train.py attacker --stage smooth --attacker A --out O --attacks F", EXPLORATION, "in --stage smooth"),
    (
        "train.py attacker --stage adapt --attacker A --target T --out O --attacks F",
        EXPLORATION,
        "in --stage adapt",
    ),
    (
        "train.py attacker --stage sft --attacker A --out O --prompts F",
        "--attacks F --success 0.5 --min-reference 9",
        "in --stage sft",
    ),
    ("train.py attacker --stage gfn --attacker A --target T --out O", "--attacks F", "in --stage gfn"),
    (
        "train.py attacker --stage gfn --attacker A --target T --out O",
        "--prompts F",
        "without --template list",
    ),
    (
        "train.py attacker --stage gfn --attacker A --target T --out O",
        f"{SYSTEM_PROMPTS} {SERVICE}",
        "without",
    ),
    ("train.py attacker --stage gfn --attacker A --remote-model T --out O", "--batch 4", "on the model of"),
    (
        "train.py attacker --stage gfn --attacker A --target T --out O",
        "--noise 1 --novelty 2 --updates 2",
        "with --objective tb",
    ),
    (
        "train.py attacker --stage gfn --attacker A --target T --out O --objective reinforce",
        "--lr-log-z 1 --noise 1 --novelty 2 --updates 2 --min-temperature 1 --max-temperature 3 "
        "--capacity 9 --tolerance 1 --likeness edit",
        "with --objective reinforce",
    ),
    (
        "train.py attacker --stage gfn --attacker A --target T --out O --objective ppo",
        "--lr-log-z 1 --noise 1 --min-temperature 1 --max-temperature 3",
        "with --objective ppo",
    ),
    (
        "train.py attacker --stage gfn --attacker {stage} --target T --out O",
        "--prompts F --template list --least 3 --most 9 --lora-rank 4 --lora-alpha 8",
        "on the folder of an earlier stage, which has its own",
    ),
    ("train.py dialogues --split test --out O", "--count 5", "with --split test"),
    ("train.py dialogues --split sets --out O", "--count 5 --seed 1", "with --split sets"),
    ("cfgsafe/bench/__main__.py orpo", "--memory-gib 8", "on a CPU"),
    ("cfgsafe/bench/__main__.py decode", "--memory-gib 8", "on a CPU"),
    ("cfgsafe/bench/__main__.py decode", "--plot", "without --csv"),
    ("cfgsafe/bench/__main__.py guidance", "--plot", "without --csv"),
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
def run(monkeypatch, capsys, tmp_path):
    """What a command line that is refused writes to stderr; {stage} is the folder of an attacker's stage."""
    Facts("M", "user", 5, 20, [], reference="sft").write(tmp_path)

    def call(line: str) -> str:
        script, *arguments = shlex.split(line.format(stage=tmp_path))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
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
        "train.py orpo --model nowhere --pairs P --out {stage}/out --init-adapter A --lora-dropout 0.1",
        "train.py orpo --model nowhere --pairs P --out {stage}/out --objective npo --beta 1 --retain 2",
        "train.py pairs --dialogues nowhere --model M --out {stage}/out --recipes avoid remote --batch 4 "
        "--device cpu --remote-model J --concurrency 0",
        "train.py safety --model M --attacks nowhere --out O --positive x --alpha 0.1 --rank 4",
        "train.py safety --model M --attacks nowhere --out O --guidance 2 --space log --negative x",
        "eval.py attack --attacker {stage} nowhere --target nowhere --out {stage}/out --template list "
        "--prompts nowhere --least 3 --guidance 1 --space log --batch 4",
        "eval.py attack --attacks nowhere --target nowhere --out {stage}/out --known F --ner N --alpha 0.1",
        "train.py attacker --stage gfn --attacker nowhere --target nowhere --out {stage}/out --lr-log-z 1 "
        "--min-temperature 1 --success 0.5 --lora-rank 4 --least 3 --capacity 9",
        "train.py attacker --stage gfn --attacker nowhere --target nowhere --out {stage}/out --objective ppo "
        "--novelty 2 --updates 2 --capacity 9",
        "train.py attacker --stage gfn --attacker nowhere --target nowhere --out {stage}/out "
        "--objective ctb --noise 1",
        "train.py attacker --stage smooth --attacker {stage} --attacks nowhere --out {stage}/out --steps 3 "
        "--success 0.5 --min-reference 1 --device cpu --seed 1",
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
