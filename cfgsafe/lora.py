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
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cfgsafe.errors import CheckpointError
from cfgsafe.folders import new_folder
from cfgsafe.llama import Llama
from cfgsafe.lora_config import CONFIG, HEAD, LoRAConfig, config_json, read_adapter_config
from cfgsafe.products import Linear, release
from cfgsafe.settings import shown
from cfgsafe.ternary import is_packed, pack, ternary, unpack
from cfgsafe.weights import Stored, check_finite, check_floats, check_shapes, read_header, read_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
DEFAULT = "default"
TIED = "the adapter sits on lm_head, which is tied to the embedding; it cannot be merged"
PARTS = ("lora_A", "lora_B")


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

    def __init__(self, base: Linear, shares: dict[str, Tensor | float]):
        super().__init__()
        self.base: Linear = base.requires_grad_(False)
        self.updates = nn.ModuleDict()
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        return self._updated(self.base(x), x)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """As `products.Linear.update`."""
        return self._updated(self.base.update(y, x), x)

    def _updated(self, y: Tensor, x: Tensor) -> Tensor:
        total = y
        for name, update in self.updates.items():
            share = self.shares[name]
            if isinstance(share, Tensor):
                share = share.view(-1, *[1] * (x.dim() - 1))
                total = total + (share * update(x)).masked_fill(share == 0, 0)  # 0 times NaN would be NaN
            elif share:
                total = torch.add(total, update(x), alpha=share)
        return total.to(y.dtype)


def bare_weight(layer: nn.Module) -> Tensor | None:
    """W of a layer that now computes W x and nothing else; None if it has a bias or an adapter in use."""
    if isinstance(layer, LoRALinear):
        shares = [layer.shares[name] for name in layer.updates]
        in_use = any(isinstance(share, Tensor) or share for share in shares)
        return None if in_use else bare_weight(layer.base)
    return layer.weight if isinstance(layer, nn.Linear) and layer.bias is None else None


def attach(
    model: Llama, config: LoRAConfig, name: str = DEFAULT, *, device: str | None = None
) -> list[nn.Parameter]:
    """Put a fresh adapter on the layers that `config` covers, in place; all rows use it.

    Returns its parameters, the only ones that stay trainable. They are on `device`, by default on
    that of each layer. Raises CheckpointError when the name is taken or no layer is covered; the
    model is then as it was.
    """
    return _attach(model, config, name, covered_layers(model, config, name), device)


def covered_layers(model: Llama, config: LoRAConfig, name: str) -> dict[str, tuple[int, float]]:
    """Layer -> (rank, scale) of an adapter that is to be attached as `name`. Raises as `attach` does."""
    if not re.fullmatch(r"[\w-]+", name):
        raise CheckpointError(f"an adapter cannot be called {name!r}: letters, digits, - and _ only")
    if name in model.shares:
        raise CheckpointError(
            f"the model already carries an adapter {name!r}; detach it first or choose another name"
        )
    covered = config.layers(list(linear_layers(model)))
    if not covered:
        raise CheckpointError(
            "no linear layer of the model is called as the adapter's target_modules "
            f"{shown(config.targets)} say"
        )
    return covered


def _attach(
    model: Llama, config: LoRAConfig, name: str, covered: dict[str, tuple[int, float]], device: str | None
) -> list[nn.Parameter]:
    model.requires_grad_(False)
    layers, linear = adapted_layers(model), linear_layers(model)
    parameters: list[nn.Parameter] = []
    for path, (rank, scale) in covered.items():
        module = linear[path]
        if path not in layers:
            layers[path] = LoRALinear(module, model.shares)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[path])
        update = Update(module, rank, scale, config, torch.device(device or module.weight.device))
        layers[path].updates[name] = update
        parameters += [update.lora_A, update.lora_B]
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


def linear_layers(model: Llama) -> dict[str, Linear]:
    """Layer name -> linear layer, with or without adapters."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found[path.removesuffix(".base")] = module
    return found


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
    release(model.groups())
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
    release(model.groups())
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

    PEFT itself does not read ternary weights. Raises InputError when the folder cannot be written, and
    CheckpointError when a weight is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        weight = weight.detach().cpu()
        check_finite(key, weight, f"{folder} is not written")
        tensors |= pack(key, weight) if config.bits else {f"{key}.weight": weight.contiguous()}
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config_json(config, base), indent=2) + "\n")


def load_adapter(
    folder: str | Path, model: Llama, name: str = DEFAULT, *, device: str | None = None
) -> LoRAConfig:
    """Attach the adapter of a PEFT folder to `model`, on `device` as in `attach`.

    Raises CheckpointError naming the setting or tensor that does not fit; the model is then as it was.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    try:
        covered = covered_layers(model, config, name)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    stored = stored_adapter(folder)
    check_shapes(stored, _stored_shapes(model, config, covered), folder, "the base model")
    weights = read_adapter_tensors(folder)
    _attach(model, config, name, covered, device)
    for path, update in adapter_updates(model, name).items():
        for part in PARTS:
            parameter, key = update.get_parameter(part), f"{PREFIX}{path}.{part}"
            if update.ternary:
                weight = unpack(weights[f"{key}.ternary"], weights[f"{key}.scale"], parameter.shape)
            else:
                weight = weights[f"{key}.weight"]
            parameter.data.copy_(weight)
    model.requires_grad_(False).eval()
    return config


def _stored_shapes(
    model: Llama, config: LoRAConfig, covered: dict[str, tuple[int, float]]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in the file of an adapter on the layers `covered` of `model`."""
    linear = linear_layers(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, (rank, _) in covered.items():
        sizes = ((rank, linear[path].in_features), (linear[path].out_features, rank))
        for part, (rows, columns) in zip(PARTS, sizes, strict=True):
            key = f"{PREFIX}{path}.{part}"
            if config.bits is None:
                shapes[f"{key}.weight"] = (rows, columns)
            else:
                shapes |= {f"{key}.ternary": (-(-rows * columns // 4),), f"{key}.scale": (1,)}
    return shapes


def stored_adapter(folder: Path) -> dict[str, Stored]:
    """Name -> how it is stored, of a PEFT folder's tensors: floats, and bytes for ternary weights.

    Raises CheckpointError.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{path}: not found; only safetensors adapters are read")
    stored = read_header(path)
    floats = {}
    for name, place in stored.items():
        if not (name.endswith(".ternary") and place.dtype == "U8"):
            floats[name] = place
    check_floats(floats)
    return stored


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of a PEFT folder, float32 but for packed ones. Raises CheckpointError."""
    weights = {}
    for name, tensor in read_tensors(stored_adapter(folder)):
        weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        check_finite(name, weights[name], folder / WEIGHTS)
        if name.endswith(".ternary") and not is_packed(tensor):
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {shown(name)} holds what is no ternary weight")
    return weights
