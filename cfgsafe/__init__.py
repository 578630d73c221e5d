"""Unlearn, guard and red-team a Llama-3.1 model in plain PyTorch.

model = cfgsafe.load_model("meta-llama/Llama-3.1-8B-Instruct", device="cuda", dtype=torch.bfloat16, adapter="runs/orpo/epoch-3")
tokenizer = cfgsafe.load_tokenizer("meta-llama/Llama-3.1-8B-Instruct")
"""

from pathlib import Path

import torch

from cfgsafe.checkpoint import read_config, read_model
from cfgsafe.errors import CfgsafeError, CheckpointError, ContextError, InputError
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import load_adapter
from cfgsafe.tokenizer import Tokenizer

__all__ = [
    "CfgsafeError",
    "CheckpointError",
    "ContextError",
    "InputError",
    "Llama",
    "Tokenizer",
    "load_model",
    "load_tokenizer",
]


def load_model(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | dict[str, str | Path] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Llama:
    """A Llama checkpoint of a local folder or the hub, in eval mode, without gradients.

    adapter: a PEFT folder or hub id, or several of them by name, for `cfgsafe.lora.set_adapters` to choose from per row.
    Raises CheckpointError naming the file, field or tensor that is wrong.
    """
    model = read_model(
        resolve(path_or_hub_id, revision=revision, cache_dir=cache_dir), device=device, dtype=dtype
    )
    adapters = adapter if isinstance(adapter, dict) else {} if adapter is None else {"default": adapter}
    for name, folder in adapters.items():
        load_adapter(resolve(folder, cache_dir=cache_dir), model, name)
    return model


def load_tokenizer(
    path_or_hub_id: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer and chat template of a checkpoint.

    Raises CheckpointError when a file is missing or damaged, or the tokenizer has ids that the model's embedding lacks.
    """
    folder = resolve(path_or_hub_id, revision=revision, cache_dir=cache_dir, weights=False)
    tokenizer = Tokenizer.load(folder)
    if (folder / "config.json").exists():
        rows, size = read_config(folder).vocab_size, 1 + max(tokenizer.backend.get_vocab().values())
        if size > rows:
            raise CheckpointError(
                f"{folder}: tokenizer.json has {size} tokens, the model's embedding only {rows} rows"
            )
    return tokenizer
