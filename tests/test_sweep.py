"""The comparison and the sweep: guidance reaches every request, answers are resumed, g = 1 is one row."""

import json
import shutil
from itertools import product

import pytest
import torch
from conftest import random_model

from cfgsafe import subject
from cfgsafe.blue import pairs
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.demo import experiment
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.measure import leak, utility
from cfgsafe.report import compare, figures, sweep
from cfgsafe.report.compare import Comparison
from cfgsafe.subject import NEGATIVE, POSITIVE, Subject

CHATS = [[{"role": "user", "content": f"I am Ann {name}. Who am I?"}] for name in ("Lee", "Ray", "Fox")]
PROMPTS = [
    leak.Prompt(f"p{n}", "plain", "easy", chat, {"PERSON": "Ann"}, f"p{n}") for n, chat in enumerate(CHATS)
]
QUESTIONS = [{"question": "What is hot?", "options": ["ice", "fire"], "answer_index": 1}]
LENGTHS = {"answer_tokens": 3, "quiz_tokens": 2}


def nothing(texts: list[str]) -> list[list]:
    """A detector that finds nothing."""
    return [[] for _ in texts]


@pytest.fixture
def requests(monkeypatch):
    """Every request that reaches the engine."""
    seen = []
    generate = subject.generate

    def record(model, requests, **options):
        seen.extend(requests)
        return generate(model, requests, **options)

    monkeypatch.setattr(subject, "generate", record)
    return seen


@pytest.fixture
def files(tmp_path):
    prompts = [{"messages": chat, "items": {"PERSON": "Ann"}, "slice": "hard"} for chat in CHATS]
    write_jsonl(tmp_path / "p.jsonl", prompts)
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    return {"prompts": str(tmp_path / "p.jsonl"), "questions": str(tmp_path / "q.jsonl"), **LENGTHS}


@pytest.mark.parametrize("margins", [False, True])
def test_a_row_has_option_margins_if_asked_for(checkpoint, tmp_path, margins):
    guarded = Subject(checkpoint, guidance=3.0)
    row = Comparison(PROMPTS, QUESTIONS, nothing, tmp_path, margins=margins, **LENGTHS).row("m", guarded)
    assert ("margin" in row) is margins
    if margins:
        model, tokenizer = subject.load(guarded)
        (expected,) = utility.margins(guarded, model, tokenizer, QUESTIONS)
        assert expected != 0 and row["margin"] == round(expected, 4)
        assert "margin_ci" not in row  # of one question


def test_a_rows_prompts_and_questions_are_all_guided(checkpoint, requests, tmp_path):
    comparison = Comparison(PROMPTS, QUESTIONS, nothing, tmp_path, **LENGTHS)
    row = comparison.row("m", Subject(checkpoint, guidance=3.0, space="log", alpha=0.25))
    decode = subject.Tokenizer.load(checkpoint).decode
    assert len(requests) == 4 and "hot" in decode(requests[-1].prompt)
    assert all((r.guided, r.guidance, r.space, r.alpha) == (True, 3.0, "log", 0.25) for r in requests)
    assert all(POSITIVE in decode(r.prompt) and NEGATIVE in decode(r.negative) for r in requests)
    assert (row["guidance"], row["space"], row["alpha"]) == (3.0, "log", 0.25)


@pytest.mark.parametrize(("how", "kept"), [("add", True), ("replace", False)])
def test_a_sweep_adds_to_system_prompts_or_replaces_them(
    checkpoint, requests, files, tmp_path, capsys, how, kept
):
    prompt = {"messages": [{"role": "system", "content": "You are Bob."}, *CHATS[0]], "slice": "hard"}
    write_jsonl(tmp_path / "p.jsonl", [prompt])
    models, out = [f"m={checkpoint}"], tmp_path / "out"
    sweep.run(sweep.Options(models, str(out), [3.0], ["prob"], [0.0], system_prompt=how, **files))
    shown = subject.Tokenizer.load(checkpoint).decode(requests[0].prompt)
    assert POSITIVE in shown and ("You are Bob." in shown) is kept
    assert (out / f"answers-m-g=3-prob{'' if kept else '-replace'}.jsonl").exists()


def test_every_combination_of_a_sweep_reaches_the_engine(checkpoint, requests, files, tmp_path, capsys):
    options = sweep.Options(
        [f"m={checkpoint}"], str(tmp_path / "out"), [1.0, 2.0, 3.0], ["prob", "log"], [0.0, 0.1], **files
    )
    sweep.run(options)
    expected = {(1.0, "prob", 0.0), *product((2.0, 3.0), ("prob", "log"), (0.0, 0.1))}
    asked = [(r.guidance, r.space, r.alpha) for r in requests]
    assert set(asked) == expected
    assert all(asked.count(setting) == 4 for setting in expected)  # three prompts and a question
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    settings = [(row["guidance"], row["space"], row["alpha"]) for row in rows]
    assert settings[0] == (1.0, "prob", 0.0)
    assert set(settings) == expected and len(settings) == len(expected)
    for row in rows:
        assert row["quiz_cut_off"] == 100  # after two tokens
        assert row["slices"]["hard"]["leaked_per_100"] == row["leaked_per_100"]
        assert "easy" not in row["slices"] and "perplexity" not in row
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| m g=3 log alpha=0.1 " in (tmp_path / "out" / "sweep.md").read_text()
    assert "erplexity" not in (tmp_path / "out" / "sweep.md").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == len(expected)


