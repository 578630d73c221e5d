"""LoRA: identity at the start, PEFT's files and logits, adapters chosen per row, merging, strict reading."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from cfgsafe import patterns
from cfgsafe.errors import CheckpointError
from cfgsafe.lora import (
    LowRank,
    adapted_layers,
    adapter_names,
    adapter_updates,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
    set_adapters,
    unmerge,
)
from cfgsafe.lora_config import TARGETS, LoRAConfig
from cfgsafe.ternary import is_packed, pack, quantise, ternary, unpack

TOKENS = torch.arange(40).view(2, 20)


def trained(seed: int = 1, model=None, name: str = "default", **settings):
    """A model with a random, non-zero adapter."""
    model, config = model or random_model(), LoRAConfig(**{"rank": 4, "alpha": 8, **settings})
    parameters = attach(model, config, name)
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
    assert torch.equal(model(TOKENS), plain) and adapted_layers(model) == {}


def test_only_the_adapter_is_trained():
    model = random_model()
    parameters = {id(p) for p in attach(model, LoRAConfig())}
    assert all((id(p) in parameters) == p.requires_grad for p in model.parameters())


def test_one_layer_by_hand():
    model, _ = trained()
    layer = model.model.layers[0].mlp.up_proj
    update = layer.updates["default"]
    x = torch.randn(3, 32)
    assert torch.allclose(
        layer(x), x @ (layer.base.weight + 2.0 * update.lora_B @ update.lora_A).T, atol=1e-5
    )


def test_the_gradients_of_the_update_are_those_of_its_formula():
    torch.manual_seed(0)
    shapes = (2, 3, 5), (4, 5), (6, 4)  # x, A and B
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda *inputs: LowRank.apply(*inputs, 0.7), (x, a, b))


SETTINGS = [
    {},
    {"rslora": True},
    {"targets": ("q_proj", "down_proj")},
    {"targets": r".*\.1\..*(up|v)_proj"},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"q_proj": 1.0}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_files_give_pefts_logits_and_back(tmp_path, checkpoint, settings):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, config = trained(**settings)
    save_adapter(tmp_path / "a", model, config, base=checkpoint)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "a"
    ).eval()
    with torch.no_grad():
        assert (theirs(TOKENS).logits - model.head(model(TOKENS))).abs().max() < 1e-4
        assert (theirs(TOKENS).logits - random_model().head(random_model()(TOKENS))).abs().max() > 0.01
    theirs.save_pretrained(tmp_path / "b")
    again = random_model()
    load_adapter(tmp_path / "b", again)
    assert torch.allclose(again(TOKENS), model(TOKENS), atol=1e-6)


def test_an_adapter_on_the_head_is_honoured(tmp_path):
    model, config = trained(targets=("lm_head", "q_proj"), model=random_model(tie_word_embeddings=False))
    save_adapter(tmp_path / "a", model, config, base="b")
    other = random_model(tie_word_embeddings=False)
    plain = other.head(other(TOKENS))
    load_adapter(tmp_path / "a", other)
    assert torch.equal(other.head(other(TOKENS)), model.head(model(TOKENS)))
    set_adapters(other, [None, None])
    assert torch.equal(other.head(other(TOKENS)), plain)


def test_an_adapter_on_the_head_may_differ_by_row():
    model, _ = trained(targets=("lm_head", "q_proj"), model=random_model(tie_word_embeddings=False))
    hidden = torch.randn(2, 32)
    set_adapters(model, ["default", None])
    mixed = model.head(hidden)
    set_adapters(model, None)
    assert torch.allclose(mixed[0], model.head(hidden)[0], atol=1e-6) and torch.equal(
        mixed[1], model.lm_head.base(hidden)[1]
    )


def test_bfloat16_models_round_the_sum_as_peft_does(tmp_path, checkpoint):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, config = trained(model=random_model().bfloat16())
    save_adapter(tmp_path / "a", model, config, base=checkpoint)
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        difference = (theirs(TOKENS).logits - model.head(model(TOKENS))).abs().max()
    assert difference < 0.1  # 0.2 when the update is rounded before it is added


def test_round_trip(tmp_path):
    model, config = trained()
    save_adapter(tmp_path / "a", model, config, base="b")
    other = random_model()
    assert load_adapter(tmp_path / "a", other) == config
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_each_row_of_a_batch_uses_its_own_adapter(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        model, config = trained(seed, rank=3 + seed)
        save_adapter(tmp_path / name, model, config, base="x")
    both = random_model()
    for name in ("a", "b"):
        load_adapter(tmp_path / name, both, name)
    tokens = torch.randint(0, 2048, (4, 15))
    alone = {None: random_model()(tokens)}
    for name in ("a", "b"):
        single = random_model()
        load_adapter(tmp_path / name, single)
        alone[name] = single(tokens)
    names = ["b", None, "a", "b"]
    set_adapters(both, names)
    mixed = both(tokens)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-5)
    assert (alone["a"] - alone["b"]).abs().max() > 0.01
    assert adapter_names(both) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_attached_and_unmerges_to_the_bit(dtype):
    model, _ = trained(model=random_model().to(dtype))
    attached, plain = model(TOKENS).float(), random_model().to(dtype)
    before = merge(model)
    assert adapted_layers(model) == {}
    assert (model(TOKENS).float() - attached).abs().max() < (1e-4 if dtype == torch.float32 else 0.15)
    unmerge(model, before)
    assert torch.equal(model(TOKENS), plain(TOKENS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["conv"]}, "conv"),
        ({"target_modules": None}, "target_modules"),
        ({"r": 8}, "has shape"),
        ({"r": None}, "'r'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor"),
        ({"target_modules": r"x\d"}, "target_modules"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    model, config = trained()
    save_adapter(tmp_path / "a", model, config, base="b")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(tmp_path / "a", random_model())


def test_an_adapter_for_another_base_is_refused(tmp_path):
    model, config = trained(model=random_model(hidden_size=64))
    save_adapter(tmp_path / "a", model, config, base="b")
    with pytest.raises(
        CheckpointError,
        match=r"'.*down_proj.lora_B.weight' has shape \(64, 4\), the base model asks for \(32, 4\)",
    ):
        load_adapter(tmp_path / "a", random_model())


def saved(tmp_path, **settings):
    """The folder of a random adapter."""
    model, config = trained(**settings)
    save_adapter(tmp_path / "a", model, config, base="b")
    return tmp_path / "a"


def with_tensors(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t[KEY].view(-1)[0].fill_(float("nan")),
            "up_proj.lora_A.weight' holds numbers that are not",
        ),
        (
            lambda t: t[KEY].view(-1)[-1].fill_(float("inf")),
            "up_proj.lora_A.weight' holds numbers that are not",
        ),
        (lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int8)}), "lora_A.weight' is stored as I8"),
        (lambda t: t.update({KEY: torch.full((4, 32), 1e300, dtype=torch.float64)}), "not finite"),
        (
            lambda t: t.update({KEY: torch.ones(32, 4)}),
            r"has shape \(32, 4\), the base model asks for \(4, 32\)",
        ),
        (lambda t: t.pop(KEY), "missing tensor '.*up_proj.lora_A.weight'"),
        (lambda t: t.update(x=torch.ones(1)), "unexpected tensor 'x'"),
    ],
)
def test_a_wrong_tensor_is_named_and_the_model_stays_as_it_was(tmp_path, change, words):
    folder, model = saved(tmp_path), random_model()
    with_tensors(folder, change)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(folder, model)
    assert adapted_layers(model) == {} and adapter_names(model) == []
    assert torch.equal(model(TOKENS), random_model()(TOKENS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 2**16}, r"has shape .*, the base model asks for \(.*65536"),
        ({"rank_pattern": {"up_proj": 2**16}}, r"has shape .*, the base model asks for \(.*65536"),
        ({"target_modules": "(([a-z._0-9])+)+!"}, "a: pattern .* does not end within 0.5 seconds"),
        ({"rank_pattern": {"(([a-z._0-9])+)+!": 4}}, "a: pattern .* does not end within 0.5 seconds"),
        ({"target_modules": "("}, "a: pattern '.' *: no regular expression"),
    ],
)
def test_sizes_and_patterns_from_elsewhere_are_bounded(tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    folder, model = saved(tmp_path), random_model()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(folder, model)
    assert adapted_layers(model) == {}


def test_packed_weights_must_hold_ternary_codes(tmp_path):
    folder = saved(tmp_path, bits=1.58)
    with_tensors(folder, lambda t: t[KEY.replace(".weight", ".ternary")].fill_(0b11))
    with pytest.raises(CheckpointError, match="lora_A.ternary' holds what is no ternary weight"):
        load_adapter(folder, random_model())


def test_an_adapter_that_is_not_finite_is_never_written(tmp_path):
    model, config = trained()
    next(iter(adapter_updates(model).values())).lora_B[0, 0] = float("nan")
    with pytest.raises(
        CheckpointError, match="a is not written: tensor '.*lora_B' holds numbers that are not"
    ):
        save_adapter(tmp_path / "a", model, config, base="b")
    assert not (tmp_path / "a").exists()


def test_one_name_twice_is_refused():
    model, config = trained()
    with pytest.raises(CheckpointError, match="already"):
        attach(model, config)


def test_ternary_weights_by_hand():
    weight = torch.tensor([[0.5, -0.1, -0.9, 0.1]], requires_grad=True)  # gamma 0.4
    used = ternary(weight)
    assert torch.allclose(used, torch.tensor([[0.4, 0.0, -0.4, 0.0]]))
    (used * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 64)])
def test_packed_weights_come_back_to_the_bit(shape):
    weight = torch.randn(shape)
    stored = pack("k", weight)
    back = unpack(stored["k.ternary"], stored["k.scale"], weight.shape)
    assert torch.equal(back, ternary(weight)) and torch.equal(ternary(back), back)
    assert torch.equal(quantise(back)[0], quantise(weight)[0])
    assert is_packed(stored["k.ternary"]) and not is_packed(stored["k.ternary"] | 3)


def test_a_ternary_adapter_loads_exactly_and_an_8b_one_is_small(tmp_path):
    model, config = trained(bits=1.58, targets=("q_proj", "up_proj"))
    save_adapter(tmp_path / "a", model, config, base="b")
    other = random_model()
    assert load_adapter(tmp_path / "a", other) == config
    assert torch.equal(other(TOKENS), model(TOKENS))
    save_adapter(tmp_path / "b", other, config, base="b")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    full, _ = trained(targets=("q_proj", "up_proj"))
    assert not torch.equal(full(TOKENS), model(TOKENS))
    for a, b in zip(adapter_updates(other).values(), adapter_updates(model).values(), strict=True):
        assert torch.equal(a.delta(), b.delta())
    # Llama-3.1-8B, r 16, all linear layers of 32 blocks: (in, out) of each
    layers = [
        (4096, 4096),
        (4096, 1024),
        (4096, 1024),
        (4096, 4096),
        (4096, 14336),
        (4096, 14336),
        (14336, 4096),
    ]
    assert 32 * sum(16 * (a + b) for a, b in layers) / 4 < 12 * 2**20


def test_dropout_acts_in_training_alone():
    """On the update: without it, dropout has nothing to act on."""
    model, _ = trained(dropout=0.5)
    still = model(TOKENS)
    assert torch.equal(model(TOKENS), still)
    model.train()
    assert not torch.equal(model(TOKENS), still) and not torch.equal(model(TOKENS), model(TOKENS))
    set_adapters(model, [None, None])
    assert torch.equal(model(TOKENS), random_model()(TOKENS))
