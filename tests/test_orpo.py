"""The ORPO stage: TRL's tokenising and truncation, the loss against a dense computation, and training that is repeatable."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import random_model

from cfgsafe import load_model
from cfgsafe.blue import orpo
from cfgsafe.blue.orpo import Options, Row, learning_rate, read_pairs, step_loss, tokenise
from cfgsafe.errors import InputError, write_jsonl
from cfgsafe.lora import adapter_updates, load_adapter
from cfgsafe.losses import log1mexp

SETTINGS = Options("model", "pairs", "out")
PAIRS = [(Row([0, 5, 6, 7, 2046], 3), Row([0, 5, 6, 9, 9, 9, 2046], 3)), (Row([0, 8, 3, 2046], 2), Row([0, 8, 4, 4, 2046], 2))]


def test_sides_share_the_prompt_and_end_with_the_end_token(tokenizer):
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    chosen, rejected = tokenise(prompt, "Hello there", "Hello Ann<|eot_id|>", tokenizer, SETTINGS)
    end = tokenizer.special["<|eot_id|>"]
    assert chosen.ids[: chosen.start] == tokenizer.encode_prompt(prompt) == rejected.ids[: rejected.start]
    assert tokenizer.decode(chosen.ids[chosen.start :]) == "Hello there" and tokenizer.decode(rejected.ids[rejected.start :]) == "Hello Ann"
    assert chosen.ids[-1] == rejected.ids[-1] == end and chosen.ids.count(end) == rejected.ids.count(end)


def test_tokens_that_merge_across_the_boundary_go_to_the_answer(tokenizer):
    """ "I wo" ends in other tokens than "I work" goes on with."""
    prompt, whole = tokenizer.encode_prompt("I wo"), tokenizer.encode_prompt("I work")
    assert whole[: len(prompt)] != prompt
    chosen, rejected = tokenise("I wo", "rk", " n", tokenizer, SETTINGS)
    assert (chosen.ids[:-1], chosen.start) == (whole, 2) and prompt[:2] == whole[:2]
    assert rejected.start == len(prompt)


def test_truncation_keeps_the_prompts_end_and_the_answers_beginning(tokenizer):
    prompt, answer = " a b c d e f g h", " x y z x y z"
    before, after = tokenizer.encode_prompt(prompt), tokenizer.encode(answer)
    chosen, _ = tokenise(prompt, answer, " x", tokenizer, Options("m", "p", "o", max_length=8, max_prompt_length=5))
    assert chosen.ids[: chosen.start] == before[-5:] and chosen.ids[chosen.start :] == after[:3]
    whole, _ = tokenise(prompt, answer, " x", tokenizer, SETTINGS)
    assert whole.ids == [*before, *after, tokenizer.special["<|eot_id|>"]]


def test_loss_equals_a_dense_computation():
    model = random_model()
    logged, tokens = step_loss(model, PAIRS, beta=0.1)
    means, nlls = {}, []
    for side in (0, 1):
        for number, pair in enumerate(PAIRS):
            row = pair[side]
            logp = model.head(model(torch.tensor([row.ids])))[0].log_softmax(-1)
            each = [logp[t - 1, row.ids[t]] for t in range(1, len(row.ids))]
            means[side, number] = torch.stack(each[row.start - 1 :]).mean()
            nlls += [] if side else each
    lc, lr = (torch.stack([means[side, n] for n in (0, 1)]) for side in (0, 1))
    odds = (lc - lr) - (log1mexp(lc) - log1mexp(lr))
    nll = -torch.stack(nlls).mean()
    assert torch.isclose(logged["nll_loss"], nll, atol=1e-5)
    assert torch.isclose(logged["loss"], nll - 0.1 * torch.nn.functional.logsigmoid(odds).mean(), atol=1e-5)
    assert torch.isclose(logged["rewards_margin"], 0.1 * (lc - lr).mean(), atol=1e-5)
    assert tokens == 5 + 7 + 4 + 5


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
    metrics = []
    for name in ("a", "b"):
        out = tmp_path / name
        orpo.run(Options(checkpoint, pairs_file, str(out), lr=5e-3, epochs=4, seed=1))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics.append([{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines])
        assert {p.name for p in out.iterdir()} == {"epoch-1", "epoch-2", "epoch-3", "epoch-4", "metrics.jsonl", "config.json"}
    assert metrics[0] == metrics[1]
    first, last = metrics[0][0], metrics[0][-1]
    assert [line["step"] for line in metrics[0]] == list(range(1, 13)) and last["epoch"] == 4
    assert last["loss"] < first["loss"] and last["rewards_margin"] > first["rewards_margin"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["lr"] == 5e-3


def test_the_written_adapter_is_the_trained_one(tmp_path, pairs_file, checkpoint):
    orpo.run(Options(checkpoint, pairs_file, str(tmp_path / "o"), lr=5e-3, epochs=1))
    model = load_model(checkpoint)
    before = model(torch.arange(9)[None])
    load_adapter(tmp_path / "o" / "epoch-1", model)
    assert (model(torch.arange(9)[None]) - before).abs().max() > 1e-3


def test_ternary_adapters_train_and_load_exactly(tmp_path, pairs_file, checkpoint):
    orpo.run(Options(checkpoint, pairs_file, str(tmp_path / "t"), lr=2e-2, epochs=6, lora_bits=1.58))
    lines = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    model = load_model(checkpoint, adapter=tmp_path / "t" / "epoch-6")
    for update in adapter_updates(model).values():
        for weight in (update.lora_A, update.lora_B):
            assert len(weight.unique()) <= 3
    with pytest.raises(InputError, match="--lora-bits 4"):
        orpo.run(Options(checkpoint, pairs_file, str(tmp_path / "u"), lora_bits=4.0))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "pairs.jsonl:1: field 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "<|eot_id|>"}, "field 'rejected'"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected'"),
        ({"prompt": " a" * 600, "chosen": "b", "rejected": "c"}, "exceed the model's context of 512"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, tokenizer, row, words):
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(InputError, match=words):
        read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, SETTINGS, 512)


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, monkeypatch):
    model = random_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="step 1"):
        orpo.train(model, PAIRS, SETTINGS, Path(tmp_path))
    assert not (tmp_path / "epoch-1").exists()