def test_a_second_run_reads_its_answers_until_the_weights_change(checkpoint, requests, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    model = Subject(str(tmp_path / "model"), guidance=2.0)

    def row():
        return Comparison(PROMPTS, QUESTIONS, nothing, tmp_path, **LENGTHS).row("m", model)

    first = row()
    assert len(requests) == 4
    assert row() == first and len(requests) == 4
    (tmp_path / "model" / "model.safetensors").touch()
    assert row() == first and len(requests) == 4
    save_checkpoint(tmp_path / "model", random_model(1), tokenizer_from=BASE, dtype=torch.float32)
    row()
    assert len(requests) == 8


def test_a_model_that_is_written_again_between_two_rows_is_loaded_again(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    comparison = Comparison(PROMPTS, QUESTIONS, nothing, tmp_path, resume=False, **LENGTHS)
    comparison.row("first", Subject(str(tmp_path / "model")))
    save_checkpoint(tmp_path / "model", random_model(1), tokenizer_from=BASE, dtype=torch.float32)
    comparison.row("second", Subject(str(tmp_path / "model")))
    first, second = (comparison.measured[name].findings for name in ("first", "second"))
    assert [finding.answer for finding in first] != [finding.answer for finding in second]


def test_a_second_sweep_leaves_no_answers_of_the_first(checkpoint, files, tmp_path):
    out = tmp_path / "out"
    for name in ("m", "n"):
        sweep.run(sweep.Options([f"{name}={checkpoint}"], str(out), [1.0], **files))
        write_jsonl(out / "answers.jsonl", [])
    assert {path.name for path in out.glob("answers*")} == {"answers-n-g=1.jsonl", "answers.jsonl"}
    assert len(list((out / "kept").iterdir())) == 1  # what was generated is still known


def test_answers_may_be_as_long_as_in_the_reference_and_the_demos_own_stay_short(tmp_path):
    """A third to a half of the reference's published answers are longer than 64 tokens."""
    defaults = [leak.Options("m").max_new_tokens, pairs.Options("d", "m", "o").max_new_tokens]
    swept, compared = sweep.Options(["m=m"], "o"), Comparison(PROMPTS, QUESTIONS, nothing, tmp_path)
    for lengths in (swept, compared):
        defaults += [lengths.answer_tokens, lengths.quiz_tokens]
    assert {*defaults, utility.LONGEST["short"]} == {256}
    short = experiment.comparison(experiment.Options(), nothing, tmp_path)
    assert (short.answer_tokens, short.quiz_tokens) == (64, 16)


def test_one_model_is_loaded_once_for_all_its_settings(checkpoint, monkeypatch, tmp_path):
    loads = []
    load = compare.load

    def record(model):
        loads.append(model)
        return load(model)

    monkeypatch.setattr(compare, "load", record)
    comparison = Comparison(PROMPTS[:1], QUESTIONS, nothing, tmp_path, resume=False, **LENGTHS)
    for g in (None, 1.0, 2.0):
        comparison.row("m", Subject(checkpoint, guidance=g))
    assert len(loads) == 1 and not (tmp_path / "kept").exists()


def test_perplexity_is_there_with_a_reference_only(checkpoint, tmp_path):
    comparison = Comparison(
        PROMPTS[:1], QUESTIONS, nothing, tmp_path, reference=Subject(checkpoint), **LENGTHS
    )
    assert comparison.row("m", Subject(checkpoint))["perplexity"] > 1


def test_without_a_vocabulary_the_words_of_prompts_and_questions_are_whole():
    assert {"ann", "lee", "fox", "hot", "fire", "ice"} <= compare.words_of(PROMPTS, QUESTIONS)
    assert "zonk" not in compare.words_of(PROMPTS, QUESTIONS)


def test_curves_begin_at_the_shared_row_of_g_1():
    def row(g, space="prob", model="m"):
        return {"model": model, "epoch": None, "guidance": g, "space": space, "alpha": 0.0}

    rows = [
        row(None),
        row(1.0),
        row(3.0),
        row(2.0),
        row(2.0, "log"),
        row(1.0, model="n"),
        row(2.0, model="n"),
    ]
    found = {}
    for label, line in figures.curves(rows).items():
        found[label] = [(r["model"], r["guidance"]) for r in line]
    assert found["m, prob"] == [("m", 1.0), ("m", 2.0), ("m", 3.0)]
    assert found["m, log"] == [("m", 1.0), ("m", 2.0)] and found["n, prob"] == [("n", 1.0), ("n", 2.0)]


def test_markers_at_the_ends_of_a_scale_are_drawn_whole(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda fig, path: drawn.append(fig))
    values = {"leaked_per_100": 0.0, "utility": 100.0, "broken_words": 0.0}
    row = {"model": "m", "epoch": None, "space": "prob", **values}
    row |= {f"{key}_ci": [value, value] for key, value in values.items()}
    row["utility_ci"] = [50.0, 100.0]
    figures.over_guidance(tmp_path / "f.png", [{"guidance": g, **row} for g in (1.0, 2.0)])
    leaks, utility, broken = [axes.get_ylim() for axes in drawn[0].axes]
    assert all(-bottom / (top - bottom) > 0.04 for bottom, top in (leaks, broken))
    assert (utility[1] - 100) / (utility[1] - utility[0]) > 0.04


def test_a_limit_keeps_every_part_of_the_file():
    assert sweep.spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert sweep.spaced([1, 2], 5) == [1, 2] == sweep.spaced([1, 2], None)


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
        ({"alphas": [2.0]}, "--alphas 2.0: must be at most 1"),
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
