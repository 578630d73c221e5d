"""Weights rounded to few bits: groups by hand, what the rounding may change, and the checkpoint of it."""

import pytest
import torch
from conftest import random_model
from test_merge import TOKENS, adapted

from cfgsafe import load_model
from cfgsafe.blue import quantise
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.cli import run_subcommand
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import BASE
from cfgsafe.lora import HEAD, linear_layers, merge
from cfgsafe.quantise import quantised


def test_a_group_of_4_bits_by_hand():
    """d = -4 / -8 = 0.5. 4 would be level 8, which is clipped; the halves 0.25 and -0.25 go up."""
    given = [-4.0, 4.0, 3.7, 0.2, 0.25, -0.25, -0.26, 1.2]
    assert quantised(torch.tensor(given), 4).tolist() == [-4.0, 3.5, 3.5, 0.0, 0.5, 0.0, -0.5, 1.0]


def test_the_largest_number_of_4_bits_has_level_minus_8_whatever_its_sign():
    """d = 8 / -8 = -1, so halves go down."""
    given = [8.0, -8.0, 0.5, -0.5, 2.4]
    assert quantised(torch.tensor(given), 4).tolist() == [8.0, -7.0, 0.0, -1.0, 2.0]


def test_a_group_of_8_bits_by_hand():
    """d = 254 / 127 = 2; halves go away from 0."""
    given = [-254.0, 254.0, 1.0, -1.0, 0.9, 3.1, -4.9]
    assert quantised(torch.tensor(given), 8).tolist() == [-254.0, 254.0, 2.0, -2.0, 0.0, 4.0, -4.0]


def test_scales_are_held_in_half_precision():
    """-0.3 / -8 = 0.0375; the nearest half-precision number is 1229 / 32768."""
    assert quantised(torch.tensor([-0.3]), 4).item() == -8 * 1229 / 32768


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_32_have_scales_of_their_own(bits):
    """A large number coarsens its own 32 neighbours, not those of the next group, or of the next row."""
    weight = torch.full((2, 80), 0.011)
    weight[0, 3] = -8.0
    given = quantised(weight, bits)
    assert given.shape == weight.shape
    alone = quantised(torch.full((32,), 0.011), bits)
    assert torch.allclose(given[0, :32], torch.tensor([0.0] * 3 + [-8.0] + [0.0] * 28), rtol=1e-3)
    assert (given[0, 32:] == alone[0]).all() and (given[1] == alone[0]).all() and alone[0] > 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 96), (5, 48), (3, 7)])
def test_no_number_moves_by_more_than_half_a_step(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = quantised(weight, bits)
    for row, rounded in zip(weight, given, strict=True):
        for group, after in zip(row.split(32), rounded.split(32), strict=True):
            extreme = group[group.abs().argmax()]
            step = extreme.abs() / (127 if bits == 8 else 8)
            clipped = (bits == 4) & (-group / extreme > 7.5 / 8)
            bound = torch.where(clipped, step, step / 2) + group.abs() / 1024
            assert ((group - after).abs() <= bound).all()
            assert len(after.unique()) <= 2**bits
    assert (given != weight).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_again_changes_nothing(bits):
    weight = torch.randn((16, 80), generator=torch.Generator().manual_seed(2))
    once = quantised(weight, bits)
    assert torch.equal(quantised(once, bits), once)
    assert quantised(torch.zeros(40), bits).eq(0).all()
    half = quantised(weight.bfloat16(), bits)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), quantised(weight.bfloat16().float(), bits), rtol=1 / 256, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_checkpoint_is_the_merged_model_with_its_linear_layers_rounded(tmp_path, bits, capsys):
    model = adapted(tmp_path)
    paths = str(tmp_path / "m"), str(tmp_path / "out"), str(tmp_path / "a")
    quantise.run(quantise.Options(*paths, bits=bits))
    said = capsys.readouterr()
    assert f"14 of them rounded to {bits} bits" in said.out and "WARNING" in said.err
    merge(model)
    for path, layer in linear_layers(model).items():
        if path != HEAD:
            layer.weight.data = quantised(layer.weight.data, bits)
    rounded = load_model(paths[1])
    for name, parameter in model.named_parameters():
        assert torch.equal(rounded.get_parameter(name), parameter), name
    assert torch.equal(rounded(TOKENS), model(TOKENS))
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "m").iterdir()}


def test_without_an_adapter_the_model_itself_is_rounded_but_not_its_own_head(tmp_path, monkeypatch, capsys):
    model = random_model(tie_word_embeddings=False)
    save_checkpoint(tmp_path / "m", model, tokenizer_from=BASE, dtype=torch.float32)
    line = ["train.py", "quantise", "--model", f"{tmp_path}/m", "--out", f"{tmp_path}/out", "--bits", "8"]
    monkeypatch.setattr("sys.argv", line)
    run_subcommand({"quantise": (quantise.Options, quantise.run)}, "")
    assert capsys.readouterr().err == ""
    rounded = load_model(tmp_path / "out")
    assert torch.equal(rounded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(rounded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    layer = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(rounded.get_parameter(layer), quantised(model.get_parameter(layer), 8))
    assert not torch.equal(rounded.get_parameter(layer), model.get_parameter(layer))


def test_an_adapter_on_a_tied_head_is_refused(tmp_path):
    adapted(tmp_path, targets=(HEAD,))
    with pytest.raises(CheckpointError, match="tied to the embedding"):
        quantise.run(quantise.Options(str(tmp_path / "m"), str(tmp_path / "out"), str(tmp_path / "a")))
    assert not (tmp_path / "out").exists()
