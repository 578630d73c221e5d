"""Checkpoints: round trips, strictness, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from cfgsafe import load_model, load_tokenizer
from cfgsafe.checkpoint import rewrite_checkpoint, save_checkpoint
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import BASE, LEAKY
from cfgsafe.llama import Llama


def rewrite(folder, change) -> None:
    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_checkpoint(tmp_path / "m", random_model(), tokenizer_from=BASE, dtype=torch.float32)
    return tmp_path / "m"


def test_round_trip(folder):
    tokens = torch.randint(0, 2048, (1, 12))
    assert torch.equal(load_model(folder)(tokens), random_model()(tokens))


@pytest.mark.parametrize("path", [BASE, LEAKY])
def test_transformers_loads_the_demo_models(path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.randint(0, 2048, (2, 300))
    ours = load_model(path)
    with torch.no_grad():
        assert (theirs(tokens).logits - ours.head(ours(tokens))).abs().max() < 1e-4
    assert Path(path, "model.safetensors").stat().st_size <= 12 * 2**20


def test_ours_loads_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = random_model(tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    tokens = torch.randint(0, 2048, (1, 100))
    assert torch.equal(load_model(tmp_path / "m")(tokens), ours(tokens))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor 'model.norm.weight'"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "unexpected tensor 'model.extra'"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"'model.norm.weight' has shape \(3,\)"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


def sharded(folder, parts: int = 3) -> None:
    """Split a checkpoint's file into shards with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file(dict(tensors[part::parts]), folder / name)
        index |= {key: name for key, _ in tensors[part::parts]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_shards_load_and_a_missing_or_truncated_one_is_named(folder):
    sharded(folder)
    tokens = torch.randint(0, 2048, (1, 12))
    assert torch.equal(load_model(folder)(tokens), random_model()(tokens))
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: cannot be read"):
        load_model(folder)
    shard.unlink()
    with pytest.raises(
        CheckpointError,
        match="names the shard 'model-00002-of-00003.safetensors', which is not in its folder",
    ):
        load_model(folder)


def test_an_index_cannot_point_outside_the_folder(folder):
    sharded(folder, 1)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="names the shard"):
        load_model(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "",
        "..",
        "x/y.safetensors",
        "a\0.safetensors",
        3,
        None,
        "x" * 5000,
    ],
)
def test_a_shard_that_is_no_file_name_is_refused(folder, shard):
    sharded(folder, 1)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="index.json: .*(names the shard|'weight_map')") as error:
        load_model(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.pop("weight_map"), "field 'weight_map' is missing"),
        (lambda raw: raw.update(weight_map=["model.norm.weight"]), "field 'weight_map' is"),
        (lambda raw: raw["weight_map"].pop("model.norm.weight"), "holds tensor 'model.norm.weight', which"),
        (
            lambda raw: raw["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"}),
            "'model.norm.weight', which model.safetensors.index.json (does not place|places) there",
        ),
        (
            lambda raw: raw["weight_map"].update(x="model-00001-of-00003.safetensors"),
            "model-00001-of-00003.safetensors: tensor 'x', which .* places there, is missing",
        ),
    ],
)
def test_an_index_and_its_shards_must_agree(folder, change, words):
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    change(raw)
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


