"""The model against transformers on tiny random configurations; with a cache against without one."""

import math

import pytest
import torch
from conftest import ROPE, config, random_model

from cfgsafe.errors import CheckpointError
from cfgsafe.llama import KVCache, Llama, LlamaConfig, rope_frequencies, rotate


def theirs_of(ours: Llama):
    """The same model in transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_dict())).eval().to(ours.dtype)
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs.requires_grad_(False)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rope", [None, ROPE, {**ROPE, "factor": 32.0}, {"rope_type": "linear", "factor": 4.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_transformers(ratio, tied, rope, dtype):
    ours = random_model(
        num_attention_heads=8, num_key_value_heads=8 // ratio, tie_word_embeddings=tied, rope_scaling=rope
    ).to(dtype)
    theirs = theirs_of(ours)
    tokens = torch.randint(0, 2048, (2, 150))  # past the original context of 64
    want = theirs(tokens).logits.float()
    bar = 1e-4 if dtype == torch.float32 else 0.02 * want.abs().max()
    assert (want - ours.head(ours(tokens)).float()).abs().max() < bar
    cache = KVCache.empty(ours.config, 2, 160, device="cpu", dtype=dtype)
    positions = torch.arange(150).expand(2, 150)
    hidden = [ours(tokens[:, :140], positions[:, :140], cache)]
    hidden += [ours(tokens[:, t : t + 1], positions[:, t : t + 1], cache) for t in range(140, 150)]
    assert (want - ours.head(torch.cat(hidden, 1)).float()).abs().max() < bar


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 6}, {"head_dim": 20, "rope_theta": 5e5}],
)
def test_other_shapes_equal_transformers(changes):
    ours = random_model(**changes)
    tokens = torch.randint(0, 2048, (2, 90))
    assert (theirs_of(ours)(tokens).logits - ours.head(ours(tokens))).abs().max() < 1e-4


@pytest.mark.parametrize("left", [True, False])
def test_unequal_rows_equal_transformers_padded_on_either_side(left):
    """Ours pads on the right and has no padding mask; theirs masks, on either side."""
    ours = random_model()
    theirs = theirs_of(ours)
    lengths, width = (5, 90, 33), 90
    rows = [torch.randint(0, 2048, (n,)) for n in lengths]

    def pad(row, on_left):
        missing = width - len(row)
        return torch.nn.functional.pad(row, (missing, 0) if on_left else (0, missing))

    mask = torch.stack([pad(torch.ones(n, dtype=torch.long), left) for n in lengths])
    want = theirs(
        torch.stack([pad(r, left) for r in rows]),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
    ).logits
    got = ours.head(ours(torch.stack([pad(r, False) for r in rows])))
    for n, w, g in zip(lengths, want, got, strict=True):
        assert ((w[-n:] if left else w[:n]) - g[:n]).abs().max() < 1e-4


def test_gradients_equal_transformers():
    ours = random_model(tie_word_embeddings=False).requires_grad_(True)
    theirs = theirs_of(ours).requires_grad_(True)
    tokens = torch.randint(0, 2048, (2, 30))
    torch.nn.functional.cross_entropy(
        ours.head(ours(tokens))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert torch.allclose(p.grad, gradients.pop(name), atol=1e-5), name
    assert not gradients


def test_cache_gives_what_one_pass_gives(model):
    tokens = torch.randint(0, 2048, (3, 20))
    whole = model(tokens)
    cache = KVCache.empty(model.config, 3, 32, device="cpu", dtype=torch.float32)
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
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")} | {
        "rope_parameters": {**ROPE, "rope_theta": 10000.0}
    }
    old_config, new_config = LlamaConfig.from_dict(raw), LlamaConfig.from_dict(new)
    assert (old_config.rope_theta, old_config.rope_scaling) == (
        new_config.rope_theta,
        new_config.rope_scaling,
    )
    assert old_config.to_dict()["pretraining_tp"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_size": None}, "hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, words):
    with pytest.raises(CheckpointError, match=words):
        LlamaConfig.from_dict(config().to_dict() | change)


def test_head_is_tied_by_reference():
    assert (m := Llama(config())).lm_head.weight is m.model.embed_tokens.weight
