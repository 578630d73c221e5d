"""LoRA by module replacement: several adapters on one model, chosen per row of a batch; the PEFT layout on disk.

Source: Hu et al., "LoRA" (arXiv 2106.09685), y = W x + scale B A x with scale = alpha / R, or alpha / sqrt(R) (rsLoRA, arXiv 2312.03732);
initialisation and file layout as in PEFT. Ternary weights: `cfgsafe.ternary`.
Deviation: the adapter's weights and arithmetic stay in float32 whatever the base's dtype is, as PEFT's `autocast_adapter_dtype` does.

Run it: python infer.py --model M --adapter A --prompt "Hello!"
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cfgsafe.checkpoint import new_folder, open_weights
from cfgsafe.errors import CheckpointError
from cfgsafe.files import read_json
from cfgsafe.llama import Llama
from cfgsafe.ternary import pack, ternary, unpack

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD = "lm_head"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULT = "default"
TIED = "the adapter sits on lm_head, which is tied to the embedding; it cannot be merged"
# Settings of adapter_config.json that we honour, or that change nothing; any other one that is set is refused by name.
HONOURED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "cfgsafe_bits",
}
HARMLESS = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "megatron_core",
}
HARMLESS |= {"qalora_group_size", "runtime_config", "eva_config", "layers_pattern", "ensure_weight_tying"}
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights


@dataclass(frozen=True)
class LoRAConfig:
    """Rank R, alpha and dropout of an adapter, and the linear layers it sits on."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = (
        TARGETS  # suffixes of layer names, or one regular expression for whole names
    )
    rslora: bool = False
    rank_pattern: dict[str, int] = field(
        default_factory=dict
    )  # regular expression for the end of a layer's name -> its own rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bits: float | None = None  # 1.58: ternary weights

    def covers(self, name: str) -> bool:
        """Whether the layer `name` ("model.layers.0.self_attn.q_proj") carries this adapter."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def shape(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the layer `name`."""
        own = lambda pattern, default: next(
            (v for key, v in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default
        )
        rank, alpha = own(self.rank_pattern, self.rank), own(self.alpha_pattern, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


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
        """A and B as they are used: ternary ones are quantised, with a straight-through gradient."""
        return (ternary(self.lora_A), ternary(self.lora_B)) if self.ternary else (self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return LowRank.apply(self.dropout(x), *self.weights(), self.scale)

    def delta(self) -> Tensor:
        """What the update adds to the layer's weight, (out, in) float32."""
        a, b = self.weights()
        return self.scale * (b.detach() @ a.detach())


class LowRank(torch.autograd.Function):
    """scale B A x in the adapter's dtype. What the backward keeps of x is x itself, which q, k and v share, not a float32 copy for each."""

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
        rows = lambda t: t.flatten(0, -2)
        grad_a = rows(to_inner).T @ rows(x).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = rows(grad).T @ rows(inner) if ctx.needs_input_grad[2] else None
        return (to_inner @ a).to(x.dtype) if ctx.needs_input_grad[0] else None, grad_a, grad_b, None


class LoRALinear(nn.Module):
    """A frozen linear layer plus the updates of the attached adapters.

    `shares`, the model's own dictionary, says how much of each adapter each row takes: (B,), or one number for all rows.
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
    """Put a fresh adapter on the layers `config` covers, in place, for all rows; only its parameters, which are returned, stay trainable.

    It lies on `device`, by default on that of the layer. Raises CheckpointError when the name is taken or no layer is covered.
    """
    model.requires_grad_(False)
    layers = adapted_layers(model)
    if not re.fullmatch(r"[\w-]+", name):
        raise CheckpointError(f"an adapter cannot be called {name!r}: letters, digits, - and _ only")
    if name in model.shares:
        raise CheckpointError(
            f"the model already carries an adapter {name!r}; detach it first or choose another name"
        )
    parameters = []
    for path, module in list(model.named_modules()):
        path = path.removesuffix(".base")
        if not isinstance(module, nn.Linear) or not config.covers(path):
            continue
        if path not in layers:
            layers[path] = LoRALinear(module, model.shares)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[path])
        update = Update(module, *config.shape(path), config, device or module.weight.device)
        layers[path].updates[name] = update
        parameters += [update.lora_A, update.lora_B]
    if not parameters:
        raise CheckpointError(
            f"no linear layer of the model is called as the adapter's target_modules {config.targets} say"
        )
    model.shares[name] = 1.0
    return parameters


def detach(model: Llama) -> None:
    """Give the model its plain layers back, to the bit."""
    for path, layer in adapted_layers(model).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    model.shares.clear()


def set_adapters(model: Llama, names: list[str | None] | None) -> None:
    """Let row b of the following batches use the adapter names[b], or none; None: every row uses every attached adapter."""
    for name in model.shares:
        rows = [1.0] if names is None else [float(n == name) for n in names]
        uniform = len(set(rows)) == 1  # where all rows agree there is nothing to multiply
        model.shares[name] = rows[0] if uniform else torch.tensor(rows, device=model.device)


def adapter_names(model: Llama) -> list[str]:
    """The attached adapters."""
    return sorted(model.shares)


def adapted_layers(model: Llama) -> dict[str, LoRALinear]:
    """Layer name -> the layers that carry adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_updates(model: Llama, name: str = DEFAULT) -> dict[str, Update]:
    """Layer name -> the update of adapter `name`."""
    return {
        path: layer.updates[name] for path, layer in adapted_layers(model).items() if name in layer.updates
    }


def merge(model: Llama, name: str = DEFAULT) -> dict[str, Tensor]:
    """Add adapter `name` to the weights, in float32, rounded once; the layers are plain again. Returns the old weights, for `unmerge`."""
    if HEAD in adapter_updates(model, name) and model.config.tie_word_embeddings:
        raise CheckpointError(TIED)
    before = {}
    for path, update in adapter_updates(model, name).items():
        weight = model.get_submodule(path).base.weight
        before[path] = weight.data
        weight.data = merged(weight.data, update)
    detach(model)
    return before


def unmerge(model: Llama, before: dict[str, Tensor]) -> None:
    """Put the old weights back, to the bit."""
    for path, weight in before.items():
        model.get_submodule(path).weight.data = weight


def merged(weight: Tensor, update: Update) -> Tensor:
    """weight + scale B A, computed in float32, in the weight's dtype."""
    return (weight.float() + update.delta().to(weight.device)).to(weight.dtype)


def adapter_parameters(model: Llama, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """PEFT's tensor name, without ".weight" -> the parameter, of adapter `name`."""
    return {
        f"{PREFIX}{path}.{part}": getattr(update, part)
        for path, update in adapter_updates(model, name).items()
        for part in ("lora_A", "lora_B")
    }


def save_adapter(
    folder: str | Path, model: Llama, config: LoRAConfig, *, base: str, name: str = DEFAULT
) -> None:
    """Write an attached adapter as a PEFT folder."""
    write_adapter(folder, adapter_parameters(model, name), config, base=base)


def write_adapter(folder: str | Path, weights: dict[str, Tensor], config: LoRAConfig, *, base: str) -> None:
    """Write `weights`, named as in `adapter_parameters`, as a PEFT folder, whole or not at all; PEFT does not read ternary ones."""
    tensors = {}
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
        for part in ("lora_A", "lora_B"):
            fill(getattr(update, part), found, f"{PREFIX}{path}.{part}", update.ternary, folder)
    if found:
        raise CheckpointError(
            f"{folder}: unexpected tensor {min(found)!r}; the adapter is for another base model"
        )
    model.requires_grad_(False).eval()
    return config


def fill(parameter: nn.Parameter, found: dict[str, Tensor], key: str, is_ternary: bool, folder: Path) -> None:
    """Move one stored weight out of `found` into `parameter`. Raises CheckpointError naming the tensor."""
    names = [f"{key}.ternary", f"{key}.scale"] if is_ternary else [f"{key}.weight"]
    for name in names:
        if name not in found:
            raise CheckpointError(f"{folder}: missing tensor {name!r}")
    stored = [found.pop(name) for name in names]
    weight = unpack(*stored, parameter.shape) if is_ternary else stored[0]
    if weight is None or weight.shape != parameter.shape:
        asked = tuple(parameter.shape)
        raise CheckpointError(
            f"{folder}: tensor {names[0]!r} has shape {tuple(stored[0].shape)}, the base model asks for {asked}"
        )
    parameter.data.copy_(weight)


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
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
            f"{path}: init_lora_weights={kind!r} changes the base's weights; convert the adapter to plain LoRA"
        )
    for name, value in raw.items():
        if (
            name not in HONOURED | HARMLESS | {"init_lora_weights"}
            and value
            and (name, value) != ("bias", "none")
        ):
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
    if (
        odd := [t for t in targets if t.split(".")[-1] not in (*TARGETS, HEAD)]
        if isinstance(targets, list)
        else []
    ):
        raise CheckpointError(
            f"{path}: target_modules names {odd[0]!r}; supported are {', '.join((*TARGETS, HEAD))}"
        )
    return LoRAConfig(
        rank,
        alpha,
        raw.get("lora_dropout") or 0.0,
        targets if isinstance(targets, str) else tuple(targets),
        bool(raw.get("use_rslora")),
        raw.get("rank_pattern") or {},
        raw.get("alpha_pattern") or {},
        raw.get("cfgsafe_bits"),
    )


def _config_json(config: LoRAConfig, base: str) -> dict:
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
    return written | ({"cfgsafe_bits": config.bits} if config.bits else {})