def with_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_hidden_layers": 10_000},
            "missing tensor 'model.layers.10.input_layernorm.weight' and 89,981 more",
        ),
        ({"num_hidden_layers": 1}, "unexpected tensor 'model.layers.1."),
        ({"hidden_size": 2**20}, "has shape .*, config.json asks for .*1048576"),
        ({"intermediate_size": 2**22}, "asks for .*4194304"),
        ({"vocab_size": 2**24}, "asks for .16777216, 32."),
        ({"head_dim": 2**14}, "asks for .32768, 32."),
        ({"num_attention_heads": 2**14}, "asks for .32, 131072."),
        ({"attention_bias": True}, "missing tensor 'model.layers.0.self_attn.k_proj.bias' and 7 more"),
    ],
)
def test_sizes_are_compared_before_anything_is_built(folder, changes, words, monkeypatch):
    built = []
    real = Llama.__init__
    monkeypatch.setattr(Llama, "__init__", lambda self, c: (built.append(c), real(self, c))[1])
    with_config(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)
    assert [config.num_hidden_layers for config in built] == [1]  # the one that tells the shapes


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_floats_are_refused(folder, kind):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(32).to(kind)}))
    with pytest.raises(CheckpointError, match="model.safetensors: tensor 'model.norm.weight' is stored as "):
        load_model(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_other_floats_are_converted(folder, kind):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.full((32,), 0.5).to(kind)}))
    assert torch.equal(load_model(folder).model.norm.weight, torch.full((32,), 0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_never_written(folder, tmp_path, bad):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad

    rewrite(folder, spoil)
    words = "model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' holds numbers that are not finite"
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)
    with pytest.raises(CheckpointError, match=words):
        rewrite_checkpoint(folder, tmp_path / "copy", lambda name, tensor: tensor)
    model = random_model()
    model.model.norm.weight[0] = bad
    with pytest.raises(CheckpointError, match="new is not written: tensor 'model.norm.weight' holds"):
        save_checkpoint(tmp_path / "new", model, tokenizer_from=BASE, dtype=torch.float32)
    assert not (tmp_path / "copy").exists() and not (tmp_path / "new").exists()


def test_a_weight_that_becomes_infinite_when_it_is_rounded_is_named(folder):
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(torch.finfo(torch.float32).max))
    load_model(folder)
    with pytest.raises(CheckpointError, match="'model.norm.weight' holds numbers that are not finite"):
        load_model(folder, dtype=torch.bfloat16)


def test_a_change_that_is_not_finite_is_never_written(folder, tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors is not written: tensor '.*' holds"):
        rewrite_checkpoint(folder, tmp_path / "copy", lambda name, tensor: tensor / 0)
    assert not (tmp_path / "copy").exists()


def test_pipes_in_place_of_files_are_not_waited_for(folder):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        kept = folder / f"{name}.kept"
        if (folder / name).exists():
            (folder / name).rename(kept)
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: .*pipe"):
            load_model(folder)
        (folder / name).unlink()
        if kept.exists():
            kept.rename(folder / name)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 2047}))
    with pytest.raises(CheckpointError, match="2048 tokens, the model's embedding only 2047 rows"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/such/folder", "../x/y/z", "owner/missing-model", "x" * 5000, "a\0b"]
)
def test_what_is_neither_folder_nor_on_the_hub_is_one_error(name):
    with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
        load_model(name)


def test_hub_ids_are_downloaded_once_with_revision_and_cache(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: (asked.append(options), str(folder))[1]
    )
    load_model("owner/model", revision="main", cache_dir=tmp_path)
    load_tokenizer("owner/model")
    assert [(options["revision"], options["cache_dir"]) for options in asked] == [
        ("main", tmp_path),
        (None, None),
    ]
    assert "*.safetensors" in asked[0]["allow_patterns"] and "*.safetensors" not in asked[1]["allow_patterns"]


PEAK = """
import resource, sys, torch, cfgsafe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = cfgsafe.load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_load_needs_the_weights_own_memory_and_little_more(tmp_path, dtype):
    """134 MB in bfloat16, twice that in float32; the largest tensor has 33.6 MB on disk."""
    model = random_model(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, vocab_size=16384)
    save_checkpoint(tmp_path / "m", model, tokenizer_from=BASE, dtype=torch.bfloat16)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    sharded(tmp_path / "m", 4)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "m"), dtype], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < size * (1 if dtype == "bfloat16" else 2) + 3 * 16384 * 1024 * 2


def test_a_load_does_not_wait_for_the_compiler(checkpoint):
    """Drawing or dividing on the meta device imports torch._dynamo, a second of every command's start."""
    line = "import sys, cfgsafe; cfgsafe.load_model(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", line, checkpoint], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_old_files_may_hold_the_rope_table_and_the_tied_head(folder):
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": torch.ones(2048, 32),
    }
    rewrite(folder, lambda t: t.update(old))
    tokens = torch.randint(0, 2048, (1, 12))
    assert torch.equal(load_model(folder)(tokens), random_model()(tokens))


def test_damaged_files_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not JSON"):
        load_model(folder)


def test_generation_config_may_name_more_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2046]}))
    assert load_model(folder).config.stop_ids == {5, 2046}
