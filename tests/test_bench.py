"""The benchmarks run, and their variants compute the same loss."""

import csv
import json
import sys
from dataclasses import asdict

import pytest
import torch

from cfgsafe.bench import decode, orpo_step
from cfgsafe.bench.__main__ import main
from cfgsafe.bench.orpo import OURS, Options, make_inputs
from cfgsafe.bench.shapes import DECODE_SHAPES, random_model
from cfgsafe.kernels import bench as kernel_bench
from cfgsafe.kernels.results import spread


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a benchmark in this process: the object of its last line."""

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
def test_a_training_step_is_measured_in_all_variants(tmp_path, bench):
    settings = "--shape tiny --prompt 40 --answer 9 --steps 2 --csv".split()
    rows = bench("orpo", *settings, str(tmp_path / "b.csv"))["rows"]
    assert [row["variant"] for row in rows] == ["dense", "chunked", "chunked + shared"]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["p50"] > 0 for row in rows)
    with open(tmp_path / "b.csv", newline="") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == [row["variant"] for row in rows]


def test_the_variants_of_a_training_step_agree(tmp_path, capsys):
    options = Options(shape="tiny", prompt=40, answer=9, steps=1)
    make_inputs(tmp_path, options)
    for variant in OURS:
        orpo_step.main(asdict(options) | {"folder": tmp_path, "variant": variant})
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and all(
        step["loss"] == pytest.approx(found[0]["loss"], rel=1e-5) for step in found
    )
    assert all(step["seconds"][0] > 0 for step in found)


def test_an_8b_model_trains_on_the_papers_rows_within_forty_gib(bench):
    rows = bench("memory")["rows"]
    totals = [row["total"] for row in rows if row["shared"]]
    assert min(totals) < 40 < max(totals)


def test_guidance_is_measured_against_a_copy(bench):
    rows = bench("guidance", *"--pairs 2 --vocabulary 1000 --calls 3".split())["rows"]
    assert {row["variant"] for row in rows} == {"copy", "reference, eager", "reference, torch.compile"}
    assert all(row["p50"] > 0 and row["gb_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}])
def test_tokens_of_top_k_and_top_p_are_measured(limit):
    """One token that stays is the greedy one; without a limit, others are drawn."""
    logits = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))

    def tokens(**settings) -> list[int]:
        call = kernel_bench.variants(logits, kernel_bench.Options(**settings))["reference, eager"]
        return call(logits)[0].tolist()

    assert tokens(temperature=1.0, **limit) == tokens() != tokens(temperature=1.0)


def test_decoding_is_measured_from_two_passes_to_the_engine(bench):
    settings = "--shape tiny --runs 1 --new 4 --prompt 8 --batches 1 2 --no-transformers"
    rows = bench("decode", *settings.split())["rows"]
    assert [row["variant"] for row in rows[:2]] == ["ours, two passes", "ours, pairs in one batch"]
    assert len(rows) == 10 and all(row["tokens_per_second"] > 0 for row in rows)


def test_the_rungs_of_the_decode_ladder_say_the_same():
    model = random_model(DECODE_SHAPES["tiny"], torch.float32, "cpu")
    found = decode.our_decoders(model, [[5, 6, 7]], [[9, 10, 11]], decode.Options(new=8))
    with torch.inference_mode():
        answers = {name: call() for name, call in found.items()}
    naive = answers["ours, two passes"]
    assert naive == answers["ours, pairs in one batch"] == answers["ours, combined before the head"]


def test_spread_of_one_and_of_many():
    assert spread([2.0]) == {"p20": 2.0, "p50": 2.0, "p80": 2.0}
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


def test_an_unknown_space_is_one_line(bench, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        bench("guidance", "--space", "both")
    assert capsys.readouterr().err == "error: --space both: must be one of prob, log\n"
