"""LoRA: identity at the start, PEFT's logits from PEFT's files, strict reading."""

import json

import pytest
import torch
from conftest import random_model

from cfgsafe.errors import CheckpointError
from cfgsafe.lora import TARGETS, LoRAConfig, adapter_tensors, attach, detach, load_adapter, save_adapter

TOKENS = torch.arange(40).view(2, 20)


def trained(seed: int = 1, **settings):
    """A model with a random, non-zero adapter."""
    model, config = random_model(), LoRAConfig(rank=4, alpha=8, **settings)
    parameters = attach(model, config)
    torch.manual_seed(seed)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False).eval(), config


def test_a_fresh_adapter_changes_nothing_and_detaches_to_the_bit():
    model, plain = random_model(), random_model()(TOKENS)
    parameters = attach(model, LoRAConfig())
    assert len(parameters) == 2 * len(TARGETS) * model.config.num_hidden_layers
    assert torch.equal(model(TOKENS), plain)
    detach(model)
    assert torch.equal(model(TOKENS), plain) and adapter_tensors(model) == {}


def test_only_the_adapter_is_trained():
    model = random_model()
    parameters = {id(p) for p in attach(model, LoRAConfig())}
    assert all((id(p) in parameters) == p.requires_grad for p in model.parameters())


def test_one_layer_by_hand():
    model, _ = trained()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32)
    assert torch.allclose(layer(x), x @ (layer.base.weight + 2.0 * layer.lora_B @ layer.lora_A).T, atol=1e-5)


def test_files_give_pefts_logits(tmp_path, checkpoint):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, config = trained()
    save_adapter(tmp_path / "a", model, config, base=checkpoint)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "a").eval()
    with torch.no_grad():
        assert (theirs(TOKENS).logits - model.head(model(TOKENS))).abs().max() < 1e-4
        assert (theirs(TOKENS).logits - random_model().head(random_model()(TOKENS))).abs().max() > 0.1


def test_round_trip(tmp_path):
    model, config = trained()
    save_adapter(tmp_path / "a", model, config, base="b")
    other = random_model()
    assert load_adapter(tmp_path / "a", other) == config
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"r": 8}, "has shape"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    model, config = trained()
    save_adapter(tmp_path / "a", model, config, base="b")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(tmp_path / "a", random_model())


def test_two_adapters_at_once_are_refused():
    model, config = trained()
    with pytest.raises(CheckpointError, match="already"):
        attach(model, config)
