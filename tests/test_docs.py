"""README and docs: every command runs on tiny settings or says what it needs, and every link leads somewhere.

A ```bash block runs here, in order, as if a reader copied it. An ```sh block does not; its first line says
why, such as "# needs a GPU".
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from cfgsafe.demo import exam, experiment, testset
from cfgsafe.measure import canaries

ROOT = Path(__file__).parents[1]
READING_ORDER = ("README.md", "docs/training.md", "docs/measuring.md", "docs/guidance.md", "docs/redteam.md")
TINY = {  # command -> what makes it short
    "train.py demo": "--dialogues 2 --prompts 4 --questions 2",
    "train.py redteam-demo": "--steps 2 --fit-steps 2 --batch-size 4 --draws 2 --questions 4",
    "train.py dialogues": "--count 5",
    "train.py pairs": "",
    "train.py ordinary": "",
    "train.py orpo": "--epochs 3",
    "train.py distil": "--limit 2 --max-new-tokens 8 --epochs 1",
    "train.py merge": "",
    "train.py quantise": "",
    "train.py relearn": "--steps 0 1 --limit 4 --max-new-tokens 16",
    "train.py subtract": "",
    "train.py attacker --stage gfn": "--steps 2 --batch-size 16 --answer-tokens 16 --samples 2",
    "train.py attacker --stage adapt": "--steps 2 --batch-size 16 --answer-tokens 16 --samples 2",
    "train.py attacker": "--steps 2 --batch-size 16",
    "train.py safety": "--limit 4 --tries 1",
    "eval.py leak": "--limit 5",
    "eval.py utility": "--limit 5",
    "eval.py perplexity": "--limit 5",
    "eval.py canaries": "",
    "eval.py memorised": "--max-new-tokens 16",
    "eval.py extract --model cfgsafe/demo/leaky --attack rr": "--limit 4 --samples 2",
    "eval.py extract": "--limit 4",
    "eval.py attack": "--draws 4 --samples 2 --answer-tokens 16",
    "eval.py sweep": "--limit 4 --guidance 1 3 --alphas 0",
    "eval.py table": "",
    "eval.py report": "",
    "eval.py detectors": "",
    "eval.py demo-models": "--prompts 8",
    "infer.py": "",
    "examples/engine.py": "",
}
RUN_ELSEWHERE = {  # command -> the file and the test that runs it
    "python -m pytest": (),
    "python -m cfgsafe.kernels.aot 86": ("test_kernel", "test_compiles_without_spills"),
    "python -m cfgsafe.bench guidance": (
        "test_bench",
        "test_guided_tokens_are_measured_against_one_read_of_the_logits",
    ),
    "python -m cfgsafe.bench decode": (
        "test_bench",
        "test_decoding_is_measured_from_two_passes_to_the_engine",
    ),
    "python -m cfgsafe.bench orpo": ("test_bench", "test_the_variants_of_a_training_step_agree"),
    "python -m cfgsafe.bench memory": (
        "test_bench",
        "test_an_8b_model_trains_on_the_papers_rows_within_forty_gib",
    ),
}
EACH = 2  # test prompts of each slice, or persons planted equally often
DEFAULT_OUT = {"train.py demo": "demo", "train.py redteam-demo": "redteam"}  # under runs/


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What the documents call runs/; one document goes on from the files of those before it."""
    return tmp_path_factory.mktemp("runs")


def first(rows: list, group_of: Callable) -> list:
    """The first `EACH` rows of each group."""
    counts, kept = Counter(), []
    for row in rows:
        counts[group_of(row)] += 1
        if counts[group_of(row)] <= EACH:
            kept.append(row)
    return kept


@pytest.fixture
def few(monkeypatch):
    """Few of what no option limits: the slices of their own size in the demo, and the persons planted."""
    generated, read = testset.test_prompts, canaries.read_persons

    def prompts(*arguments):
        return first(generated(*arguments), lambda row: row["slice"])

    monkeypatch.setattr(experiment, "test_prompts", prompts)
    monkeypatch.setattr(exam, "test_prompts", prompts)
    monkeypatch.setattr(
        canaries, "read_persons", lambda path: first(read(path), lambda person: person.repeats)
    )


