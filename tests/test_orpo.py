"""The training stage: what it writes, that it repeats, what changes nothing, and how it stops."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from cfgsafe import load_model
from cfgsafe.blue import orpo
from cfgsafe.blue.loop import learning_rate
from cfgsafe.blue.options import check
from cfgsafe.blue.orpo import Options
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.lora import adapter_updates, load_adapter

SETTINGS = Options("model", "pairs", "out")


def train(checkpoint: str, pairs: str | Path, out: Path, **changes) -> None:
    orpo.run(Options(checkpoint, str(pairs), str(out), **changes))


def metrics(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a log without the values that depend on the machine."""
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("peak_memory_bytes", None)
    return lines


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_learning_rate_falls_along_a_cosine_to_a_tenth():
    assert learning_rate(0, 10, SETTINGS) == 1e-4
    assert math.isclose(learning_rate(5, 10, SETTINGS), 1e-4 * 0.55)
    assert math.isclose(learning_rate(10, 10, SETTINGS), 1e-5)


@pytest.fixture
def pairs_file(tmp_path) -> str:
    rows = [{"prompt": f"Say {n}", "chosen": " one", "rejected": f" two {n}"} for n in range(5)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return str(tmp_path / "pairs.jsonl")


def test_training_prefers_the_chosen_side_and_repeats_to_the_digit(tmp_path, pairs_file, checkpoint):
    runs = []
    for name in ("a", "b"):
        out = tmp_path / name
        train(checkpoint, pairs_file, out, lr=5e-3, epochs=4, seed=1)
        runs.append(metrics(out))
        epochs = {"epoch-1", "epoch-2", "epoch-3", "epoch-4"}
        assert {path.name for path in out.iterdir()} == epochs | {"metrics.jsonl", "config.json"}
    assert runs[0] == runs[1]
    first, last = runs[0][0], runs[0][-1]
    assert [line["step"] for line in runs[0]] == list(range(1, 13)) and last["epoch"] == 4
    assert last["loss"] < first["loss"] and last["rewards_margin"] > first["rewards_margin"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["lr"] == 5e-3


def test_the_written_adapter_is_the_trained_one(tmp_path, pairs_file, checkpoint):
    train(checkpoint, pairs_file, tmp_path / "o", lr=5e-3, epochs=1)
    model = load_model(checkpoint)
    before = model(torch.arange(9)[None])
    load_adapter(tmp_path / "o" / "epoch-1", model)
    assert (model(torch.arange(9)[None]) - before).abs().max() > 1e-3


def test_ternary_adapters_train_and_load_exactly(tmp_path, pairs_file, checkpoint):
    train(checkpoint, pairs_file, tmp_path / "t", lr=2e-2, epochs=6, lora_bits=1.58)
    lines = metrics(tmp_path / "t")
    assert lines[-1]["loss"] < lines[0]["loss"]
    model = load_model(checkpoint, adapter=tmp_path / "t" / "epoch-6")
    for update in adapter_updates(model).values():
        for weight in (update.lora_A, update.lora_B):
            assert len(weight.unique()) <= 3
    with pytest.raises(InputError, match="--lora-bits 4"):
        train(checkpoint, pairs_file, tmp_path / "u", lora_bits=4.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"share_prefix": False},
        {"recompute": 1},
        {"save_every": 1},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_how_it_is_computed_does_not_change_what_is(tmp_path, pairs_file, checkpoint, changes):
    if "compile" in changes and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    for name, settings in (("a", {}), ("b", changes)):
        train(checkpoint, pairs_file, tmp_path / name, lr=1e-3, epochs=2, **settings)
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    one, other = (weights(tmp_path / name / "epoch-2") for name in "ab")
    assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one)


@pytest.mark.parametrize("objective", ["orpo", "sft"])
def test_gradients_accumulate_to_the_mean_of_their_batches(tmp_path, checkpoint, objective):
    """With rows of equal length, two batches of two have the pooled NLL of one batch of four."""
    rows = [{"prompt": f"Say {n}", "chosen": " one", "rejected": " two"} for n in range(8)]
    write_jsonl(tmp_path / "p.jsonl", rows)
    for name, settings in (("a", {"batch_size": 4}), ("b", {"batch_size": 2, "grad_accum": 2})):
        train(checkpoint, tmp_path / "p.jsonl", tmp_path / name, objective=objective, epochs=1, **settings)
    one, other = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert len(one) == len(other) == 2
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_held_out_pairs_are_evaluated_each_epoch(tmp_path, pairs_file, checkpoint):
    train(checkpoint, pairs_file, tmp_path / "o", eval_pairs=pairs_file, lr=5e-3, epochs=3)
    lines = metrics(tmp_path / "o", "eval.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["rewards_margin"] > lines[0]["rewards_margin"]


@pytest.mark.parametrize("objective", ["simpo", "npo", "dpo-idk", "graddiff", "sft"])
def test_every_objective_lowers_its_loss(tmp_path, pairs_file, checkpoint, objective):
    settings = {"objective": objective, "eval_pairs": pairs_file, "lr": 5e-3, "epochs": 3}
    train(checkpoint, pairs_file, tmp_path / "o", **settings)
    lines, held_out = metrics(tmp_path / "o"), metrics(tmp_path / "o", "eval.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] and held_out[-1]["loss"] < held_out[0]["loss"]
    if objective in ("npo", "dpo-idk"):  # the first step's model is the reference
        assert abs(lines[0]["rewards_chosen"]) < 1e-6 and abs(lines[0]["rewards_rejected"]) < 1e-6
        assert lines[-1]["rewards_margin"] > 1e-3


def test_sft_learns_the_same_whether_there_is_a_rejected_side_or_not(tmp_path, pairs_file, checkpoint):
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in rows])
    for name in ("pairs", "one"):
        train(checkpoint, tmp_path / f"{name}.jsonl", tmp_path / name, objective="sft", lr=5e-3, epochs=2)
    one, other = (weights(tmp_path / name / "epoch-2") for name in ("pairs", "one"))
    assert all((one[key] - other[key]).abs().max() < 1e-6 for key in one)
    with pytest.raises(InputError, match="one.jsonl:1: field 'rejected'"):
        train(checkpoint, tmp_path / "one.jsonl", tmp_path / "o")


def test_a_head_with_an_adapter_is_trained(tmp_path, pairs_file, checkpoint):
    train(checkpoint, pairs_file, tmp_path / "o", targets=("q_proj", "lm_head"), lr=5e-3, epochs=2)
    trained = weights(tmp_path / "o" / "epoch-2")
    head = [weight for key, weight in trained.items() if "lm_head.lora_B" in key]
    assert len(head) == 1 and head[0].abs().max() > 0


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(tmp_path, pairs_file, checkpoint):
    train(checkpoint, pairs_file, tmp_path / "a", epochs=1)
    adapter = tmp_path / "a" / "epoch-1"
    broken = load_file(adapter / "adapter_model.safetensors")
    next(iter(broken.values()))[:] = 3e38  # finite, but not its products
    save_file(broken, adapter / "adapter_model.safetensors")
    words = r"step 1: the loss is nan \(rows .*pairs.jsonl:1, .*pairs.jsonl:2\)"
    with pytest.raises(InputError, match=words):
        train(checkpoint, pairs_file, tmp_path / "b", shuffle=False, init_adapter=str(adapter))
    assert not (tmp_path / "b" / "epoch-1").exists()


def test_rank_alpha_and_dropout_are_those_asked_for():
    model = random_model()
    asked = Options("m", "p", "o", rank=3, alpha=5.0, lora_dropout=0.25, targets=("q_proj",))
    config = orpo.add_adapter(model, asked)
    assert (config.rank, config.alpha, config.dropout, config.targets) == (3, 5.0, 0.25, ("q_proj",))
    for update in adapter_updates(model).values():
        assert len(update.lora_A) == 3 and update.scale == 5 / 3 and update.dropout.p == 0.25


def test_a_loaded_adapter_keeps_its_size_and_gets_the_dropout_asked_for(tmp_path, pairs_file, checkpoint):
    small = {"rank": 3, "alpha": 5.0, "targets": ("q_proj",), "lora_bits": 1.58, "lora_dropout": 0.5}
    train(checkpoint, pairs_file, tmp_path / "a", epochs=1, **small)
    adapter = str(tmp_path / "a" / "epoch-1")
    losses = {}
    for dropout in (0.0, 0.9):
        out = tmp_path / str(dropout)
        settings = {"lora_dropout": dropout, "lr": 5e-3, "epochs": 1, "max_grad_norm": 0.0}
        train(checkpoint, pairs_file, out, init_adapter=adapter, **settings)
        losses[dropout] = [line["loss"] for line in metrics(out)]
        written = json.loads((out / "config.json").read_text())
        assert (written["rank"], written["alpha"], written["targets"]) == (3, 5.0, ["q_proj"])
        assert (written["lora_bits"], written["lora_dropout"]) == (1.58, dropout)
        config = json.loads((out / "epoch-1" / "adapter_config.json").read_text())
        assert config["lora_dropout"] == dropout
    assert losses[0.0] != losses[0.9]


@pytest.mark.parametrize(
    ("objective", "used"),
    [
        ("orpo", {"beta": 0.1, "gamma": None, "retain": None}),
        ("simpo", {"beta": 2.0, "gamma": 0.5, "retain": None}),
        ("graddiff", {"beta": None, "gamma": None, "retain": 1.0}),
    ],
)
def test_the_config_records_what_the_loss_read(tmp_path, pairs_file, checkpoint, objective, used):
    train(checkpoint, pairs_file, tmp_path / "o", objective=objective, epochs=1)
    written = json.loads((tmp_path / "o" / "config.json").read_text())
    assert {name: written[name] for name in used} == used


def test_no_largest_norm_leaves_the_gradient_as_it_is(tmp_path, pairs_file, checkpoint):
    """Two steps, because Adam's first one depends on no scale."""
    settings = {"lr": 5e-3, "epochs": 2, "batch_size": 5}
    for name, norm in (("off", 0.0), ("far", 1e6), ("near", 1e-3)):
        train(checkpoint, pairs_file, tmp_path / name, max_grad_norm=norm, **settings)
    off, far = (weights(tmp_path / name / "epoch-2") for name in ("off", "far"))
    assert all(torch.equal(off[key], far[key]) for key in off)
    assert metrics(tmp_path / "off")[0]["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"lr": math.nan}, "--lr nan: must be a finite number"),
        ({"lr": math.inf}, "--lr inf: must be a finite number"),
        ({"alpha": 0.0}, "--alpha 0.0: must be above 0"),
        ({"lr_min_ratio": -0.1}, "--lr-min-ratio -0.1: must be at least 0"),
        ({"lr_min_ratio": 1.1}, "--lr-min-ratio 1.1: must be at most 1"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0: must be below 1"),
        ({"lora_dropout": -0.1}, "--lora-dropout -0.1: must be at least 0"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm -1.0: must be at least 0"),
        ({"max_grad_norm": math.nan}, "--max-grad-norm nan: must be a finite number"),
        ({"beta": -0.1}, "--beta -0.1: must be at least 0"),
        ({"beta": 0.0, "objective": "npo"}, "--beta 0.0: must be above 0 with --objective npo"),
        ({"gamma": -1.0, "objective": "simpo"}, "--gamma -1.0: must be at least 0"),
        ({"retain": -1.0, "objective": "npo"}, "--retain -1.0: must be at least 0"),
        ({"retain": math.inf, "objective": "npo"}, "--retain inf: must be a finite number"),
        ({"group_by_length": True, "shuffle": False}, "--group-by-length changes the order"),
    ],
)
def test_a_number_that_cannot_train_is_refused(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        check(Options("model", "pairs", "out", **changes))


def test_numbers_at_the_borders_are_taken():
    check(Options("model", "pairs", "out", beta=0.0, lr_min_ratio=1.0, max_grad_norm=0.0))
    check(Options("model", "pairs", "out", objective="npo", retain=0.0, lr_min_ratio=0.0))
