"""LoRA by module replacement: several adapters on one model, chosen per row; files as in PEFT.

Source: Hu et al., "LoRA" (arXiv 2106.09685): y = W x + scale B A x, scale = alpha / R, or alpha /
sqrt(R) with rsLoRA (arXiv 2312.03732). Initialisation and files are as in PEFT. `cfgsafe.ternary`
has ternary weights.
Deviation: the weights and the arithmetic of the adapter are float32 whatever the base's data type
is, as with PEFT's `autocast_adapter_dtype`.
Shapes: B rows, R rank.

Run it: python infer.py --model M --adapter A --prompt "Hello!"
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cfgsafe.checkpoint import open_weights
from cfgsafe.errors import CheckpointError
from cfgsafe.files import read_json
from cfgsafe.folders import new_folder
from cfgsafe.llama import Llama
from cfgsafe.ternary import pack, ternary, unpack

T = TypeVar("T")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULT = "default"
TIED = "the adapter sits on lm_head, which is tied to the embedding; it cannot be merged"
# Settings of adapter_config.json that we follow, and others that change nothing. Any other one is an error.
FOLLOWED = set(
    "peft_type r lora_alpha lora_dropout target_modules use_rslora rank_pattern alpha_pattern cfgsafe_bits "
    "init_lora_weights".split()
)
HARMLESS = set(
    "task_type base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core "
    "qalora_group_size runtime_config eva_config layers_pattern ensure_weight_tying".split()
)
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base
PARTS = ("lora_A", "lora_B")


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

    def covers(self, name: str) -> bool:
        """Whether the layer `name` ("model.layers.0.self_attn.q_proj") carries this adapter."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def shape(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the layer `name`."""
        rank = _first_match(self.rank_pattern, name, self.rank)
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _first_match(patterns: dict[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches the end of a layer's name."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


class Update(nn.Module):
    """One adapter's low-rank update of one layer: A (R, in), B (out, R)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, config: LoRAConfig, device: torch.device):
        super().__init__()
        self.scale = scale
        self.ternary = config.bits is not None
        self.dropout = nn.Dropout(config.dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def weights(self) -> tuple[Tensor, Tensor]:
        """A and B; ternary ones are quantised, with a straight-through gradient."""
        if self.ternary:
            return ternary(self.lora_A), ternary(self.lora_B)
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return LowRank.apply(self.dropout(x), *self.weights(), self.scale)

    def delta(self) -> Tensor:
        """What the update adds to the layer's weight, (out, in) float32."""
        a, b = self.weights()
        return self.scale * (b.detach() @ a.detach())


class LowRank(torch.autograd.Function):
    """scale B A x in the adapter's data type.

    The backward needs x. It is kept in its own data type: one tensor, which q, k and v share, instead of
    three float32 copies.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = scale * (x.to(a.dtype) @ a.T)  # (..., R)
        ctx.save_for_backward(x, a, b, inner)
        ctx.scale = scale
        return inner @ b.T

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, a, b, inner = ctx.saved_tensors
        to_inner = ctx.scale * (grad @ b)  # (..., R)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (to_inner @ a).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_a = to_inner.flatten(0, -2).T @ x.flatten(0, -2).to(a.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = grad.flatten(0, -2).T @ inner.flatten(0, -2)
        return grad_x, grad_a, grad_b, None


class LoRALinear(nn.Module):
    """A frozen linear layer plus the updates of the attached adapters.

    `shares` is the dictionary of the model: the share of each adapter in each row, (B,), or one
    number for all rows.
    """

    def __init__(self, base: nn.Linear, shares: dict[str, Tensor | float]):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.updates = nn.ModuleDict()
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        total = y
        for name, update in self.updates.items():
            share = self.shares[name]
            if isinstance(share, Tensor):
                total = total + share.view(-1, *[1] * (x.dim() - 1)) * update(x)
            elif share:
                total = torch.add(total, update(x), alpha=share)
        return total.to(y.dtype)


def attach(
    model: Llama, config: LoRAConfig, name: str = DEFAULT, *, device: str | None = None
) -> list[nn.Parameter]:
    """Put a fresh adapter on the layers that `config` covers, in place; all rows use it.

    Returns its parameters, the only ones that stay trainable. They are on `device`, by default on
    that of each layer. Raises CheckpointError when the name is taken or no layer is covered.
    """
    model.requires_grad_(False)
    layers = adapted_layers(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise CheckpointError(f"an adapter cannot be called {name!r}: letters, digits, - and _ only")
    if name in model.shares:
        raise CheckpointError(
            f"the model already carries an adapter {name!r}; detach it first or choose another name"
        )
    parameters: list[nn.Parameter] = []
    for path, module in list(model.named_modules()):
        path = path.removesuffix(".base")
        if not isinstance(module, nn.Linear) or not config.covers(path):
            continue
        if path not in layers:
            layers[path] = LoRALinear(module, model.shares)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[path])
        rank, scale = config.shape(path)
        update = Update(module, rank, scale, config, torch.device(device or module.weight.device))
        layers[path].updates[name] = update
        parameters += [update.lora_A, update.lora_B]
    if not parameters:
        raise CheckpointError(
            f"no linear layer of the model is called as the adapter's target_modules {config.targets} say"
        )
    model.shares[name] = 1.0
    return parameters


def detach(model: Llama) -> None:
    """Take all adapters off; the layers are what they were before, to the bit."""
    for path, layer in adapted_layers(model).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    model.shares.clear()


def set_adapters(model: Llama, names: list[str | None] | None) -> None:
    """Let row b of the following batches use the adapter names[b], or none.

    With None in place of the list, each row uses all attached adapters.
    """
    for name in model.shares:
        rows = [1.0] if names is None else [float(other == name) for other in names]
        uniform = len(set(rows)) == 1  # where all rows agree there is nothing to multiply
        model.shares[name] = rows[0] if uniform else torch.tensor(rows, device=model.device)


def adapter_names(model: Llama) -> list[str]:
    """Names of the attached adapters, sorted."""
    return sorted(model.shares)


def adapted_layers(model: Llama) -> dict[str, LoRALinear]:
    """Layer name -> layer, for the layers that carry adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_updates(model: Llama, name: str = DEFAULT) -> dict[str, Update]:
    """Layer name -> the update of adapter `name`."""
    updates = {}
    for path, layer in adapted_layers(model).items():
        update = layer.updates[name] if name in layer.updates else None
        if isinstance(update, Update):
            updates[path] = update
    return updates


def merge(model: Llama, name: str = DEFAULT) -> dict[str, Tensor]:
    """Add adapter `name` to the weights, in float32, rounded once; then take all adapters off.

    Returns the old weights, for `unmerge`. Raises CheckpointError when the head is tied and has an
    adapter.
    """
    layers, updates = adapted_layers(model), adapter_updates(model, name)
    if HEAD in updates and model.config.tie_word_embeddings:
        raise CheckpointError(TIED)
    before = {}
    for path, update in updates.items():
        weight = layers[path].base.weight
        before[path] = weight.data
        weight.data = merged(weight.data, update)
    detach(model)
    return before


def unmerge(model: Llama, before: dict[str, Tensor]) -> None:
    """Put the old weights back, to the bit."""
    for path, weight in before.items():
        model.get_parameter(f"{path}.weight").data = weight


def merged(weight: Tensor, update: Update) -> Tensor:
    """weight + scale B A, computed in float32, in the weight's dtype."""
    return (weight.float() + update.delta().to(weight.device)).to(weight.dtype)


def adapter_parameters(model: Llama, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """Name of the tensor in PEFT, without ".weight" -> parameter, for adapter `name`."""
    parameters = {}
    for path, update in adapter_updates(model, name).items():
        for part in PARTS:
            parameters[f"{PREFIX}{path}.{part}"] = update.get_parameter(part)
    return parameters


def save_adapter(
    folder: str | Path, model: Llama, config: LoRAConfig, *, base: str, name: str = DEFAULT
) -> None:
    """Write an attached adapter as a PEFT folder."""
    write_adapter(folder, adapter_parameters(model, name), config, base=base)


def write_adapter(
    folder: str | Path, weights: Mapping[str, Tensor], config: LoRAConfig, *, base: str
) -> None:
    """Write `weights`, named as in `adapter_parameters`, as a PEFT folder, whole or not at all.

    PEFT itself does not read ternary weights. Raises InputError when the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        weight = weight.detach().cpu()
        tensors |= pack(key, weight) if config.bits else {f"{key}.weight": weight.contiguous()}
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(_config_json(config, base), indent=2) + "\n")


def load_adapter(
    folder: str | Path, model: Llama, name: str = DEFAULT, *, device: str | None = None
) -> LoRAConfig:
    """Attach the adapter of a PEFT folder to `model`, on `device` as in `attach`.

    Raises CheckpointError naming the setting or tensor that does not fit.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    found = read_adapter_tensors(folder)
    attach(model, config, name, device=device)
    for path, update in adapter_updates(model, name).items():
        for part in PARTS:
            key = f"{PREFIX}{path}.{part}"
            _fill(update.get_parameter(part), found, key, update.ternary, folder)
    if found:
        name = min(found)
        raise CheckpointError(f"{folder}: unexpected tensor {name!r}; the adapter is for another base model")
    model.requires_grad_(False).eval()
    return config


def _fill(
    parameter: nn.Parameter, found: dict[str, Tensor], key: str, is_ternary: bool, folder: Path
) -> None:
    """Move one stored weight from `found` into `parameter`. Raises CheckpointError naming the tensor."""
    names = [f"{key}.ternary", f"{key}.scale"] if is_ternary else [f"{key}.weight"]
    for name in names:
        if name not in found:
            raise CheckpointError(f"{folder}: missing tensor {name!r}")
    stored = [found.pop(name) for name in names]
    weight = unpack(stored[0], stored[1], parameter.shape) if is_ternary else stored[0]
    if weight is None or weight.shape != parameter.shape:
        shape, asked = tuple(stored[0].shape), tuple(parameter.shape)
        raise CheckpointError(
            f"{folder}: tensor {names[0]!r} has shape {shape}, the base model asks for {asked}"
        )
    parameter.data.copy_(weight)


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of a PEFT folder. Raises CheckpointError."""
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / WEIGHTS}: not found; only safetensors adapters are read")
    with open_weights(folder / WEIGHTS) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_adapter_config(folder: Path) -> LoRAConfig:
    """The settings of a PEFT folder. Raises CheckpointError naming one that is missing or not supported."""
    path = folder / CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported, only 'LORA' is")
    if raw.get("init_lora_weights") not in INITIALISATIONS:
        kind = raw["init_lora_weights"]
        raise CheckpointError(
            f"{path}: init_lora_weights={kind!r} changes the base's weights; "
            "convert the adapter to plain LoRA"
        )
    for name, value in raw.items():
        known = name in FOLLOWED or name in HARMLESS or (name, value) == ("bias", "none")
        if value and not known:
            raise CheckpointError(f"{path}: {name}={value!r} is not supported")
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: fields 'r' and 'lora_alpha' must be numbers")
    if targets == "all-linear":
        targets = list(TARGETS)
    if not isinstance(targets, (list, str)):
        raise CheckpointError(
            f"{path}: 'target_modules' must be a list of layer names or a regular expression"
        )
    for target in targets if isinstance(targets, list) else ():
        if target.split(".")[-1] not in (*TARGETS, HEAD):
            supported = ", ".join((*TARGETS, HEAD))
            raise CheckpointError(f"{path}: target_modules names {target!r}; supported are {supported}")
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=raw.get("lora_dropout") or 0.0,
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        bits=raw.get("cfgsafe_bits"),
    )


def _config_json(config: LoRAConfig, base: str) -> dict:
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
