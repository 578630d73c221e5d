"""The paper's tables from results.json files."""

import json

import pytest

from cfgsafe.errors import InputError
from cfgsafe.report import results, tables


def row(model, items, epoch=None, g=None, space=None, **more):
    space = space or (None if g is None else "prob")
    figures = {
        "ner_items_per_100": items,
        "ner_items_per_100_ci": [items - 2, items + 2],
        "utility": 90.0,
        "utility_ci": [88.0, 92.0],
    }
    return {"model": model, "epoch": epoch, "guidance": g, "space": space, **figures, **more}


def save(folder, *rows):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    return str(folder)


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = text.split(heading)[1].split("\n|", 1)[1].split("\n\n")[0]
    cells = []
    for line in lines.splitlines():
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


@pytest.fixture
def printed(tmp_path, capsys):
    def run(*runs):
        tables.run(tables.Options(list(runs), str(tmp_path / "t.md")))
        text = capsys.readouterr().out
        assert text.rstrip() == (tmp_path / "t.md").read_text().rstrip()
        return text

    return run


@pytest.fixture
def full(tmp_path):
    """What train.py demo --full writes, in part."""
    rows = [
        row("leaky", 500),
        row("leaky", 300, None, 1.0),
        row("lora", 40, 1, 1.0),
        row("lora", 20, 3, 1.0),
        row("lora-cfg", 60, 1, 1.0),
        row("lora-cfg", 24, 3, 1.0),
    ]
    rows += [row("lora-cfg", 12, 3, 3.0), row("lora-cfg", 8, 3, 3.0, "log")]
    return save(tmp_path / "full", *rows)


def test_table_1_has_the_last_epochs_in_log_space_beside_the_papers(printed, full):
    lines = table(printed(full), "## Table 1")
    assert ["leaky", "90.0 [88.0, 92.0]", "250.0 [249.0, 251.0]", "-", "-"] in lines
    assert ["leaky, g=1", "90.0 [88.0, 92.0]", "150.0 [149.0, 151.0]", "42.9", "246"] in lines
    assert ["lora, epoch 3, g=1", "90.0 [88.0, 92.0]", "10.0 [9.0, 11.0]", "44.3", "11"] in lines
    assert ["lora-cfg, epoch 3, g=3", "90.0 [88.0, 92.0]", "4.0 [3.0, 5.0]", "45.7", "1"] in lines
    assert not any("epoch 1" in line[0] for line in lines)


def test_what_was_not_run_says_so(printed, full):
    text = printed(full)
    assert ["lora-cfg, epoch 3, g=2", "not run", "not run", "44.3", "5"] in table(text, "## Table 1")
    assert ["Model-sub, g=1", "not run", "not run", "0", "175"] in table(text, "## Table 1")
    assert table(text, "## Table 2")[-2][:5] == ["lora-cfg", "1", "not run", "30.0 [29.0, 31.0]", "not run"]


def test_table_2_is_a_grid_of_epochs_and_g(printed, full):
    lines = table(printed(full), "## Table 2")
    assert lines[0] == ["model", "epoch", "unguided", "g=1", "g=3", "paper, same epoch"]
    assert [
        "lora-cfg",
        "3",
        "not run",
        "12.0 [11.0, 13.0]",
        "4.0 [3.0, 5.0]",
        "g=1: 12, g=2: 5, g=3: 1",
    ] in lines


def test_table_3_is_probability_space_per_50_and_per_150(printed, full):
    lines = table(printed(full), "## Table 3")
    assert [
        "lora-cfg, epoch 3, g=3",
        "6.0 [5.0, 7.0]",
        "18.0 [15.0, 21.0]",
        "90.0 [88.0, 92.0]",
        "3",
        "19",
    ] in lines


def test_runs_are_joined_and_rows_that_both_have_are_told_apart(printed, full, tmp_path):
    other = save(tmp_path / "other", row("leaky", 100), row("guard", 2, 3, 5.0, "log", alpha=0.0))
    first = [line[0] for line in table(printed(full, other), "## Table 1")]
    assert f"leaky ({full})" in first and f"leaky ({other})" in first and "guard, epoch 3, g=5" in first


def test_answers_that_were_cut_off_are_said(printed, tmp_path):
    cut = {"cut_off": 12.5, "cut_off_ci": [8.0, 17.0]}
    text = printed(
        save(
            tmp_path / "r",
            {**row("lora", 8), **cut},
            {**row("sub", 8), "cut_off": 2.0, "cut_off_ci": [0.0, 4.0]},
        )
    )
    assert "cut off at most 12.5 % of a model's answers" in text


def test_each_seed_has_its_lines_and_the_papers_figures(printed, tmp_path):
    rows = [{**row("lora", items, None, 1.0), "seed": seed} for seed, items in ((0, 8), (1, 4))]
    lines = {line[0]: line[2:] for line in table(printed(save(tmp_path / "r", *rows)), "## Table 1")}
    assert lines["lora seed 0, g=1"] == ["4.0 [3.0, 5.0]", "44.3", "11"]
    assert lines["lora seed 1, g=1"] == ["2.0 [1.0, 3.0]", "44.3", "11"]


def test_a_masked_row_is_not_taken_for_the_plain_one(printed, tmp_path):
    run = save(
        tmp_path / "r",
        row("lora-cfg", 8, 3, 3.0, "log", alpha=0.0),
        row("lora-cfg", 4, 3, 3.0, "log", alpha=0.1),
    )
    lines = {line[0]: line[2:] for line in table(printed(run), "## Table 1")}
    assert lines["lora-cfg, epoch 3, g=3"] == ["4.0 [3.0, 5.0]", "45.7", "1"]
    assert lines["lora-cfg alpha=0.1, epoch 3, g=3"] == ["2.0 [1.0, 3.0]", "-", "-"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{oops", "not JSON"),
        ("[]", "needs 'rows'"),
        ('{"rows": [{"guidance": 1}]}', "row 1: needs 'model'"),
        ('{"rows": [{"model": "a", "guidance": "1"}]}', "row 1: 'guidance' must be a number or null"),
        ('{"rows": [{"model": "a", "utility": 3}]}', "row 1: 'utility' must be a number, with 'utility_ci'"),
        ('{"rows": [{"model": "a", "guidance": 3}]}', "row 1: needs 'space'"),
        ('{"rows": [{"model": "a", "alpha": 1%s}]}' % ("0" * 400), "row 1: 'alpha' must be a number"),
        ('{"rows": [{"model": "a", "slices": [{"easy": {}}]}]}', "row 1: 'slices' must be an object"),
        (
            '{"rows": [{"model": "a", "slices": {"b": {"recall": "x"}}}]}',
            "row 1: slice 'b': 'recall' must be",
        ),
        ('{"rows": [{"model": "a"}], "conclusions": 3}', "'conclusions' must be a list"),
    ],
)
def test_wrong_results_name_the_row_and_field(tmp_path, text, words):
    if text:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=f"results.json: .*{words}"):
        results.read_results(tmp_path)
