"""adapter_config.json: which layers with which rank, and each wrong setting by its name."""

import json

import pytest

from cfgsafe.errors import CheckpointError
from cfgsafe.lora_config import LoRAConfig, config_json, read_adapter_config

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_layers_ranks_and_scales_by_hand():
    by_end = LoRAConfig(rank=4, alpha=8, targets=("q_proj", "self_attn"))
    assert by_end.layers(NAMES) == {NAMES[0]: (4, 2.0), NAMES[1]: (4, 2.0)}
    assert LoRAConfig(targets=("_proj",)).layers(NAMES) == {}  # whole parts of a name
    by_pattern = LoRAConfig(rank=4, alpha=8, rslora=True, targets=r".*\.1\..*")
    assert by_pattern.layers(NAMES) == {NAMES[1]: (4, 4.0), NAMES[2]: (4, 4.0)}


def test_the_first_pattern_that_matches_the_end_of_a_name_wins():
    patterns = {r"layers\.1\..*": 2, "q_proj": 8, "proj": 16}
    config = LoRAConfig(rank=4, alpha=8, rank_pattern=patterns, alpha_pattern={"up_proj": 3.0})
    assert config.layers(NAMES) == {NAMES[0]: (8, 1.0), NAMES[1]: (2, 4.0), NAMES[2]: (2, 1.5)}


WRONG = [
    ("r", 0),
    ("r", 10**9),
    ("r", 4.0),
    ("r", True),
    ("lora_alpha", 0),
    ("lora_alpha", -8),
    ("lora_alpha", "8"),
    ("lora_alpha", 1e300),
    ("lora_dropout", 1.5),
    ("lora_dropout", -0.1),
    ("lora_dropout", "0"),
    ("target_modules", [1]),
    ("target_modules", {"q_proj": 1}),
    ("use_rslora", "true"),
    ("use_rslora", 1),
    ("rank_pattern", [4]),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": 10**9}),
    ("alpha_pattern", {"q_proj": -1}),
    ("alpha_pattern", {"q_proj": None}),
    ("cfgsafe_bits", 2),
    ("peft_type", ["LORA"]),
    ("init_lora_weights", ["gaussian"]),
    ("init_lora_weights", 1),
    ("bias", ["none"]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(tmp_path, name, value):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config_json(LoRAConfig(), "b") | {name: value}))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: field '{name}' is .*; it must be "):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("value", [0, [0], 1, "x", {"a": 1}])
def test_a_setting_that_we_do_not_follow_is_refused_where_it_is_set(tmp_path, value):
    """layers_to_transform=0 is the first layer alone."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config_json(LoRAConfig(), "b") | {"layers_to_transform": value}))
    with pytest.raises(CheckpointError, match="layers_to_transform=.* is not supported"):
        read_adapter_config(tmp_path)
    for unset in (None, False, [], {}, ""):
        path.write_text(json.dumps(config_json(LoRAConfig(), "b") | {"layers_to_transform": unset}))
        assert read_adapter_config(tmp_path) == LoRAConfig()
