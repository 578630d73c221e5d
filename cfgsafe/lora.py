"""LoRA by module replacement, in the PEFT layout on disk.

Source: Hu et al., "LoRA" (arXiv 2106.09685), y = W x + (alpha / R) B A x; initialisation and file layout as in PEFT.
Deviation: the adapter's weights and arithmetic stay in float32 whatever the base's dtype is, as PEFT's `autocast_adapter_dtype` does.

Run it: python infer.py --model M --adapter A --prompt "Hello!"
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cfgsafe.checkpoint import new_folder, open_weights
from cfgsafe.errors import CheckpointError, read_json
from cfgsafe.llama import Llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRAConfig:
    """Rank R, alpha, dropout of the adapter's input, and the suffixes of the linear layers it sits on."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        device = base.weight.device
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = self.dropout(x.float()) @ self.lora_A.T @ self.lora_B.T
        return self.base(x) + (self.scale * update).to(x.dtype)


def attach(model: Llama, config: LoRAConfig) -> list[nn.Parameter]:
    """Replace the target layers of `model` in place; only the adapter's parameters, which are returned, stay trainable."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                raise CheckpointError("the model already carries an adapter; detach it first")
            if name in config.targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, config))
    return [p for layer in _layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def detach(model: Llama) -> None:
    """Give the model its plain layers back, to the bit."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.base)


def adapter_tensors(model: Llama) -> dict[str, Tensor]:
    """PEFT's names -> the adapter's tensors."""
    return {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part) for name, layer in _layers(model).items() for part in ("lora_A", "lora_B")
    }


def save_adapter(folder: str | Path, model: Llama, config: LoRAConfig, *, base: str) -> None:
    """Write the attached adapter as a PEFT folder, whole or not at all."""
    with new_folder(folder) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in adapter_tensors(model).items()}, temporary / WEIGHTS)
        written = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank, "lora_alpha": config.alpha,
            "lora_dropout": config.dropout, "target_modules": list(config.targets), "bias": "none", "inference_mode": True,
            "use_rslora": False, "use_dora": False, "modules_to_save": None,
        }  # fmt: skip
        (temporary / CONFIG).write_text(json.dumps(written, indent=2) + "\n")


def load_adapter(folder: str | Path, model: Llama) -> LoRAConfig:
    """Attach the adapter of a PEFT folder to `model`. Raises CheckpointError naming the setting or tensor that does not fit."""
    folder = Path(folder)
    raw = read_json(folder / CONFIG)
    for name, supported in {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None}.items():
        if raw.get(name, supported) != supported:
            raise CheckpointError(f"{folder / CONFIG}: {name}={raw[name]!r} is not supported, only {supported!r} is")
    for name in ("rank_pattern", "alpha_pattern"):
        if raw.get(name):
            raise CheckpointError(f"{folder / CONFIG}: {name} is not supported")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        raise CheckpointError(f"{folder / CONFIG}: target_modules must be a list out of {', '.join(TARGETS)}")
    config = LoRAConfig(raw["r"], raw["lora_alpha"], raw.get("lora_dropout", 0.0), tuple(targets))
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / WEIGHTS}: not found")
    with open_weights(folder / WEIGHTS) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    attach(model, config)
    for name, parameter in adapter_tensors(model).items():
        if name not in found:
            raise CheckpointError(f"{folder}: missing tensor {name!r}")
        if found[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {tuple(found[name].shape)}, the model asks for {tuple(parameter.shape)}"
            )
        parameter.data.copy_(found.pop(name))
    if found:
        raise CheckpointError(f"{folder}: unexpected tensor {min(found)!r}")
    model.requires_grad_(False).eval()
    return config


def _layers(model: Llama) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