@pytest.fixture
def run(monkeypatch, capsys, runs, few) -> Callable[[str], None]:
    """Run one command line of a document."""
    monkeypatch.chdir(ROOT)

    def call(line: str) -> None:
        line = line.split("&& ")[-1].replace("runs/", f"{runs}/")
        if line in RUN_ELSEWHERE:
            return
        if line.startswith(("cat ", "echo ")):
            subprocess.run(line, shell=True, check=True)
            return
        name = next(name for name in TINY if line.startswith(f"python {name}"))
        script, *arguments = shlex.split(f"{line.removeprefix('python ')} {TINY[name]}")
        if name in DEFAULT_OUT and "--out" not in arguments:
            arguments += ["--out", str(runs / DEFAULT_OUT[name])]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        except SystemExit as stop:
            assert not stop.code, (line, capsys.readouterr().err)

    return call


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def documents() -> list[str]:
    return ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", READING_ORDER)
def test_the_commands_run_in_reading_order(document, run):
    for block in blocks(document, "bash"):
        for line in block.splitlines():
            run(line)


def test_the_readmes_python_runs(runs, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = blocks("README.md", "python")
    exec(block.replace("runs/", f"{runs}/"), {})
    assert capsys.readouterr().out.strip()


def test_the_demo_wrote_what_the_readme_says(runs):
    results = json.loads((runs / "demo" / "results.json").read_text())
    assert [(row["model"], row["guidance"]) for row in results["rows"]] == [
        ("base", None),
        *product(("leaky", "lora", "lora-cfg"), (None, 1.0, 2.0, 3.0)),
    ]
    assert sum(row.get("paper", False) for row in results["rows"]) == 5
    slices = ["easy", "hard", "override", "famous", "x1", "x4", "x16", "x64", "twins"]
    counts = ("ner_items_per_100", "leaked_per_100", "echoed_per_100", "recall")
    for row in results["rows"]:
        assert list(row["slices"]) == slices
        for name in (*counts, "clean_answers", "utility", "margin", "broken_words", "perplexity", "cut_off"):
            low, high = row[f"{name}_ci"]
            assert low <= row[name] <= high
    assert {"prompts", "seconds", "seed"} <= set(results)
    assert (runs / "demo" / "leaks-utility.png").read_bytes().startswith(b"\x89PNG")
    assert "| leaky" in (runs / "demo" / "report.md").read_text()
    assert "invented by the demo" in (runs / "demo" / "report.html").read_text()


def test_every_command_is_tried_and_every_block_is_run_or_says_what_it_needs():
    lines = []
    for document in documents():
        for block in blocks(document, "bash"):
            assert document in (*READING_ORDER, "docs/benchmarks.md")
            lines += [line.split("&& ")[-1] for line in block.splitlines()]
        for block in blocks(document, "sh"):
            assert block.startswith("# needs "), (document, block)
    assert all(any(line.startswith(f"python {name}") for line in lines) for name in TINY)
    assert set(RUN_ELSEWHERE) <= set(lines)


@pytest.mark.parametrize(("file", "name"), [test for test in RUN_ELSEWHERE.values() if test])
def test_what_runs_elsewhere_does(file, name):
    assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text()


@pytest.mark.parametrize("document", [*documents(), "CONTRIBUTING.md", "cfgsafe/demo/README.md"])
def test_links_lead_to_files_and_to_what_they_name(document):
    """[`Engine.step`](../cfgsafe/decode.py): the file defines what the text of the link, in code, names."""
    text = (ROOT / document).read_text()
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        path = (ROOT / document).parent / target.partition("#")[0]
        assert path.exists(), (label, target)
        if path.suffix == ".py" and label.startswith("`") and not label.strip("`").endswith(".py"):
            assert label.strip("`") in defined_in(path), (label, target)


def defined_in(path: Path) -> set[str]:
    """Names of functions, classes, methods and constants of a file: "Engine", "Engine.step", "SPACES"."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.add(node.targets[0].id)
    return names
