"""The settings of an adapter: `adapter_config.json` as PEFT writes and reads it.

Source: `LoraConfig` of PEFT.
Deviations: a setting that we do not follow is refused, not ignored. `cfgsafe_bits`, which PEFT does not
know, is for ternary weights. Regular expressions are matched in bounded time.

Run it: python -m pytest tests/test_lora_config.py
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cfgsafe.errors import CheckpointError
from cfgsafe.patterns import full_matches
from cfgsafe.settings import (
    FLAG,
    TEXT,
    above_zero,
    either,
    integer,
    list_of,
    number,
    object_of,
    one_of,
    read_settings,
    shown,
)
from cfgsafe.ternary import BITS

T = TypeVar("T")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
CONFIG = "adapter_config.json"
RANK, ALPHA = integer(1, 2**16), above_zero(1e6)
KINDS = {  # the settings that we follow
    "peft_type": one_of("LORA"),
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": number(0, 1),
    "target_modules": either(TEXT, list_of(TEXT)),
    "use_rslora": FLAG,
    "rank_pattern": object_of(RANK),
    "alpha_pattern": object_of(ALPHA),
    "cfgsafe_bits": one_of(BITS),
    "init_lora_weights": one_of(True, False, "gaussian", "orthogonal", "eva"),  # others change the base
    "bias": one_of("none"),
}
NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
# Settings that change nothing when an adapter is used. Any other one is an error.
HARMLESS = set(
    "task_type base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core "
    "qalora_group_size runtime_config eva_config layers_pattern ensure_weight_tying".split()
)


@dataclass(frozen=True)
class LoRAConfig:
    """Rank R, alpha and dropout of an adapter, and the linear layers that carry it."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    # Ends of layer names, or one regular expression for whole names.
    targets: tuple[str, ...] | str = TARGETS
    rslora: bool = False
    # Regular expression for the end of a layer's name -> the rank or alpha of that layer.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bits: float | None = None  # 1.58: ternary weights

    def layers(self, names: Collection[str]) -> dict[str, tuple[int, float]]:
        """Layer -> (rank, scale), for those of the layers `names` that carry this adapter.

        A name is like "model.layers.0.self_attn.q_proj". Raises what `full_matches` raises.
        """
        if isinstance(self.targets, str):
            matched = full_matches([self.targets], names)[self.targets]
            covered = [name for name in names if name in matched]
        else:
            ends = tuple(f".{target}" for target in self.targets)
            covered = [name for name in names if f".{name}".endswith(ends)]
        ranks = _first_matches(self.rank_pattern, covered, self.rank)
        alphas = _first_matches(self.alpha_pattern, covered, self.alpha)
        found = {}
        for name in covered:
            rank = ranks[name]
            found[name] = (rank, alphas[name] / (math.sqrt(rank) if self.rslora else rank))
        return found


def _first_matches(patterns: dict[str, T], names: Collection[str], default: T) -> dict[str, T]:
    """Layer -> the value of the first pattern that matches the end of its name."""
    whole = {rf"(.*\.)?({pattern})": value for pattern, value in patterns.items()}
    matched = full_matches(whole, names)
    found = dict.fromkeys(names, default)
    for pattern in reversed(whole):  # so that the first one wins
        for name in matched[pattern]:
            found[name] = whole[pattern]
    return found


def read_adapter_config(folder: Path) -> LoRAConfig:
    """The settings of a PEFT folder. Raises CheckpointError naming one that is missing or not supported."""
    path = folder / CONFIG
    raw = read_settings(path, KINDS, NEEDED)
    for name, value in raw.items():
        unset = value is False or value in ("", [], {})  # 0 is none of them: it may be the number of a layer
        if name not in KINDS and name not in HARMLESS and not unset:
            raise CheckpointError(f"{path}: {name}={shown(value)} is not supported")
    targets = raw["target_modules"]
    if targets == "all-linear":
        targets = list(TARGETS)
    for target in targets if isinstance(targets, list) else ():
        if target.split(".")[-1] not in (*TARGETS, HEAD):
            supported = ", ".join((*TARGETS, HEAD))
            raise CheckpointError(f"{path}: target_modules names {shown(target)}; supported are {supported}")
    return LoRAConfig(
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=raw.get("use_rslora", False),
        rank_pattern=raw.get("rank_pattern", {}),
        alpha_pattern=raw.get("alpha_pattern", {}),
        bits=raw.get("cfgsafe_bits"),
    )


def config_json(config: LoRAConfig, base: str) -> dict:
    """The `adapter_config.json` of an adapter, as PEFT reads it."""
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": config.rslora,
        "use_dora": False,
        "modules_to_save": None,
    }
    if config.bits:
        written["cfgsafe_bits"] = config.bits
    return written
