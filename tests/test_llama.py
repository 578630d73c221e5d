"""The model against transformers on tiny random configurations, and against itself with and without a cache."""

import math

import pytest
import torch
from conftest import ROPE, config, random_model

from cfgsafe.errors import CheckpointError
from cfgsafe.llama import KVCache, Llama, LlamaConfig, rope_frequencies, rotate


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [None, ROPE, {**ROPE, "factor": 32.0}])
def test_logits_equal_transformers(kv_heads, tied, rope):
    transformers = pytest.importorskip("transformers")
    ours = random_model(num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_scaling=rope)
    raw = {k: v for k, v in ours.config.to_dict().items() if k != "extra"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 2048, (2, 200))  # past the original context of 64
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.head(ours(tokens))).abs().max() < 1e-4


def test_gradients_equal_transformers():
    transformers = pytest.importorskip("transformers")
    ours = random_model(tie_word_embeddings=False).requires_grad_(True)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 2048, (2, 30))
    torch.nn.functional.cross_entropy(ours.head(ours(tokens))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, gradients.pop(name), atol=1e-5), name
    assert not gradients


def test_cache_gives_what_one_pass_gives(model):
    tokens = torch.randint(0, 2048, (3, 20))
    whole = model(tokens)
    cache = KVCache(model.config, 3, 32, device="cpu", dtype=torch.float32)
    positions = torch.arange(20).expand(3, 20)
    parts = [model(tokens[:, a:b], positions[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_padding_on_the_right_never_reaches_a_real_token(model):
    tokens = torch.randint(0, 2048, (1, 9))
    padded = torch.cat((tokens, torch.randint(0, 2048, (1, 5))), 1)
    assert torch.allclose(model(padded)[:, :9], model(tokens), atol=1e-6)


def test_rotation_by_hand():
    """D = 2: one pair of coordinates turns by the position's angle."""
    x = torch.tensor([[[[1.0, 0.0]]]])
    angle = torch.tensor([[[[0.5]]]])
    assert torch.allclose(rotate(x, angle.cos(), angle.sin()), torch.tensor([math.cos(0.5), math.sin(0.5)]))


def test_llama3_scaling_by_hand():
    """Short wavelengths stay, long ones are divided by the factor."""
    plain, scaled = rope_frequencies(config(rope_scaling=None)), rope_frequencies(config())
    assert scaled[0] == plain[0]  # wavelength 6.3 < 64 / 4
    assert torch.isclose(scaled[-1], plain[-1] / 8)  # wavelength 6283 > 64 / 1
    wavelength = 2 * math.pi / plain[1].item()  # 62.8, between
    smooth = (64 / wavelength - 1) / 3
    assert torch.isclose(scaled[1], plain[1] * ((1 - smooth) / 8 + smooth))


def test_config_reads_both_rope_spellings_and_keeps_unknown_keys():
    raw = config().to_dict() | {"pretraining_tp": 1}
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")} | {"rope_parameters": {**ROPE, "rope_theta": 10000.0}}
    old_config, new_config = LlamaConfig.from_dict(raw), LlamaConfig.from_dict(new)
    assert (old_config.rope_theta, old_config.rope_scaling) == (new_config.rope_theta, new_config.rope_scaling)
    assert old_config.to_dict()["pretraining_tp"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_size": None}, "hidden_size"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, words):
    with pytest.raises(CheckpointError, match=words):
        LlamaConfig.from_dict(config().to_dict() | change)


def test_head_is_tied_by_reference():
    assert (m := Llama(config())).lm_head.weight is m.model.embed_tokens.weight
