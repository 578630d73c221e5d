"""The comparison of models and the sweep: guidance reaches every request, answers are resumed, g = 1 is one row."""

import json
import shutil

import pytest

from cfgsafe import subject
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.measure import leak
from cfgsafe.report import compare, sweep
from cfgsafe.report.compare import Comparison
from cfgsafe.subject import NEGATIVE, POSITIVE, Subject

CHATS = [[{"role": "user", "content": f"I am Ann {name}. Who am I?"}] for name in ("Lee", "Ray", "Fox")]
PROMPTS = [
    leak.Prompt(f"p{n}", "plain", "easy", chat, {"PERSON": "Ann"}, f"p{n}") for n, chat in enumerate(CHATS)
]
QUESTIONS = [{"question": "What is hot?", "options": ["ice", "fire"], "answer_index": 1}]
NOTHING = lambda texts: [[] for _ in texts]
LENGTHS = {"answer_tokens": 3, "quiz_tokens": 2}


@pytest.fixture
def requests(monkeypatch):
    """Every request that reaches the engine."""
    seen = []
    generate = subject.generate
    monkeypatch.setattr(
        subject, "generate", lambda model, rs, **kw: (seen.extend(rs), generate(model, rs, **kw))[1]
    )
    return seen


@pytest.fixture
def files(tmp_path):
    write_jsonl(
        tmp_path / "p.jsonl",
        [{"messages": chat, "items": {"PERSON": "Ann"}, "slice": "hard"} for chat in CHATS],
    )
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    return {"prompts": str(tmp_path / "p.jsonl"), "questions": str(tmp_path / "q.jsonl"), **LENGTHS}


def test_a_rows_prompts_and_questions_are_all_guided(checkpoint, requests, tmp_path):
    comparison = Comparison(PROMPTS, QUESTIONS, NOTHING, tmp_path, **LENGTHS)
    row = comparison.row("m", Subject(checkpoint, guidance=3.0, space="log", alpha=0.25))
    decode = subject.Tokenizer.load(checkpoint).decode
    assert len(requests) == 4 and "hot" in decode(requests[-1].prompt)
    assert all((r.guided, r.guidance, r.space, r.alpha) == (True, 3.0, "log", 0.25) for r in requests)
    assert all(POSITIVE in decode(r.prompt) and NEGATIVE in decode(r.negative) for r in requests)
    assert (row["guidance"], row["space"], row["alpha"]) == (3.0, "log", 0.25)


def test_every_combination_of_a_sweep_reaches_the_engine(checkpoint, requests, files, tmp_path, capsys):
    options = sweep.Options(
        [f"m={checkpoint}"], str(tmp_path / "out"), [1.0, 2.0, 3.0], ["prob", "log"], [0.0, 0.1], **files
    )
    sweep.run(options)
    expected = {(1.0, "prob", 0.0)} | {
        (g, space, alpha) for g in (2.0, 3.0) for space in ("prob", "log") for alpha in (0.0, 0.1)
    }
    asked = [(r.guidance, r.space, r.alpha) for r in requests]
    assert set(asked) == expected and all(
        asked.count(setting) == 4 for setting in expected
    )  # three prompts and a question
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["guidance"], r["space"], r["alpha"]) for r in results["rows"]][0] == (1.0, "prob", 0.0)
    assert {(r["guidance"], r["space"], r["alpha"]) for r in results["rows"]} == expected and len(
        results["rows"]
    ) == len(expected)
    assert all(
        row["hard"]["leaked_per_100"] == row["leaked_per_100"] and "easy" not in row
        for row in results["rows"]
    )
    assert all("perplexity" not in row for row in results["rows"])
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| m g=3 log alpha=0.1 " in (tmp_path / "out" / "sweep.md").read_text()
    assert "erplexity" not in (tmp_path / "out" / "sweep.md").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(expected)


