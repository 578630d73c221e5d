"""config.json and generation_config.json: each wrong value is one line naming file and field."""

import json
from pathlib import Path

import pytest
from conftest import config

from cfgsafe.config import LlamaConfig, read_config
from cfgsafe.errors import CheckpointError

WRONG = [
    ("vocab_size", 10**12),
    ("hidden_size", 10**9),
    ("hidden_size", -32),
    ("hidden_size", "32"),
    ("hidden_size", True),
    ("num_hidden_layers", 10**6),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 0),
    ("num_attention_heads", 2.0),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", -2),
    ("head_dim", 0),
    ("head_dim", 10**9),
    ("max_position_embeddings", 0),
    ("max_position_embeddings", 10**12),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", "1e-5"),
    ("rope_theta", 0),
    ("rope_theta", -1.0),
    ("rope_theta", [10000]),
    ("rope_scaling", "linear"),
    ("rope_parameters", [1]),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 1),
    ("attention_bias", 0),
    ("mlp_bias", {}),
    ("bos_token_id", 2048),
    ("bos_token_id", -1),
    ("bos_token_id", [1]),
    ("eos_token_id", 2048),
    ("eos_token_id", True),
    ("eos_token_id", [1, [2]]),
    ("eos_token_id", [1, -1]),
    ("model_type", ["llama"]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(CheckpointError, match=f"config.json: field '{name}' is .*; it must be "):
        LlamaConfig.from_dict(config().to_dict() | {name: value})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}
WRONG_ROPE = [
    ({"rope_type": ["llama3"]}, "'rope_type'"),
    ({"rope_type": None}, "'rope_type'"),
    ({"rope_type": "linear", "factor": 0}, "'factor'"),
    ({"rope_type": "linear", "factor": -2.0}, "'factor'"),
    ({"type": "linear", "factor": True}, "'factor'"),
    (LLAMA3 | {"factor": 10**400}, "'factor'"),
    (LLAMA3 | {"low_freq_factor": 0}, "'low_freq_factor'"),
    (LLAMA3 | {"low_freq_factor": 4}, "low_freq_factor must be below high_freq_factor"),
    (LLAMA3 | {"original_max_position_embeddings": 0}, "'original_max_position_embeddings'"),
]


@pytest.mark.parametrize(("scaling", "words"), WRONG_ROPE)
def test_a_wrong_scaling_is_named_in_both_spellings(scaling, words):
    plain = config(rope_scaling=None).to_dict()
    for changed in ({"rope_scaling": scaling}, {"rope_parameters": {**scaling, "rope_theta": 1e4}}):
        with pytest.raises(CheckpointError, match=f"config.json: rope_scaling: .*{words}|{words}"):
            LlamaConfig.from_dict(plain | changed)


def test_a_wrong_theta_in_rope_parameters_is_named():
    with pytest.raises(CheckpointError, match="rope_parameters: field 'rope_theta' is 0"):
        LlamaConfig.from_dict(
            config().to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}
        )


def test_absent_and_null_fields_have_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig()
    raw = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 4}
    optional = (
        "rms_norm_eps",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
    for given in (raw, raw | dict.fromkeys((*optional, "rope_theta", "max_position_embeddings"))):
        read = LlamaConfig.from_dict(given)
        assert (read.num_key_value_heads, read.head_dim) == (4, 16)
        assert read.rope_theta == theirs.rope_parameters["rope_theta"]
        for name in (
            "rms_norm_eps",
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "max_position_embeddings",
        ):
            assert getattr(read, name) == getattr(theirs, name), name


def folder_with(tmp_path: Path, generation: str) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    (tmp_path / "generation_config.json").write_text(generation)
    return tmp_path


@pytest.mark.parametrize("ids", ["2048", "-1", "true", "[1, 2048]", "[[1]]", '"2"', "1.0"])
def test_wrong_end_tokens_of_generation_config_are_named(tmp_path, ids):
    folder = folder_with(tmp_path, f'{{"eos_token_id": {ids}}}')
    with pytest.raises(CheckpointError, match="generation_config.json: field 'eos_token_id' is .*2,047"):
        read_config(folder)


def test_a_generation_config_without_end_tokens_leaves_those_of_the_config(tmp_path):
    assert read_config(folder_with(tmp_path, '{"eos_token_id": null}')).stop_ids == {2046}
    assert read_config(folder_with(tmp_path, "{}")).stop_ids == {2046}
