"""ORPO against TRL 0.11.4, step by step: logged values, gradient norm, learning rate, final adapter.

The figures in golden/orpo come from real runs (golden/orpo/make.py; versions in golden.json): one
with truncation, one where a token merges across the boundary and BOS and end token are missing.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cfgsafe.blue import orpo

GOLDEN = Path(__file__).parent / "golden" / "orpo"
RUNS = json.loads((GOLDEN / "golden.json").read_text())["runs"]
NAMES = {
    "nll_loss": "nll_loss",
    "log_odds_ratio": "log_odds_ratio",
    "log_odds_chosen": "log_odds_chosen",
    "rewards/chosen": "rewards_chosen",
    "rewards/rejected": "rewards_rejected",
    "rewards/accuracies": "rewards_accuracy",
    "rewards/margins": "rewards_margin",
    "grad_norm": "grad_norm",
}


@pytest.mark.parametrize("name", ["truncated", "merged"])
def test_every_step_and_the_final_adapter_equal_trl(tmp_path, name):
    run = RUNS[name]
    orpo.run(
        orpo.Options(
            str(GOLDEN / "model"),
            str(GOLDEN / f"{name}.jsonl"),
            str(tmp_path),
            init_adapter=str(GOLDEN / "init"),
            shuffle=False,
            lr=1e-3,
            epochs=2,
            max_length=run["max_length"],
            max_prompt_length=run["max_prompt_length"],
        )
    )
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(ours) == len(run["steps"]) == 16
    for step, (mine, theirs) in enumerate(zip(ours, run["steps"], strict=True)):
        for their_name, my_name in NAMES.items():
            assert mine[my_name] == pytest.approx(theirs[their_name], rel=1e-4, abs=2e-6), (step, my_name)
        exact = theirs["nll_loss"] - 0.1 * theirs["log_odds_ratio"]
        assert mine["loss"] == pytest.approx(exact, rel=1e-5), step
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4), step  # TRL rounds what it logs
        if step:  # TRL logs the rate of the step to come
            assert mine["lr"] == pytest.approx(run["steps"][step - 1]["learning_rate"], rel=1e-6)
    final = load_file(tmp_path / "epoch-2" / "adapter_model.safetensors")
    theirs = load_file(GOLDEN / f"final-{name}" / "adapter_model.safetensors")
    assert set(final) == set(theirs)
    for key in final:
        assert (final[key] - theirs[key]).abs().max() < 1e-4, key