def test_a_second_run_reads_its_answers_until_the_weights_change(checkpoint, requests, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    row = lambda: Comparison(PROMPTS, QUESTIONS, NOTHING, tmp_path, **LENGTHS).row(
        "m", Subject(str(tmp_path / "model"), guidance=2.0)
    )
    first = row()
    assert len(requests) == 4
    assert row() == first and len(requests) == 4
    (tmp_path / "model" / "model.safetensors").touch()
    row()
    assert len(requests) == 8


def test_a_second_sweep_leaves_no_answers_of_the_first(checkpoint, files, tmp_path):
    out = tmp_path / "out"
    for name in ("m", "n"):
        sweep.run(sweep.Options([f"{name}={checkpoint}"], str(out), [1.0], **files))
        write_jsonl(out / "answers.jsonl", [])
    assert {path.name for path in out.glob("answers*")} == {"answers-n-g=1.jsonl", "answers.jsonl"}
    assert len(list((out / "kept").iterdir())) == 1  # what was generated is still known


def test_one_model_is_loaded_once_for_all_its_settings(checkpoint, monkeypatch, tmp_path):
    loads = []
    load = compare.load
    monkeypatch.setattr(compare, "load", lambda s: (loads.append(s), load(s))[1])
    comparison = Comparison(PROMPTS[:1], QUESTIONS, NOTHING, tmp_path, resume=False, **LENGTHS)
    for g in (None, 1.0, 2.0):
        comparison.row("m", Subject(checkpoint, guidance=g))
    assert len(loads) == 1 and not (tmp_path / "kept").exists()


def test_perplexity_is_there_with_a_reference_only(checkpoint, tmp_path):
    comparison = Comparison(
        PROMPTS[:1], QUESTIONS, NOTHING, tmp_path, reference=Subject(checkpoint), **LENGTHS
    )
    assert comparison.row("m", Subject(checkpoint))["perplexity"] > 1


def test_without_a_vocabulary_the_words_of_prompts_and_questions_are_whole():
    assert {"ann", "lee", "fox", "hot", "fire", "ice"} <= compare.words_of(PROMPTS, QUESTIONS)
    assert "zonk" not in compare.words_of(PROMPTS, QUESTIONS)


def test_curves_begin_at_the_shared_row_of_g_1():
    row = lambda g, space="prob", model="m": {
        "model": model,
        "epoch": None,
        "guidance": g,
        "space": space,
        "alpha": 0.0,
    }
    rows = [
        row(None),
        row(1.0),
        row(3.0),
        row(2.0),
        row(2.0, "log"),
        row(1.0, model="n"),
        row(2.0, model="n"),
    ]
    found = {label: [(r["model"], r["guidance"]) for r in line] for label, line in sweep.curves(rows).items()}
    assert found["m, prob"] == [("m", 1.0), ("m", 2.0), ("m", 3.0)]
    assert found["m, log"] == [("m", 1.0), ("m", 2.0)] and found["n, prob"] == [("n", 1.0), ("n", 2.0)]


def test_markers_at_the_ends_of_a_scale_are_drawn_whole(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(sweep.results, "save_figure", lambda fig, path: figures.append(fig))
    values = {"leaked_per_100": 0.0, "utility": 100.0, "broken_words": 0.0}
    row = {**values, **{f"{key}_ci": [value, value] for key, value in values.items()}}
    row["utility_ci"] = [50.0, 100.0]
    sweep.figure(
        tmp_path / "f.png",
        [{"model": "m", "epoch": None, "guidance": g, "space": "prob", **row} for g in (1.0, 2.0)],
    )
    leaks, utility, broken = [axes.get_ylim() for axes in figures[0].axes]
    assert all(-bottom / (top - bottom) > 0.04 for bottom, top in (leaks, broken))
    assert (utility[1] - 100) / (utility[1] - utility[0]) > 0.04


def test_a_limit_keeps_every_part_of_the_file():
    assert sweep.spaced(list(range(10)), 4) == [0, 2, 5, 7] and sweep.spaced([1, 2], 5) == [
        1,
        2,
    ] == sweep.spaced([1, 2], None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("m=a/b", ("m", None, "a/b", None)),
        ("guard-2.x@3=a+runs/e+1", ("guard-2.x", 3, "a", "runs/e+1")),
        ("m=a=b", ("m", None, "a=b", None)),
    ],
)
def test_a_model_is_named_with_its_epoch_and_adapter(text, expected):
    name, epoch, found = sweep.parse_model(text)
    assert (name, epoch, found.model, found.adapter) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["nothing"]}, "--models nothing: must be NAME=FOLDER"),
        ({"models": ["a/b=c"]}, "--models a/b=c: must be"),
        ({"models": ["a=b", "a=c"]}, "two models called a"),
        ({"spaces": ["both"]}, "--spaces both: must be one of prob, log"),
        ({"alphas": [2.0]}, "--alphas 2: must lie from 0 to 1"),
        ({"guidance": [1.0, float("nan")]}, "--guidance nan: must be a finite number"),
        ({"guidance": []}, "--guidance: give at least one"),
        ({"limit": 0}, "--limit 0"),
        ({"batch": 0}, "--batch 0"),
        ({"words": "/nowhere"}, "--words /nowhere: cannot be read"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(tmp_path, files, changes, words):
    options = sweep.Options(**{"models": ["a=b"], "out": str(tmp_path / "out"), **files, **changes})
    with pytest.raises(InputError, match=words):
        sweep.run(options)
    assert not (tmp_path / "out").exists()
