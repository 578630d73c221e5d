"""Loads a model and its tokenizer from a local folder or from the Hugging Face hub.

    model = cfgsafe.load_model("meta-llama/Llama-3.1-8B-Instruct", device="cuda", dtype=torch.bfloat16)
    tokenizer = cfgsafe.load_tokenizer("meta-llama/Llama-3.1-8B-Instruct")

Run it: python infer.py --model cfgsafe/demo/base --prompt "Hello!"
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from cfgsafe.checkpoint import read_model
from cfgsafe.config import read_config
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import resolve
from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT, load_adapter
from cfgsafe.tokenizer import Tokenizer


def load_model(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Llama:
    """A Llama checkpoint in eval mode, without gradients.

    adapter: a PEFT folder or hub id; or several by name, from which each request chooses one.
    Raises CheckpointError naming the file, field or tensor that is wrong.
    """
    folder = resolve(path_or_hub_id, revision=revision, cache_dir=cache_dir)
    model = read_model(folder, device=device, dtype=dtype)
    adapters: Mapping[str, str | Path] = {}
    if isinstance(adapter, Mapping):
        adapters = adapter
    elif adapter is not None:
        adapters = {DEFAULT: adapter}
    for name, source in adapters.items():
        load_adapter(resolve(source, cache_dir=cache_dir), model, name)
    return model


def load_tokenizer(
    path_or_hub_id: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer and chat template of a checkpoint.

    Raises CheckpointError when a file is missing or damaged, or a token id has no row in the
    embedding.
    """
    folder = resolve(path_or_hub_id, revision=revision, cache_dir=cache_dir, weights=False)
    tokenizer = Tokenizer.load(folder)
    if (folder / "config.json").exists():
        rows = read_config(folder).vocab_size
        size = 1 + max(tokenizer.backend.get_vocab().values())
        if size > rows:
            raise CheckpointError(
                f"{folder}: tokenizer.json has {size} tokens, the model's embedding only {rows} rows"
            )
    return tokenizer
