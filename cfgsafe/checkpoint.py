"""Checkpoints in the Hugging Face layout, read strictly and written whole or not at all.

Source: the layout of Hugging Face: `config.json`, `model.safetensors` (or shards that
`model.safetensors.index.json` lists), and the tokenizer's files.
Deviation: each missing, unexpected or mis-shaped tensor is an error that names it, as is one with a
number that is not finite; pickle is never read. Tensors go to the device one by one, so that loading
needs the memory of the model and of one tensor more.

Run it: python infer.py --model cfgsafe/demo/base --prompt "Hello!"
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cfgsafe.config import read_config
from cfgsafe.errors import CheckpointError
from cfgsafe.folders import OURS, new_folder
from cfgsafe.llama import Llama, parameter_shapes, rope_frequencies
from cfgsafe.settings import TEXT, object_of, read_settings, shown
from cfgsafe.weights import (
    Stored,
    check_finite,
    check_floats,
    check_shapes,
    header_of,
    read_header,
    read_tensors,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
SHARD = re.compile(r"[\w. ()-]{1,200}\.safetensors")  # no path: an index cannot point outside its folder
Change = Callable[[str, Tensor], Tensor]  # (name, tensor) -> its replacement, of the same shape and data type


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Name -> where and how a checkpoint stores it, from the headers of its safetensors files.

    Raises CheckpointError, also where an index and its shards disagree.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder / WEIGHTS}: not found; only safetensors checkpoints are read")
        return read_header(folder / WEIGHTS)
    kinds = {"weight_map": object_of(TEXT)}
    weight_map = read_settings(index, kinds, needed=("weight_map",))["weight_map"]
    stored: dict[str, Stored] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not SHARD.fullmatch(shard) or not (folder / shard).exists():
            raise CheckpointError(
                f"{index}: names the shard {shown(shard)}, which is not in its folder; download it again"
            )
    for shard in shards:
        for name, place in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{place.path}: holds tensor {shown(name)}, which {INDEX} does not place there"
                )
            stored[name] = place
    for name, shard in weight_map.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder / shard}: tensor {shown(name)}, which {INDEX} places there, is missing"
            )
    return stored


def empty_model(folder: str | Path) -> tuple[Llama, dict[str, Stored]]:
    """The model of a checkpoint without memory for its weights ("meta"), and the tensors that it needs.

    Shapes are compared before it is built, so that a wrong size costs neither time nor memory.
    Raises CheckpointError naming the tensor that is missing, unexpected, or of another shape.
    """
    config = read_config(folder)
    stored = {}
    for name, place in stored_tensors(folder).items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # old files store the RoPE table, and some repeat the tied tensor
        stored[name] = place
    check_floats(stored)
    check_shapes(stored, parameter_shapes(config), folder, "config.json")
    with torch.device("meta"):
        return Llama(config), stored


def read_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """A `Llama` with the weights of `folder`, in eval mode, without gradients.

    Raises CheckpointError naming the tensor that is missing, unexpected, of another shape, or not
    finite.
    """
    model, stored = empty_model(folder)
    found = {}
    for name, tensor in read_tensors(stored):
        found[name] = tensor.to(device=device, dtype=dtype)
        check_finite(name, found[name], stored[name].path)
    model.load_state_dict(found, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(model.config).to(device)  # not stored in the file
    return model.requires_grad_(False).eval()


def save_checkpoint(
    folder: str | Path, model: Llama, *, tokenizer_from: str | Path, dtype: torch.dtype
) -> None:
    """Write `model` as a checkpoint folder that `transformers` loads.

    The tokenizer's files are copied from another checkpoint. Raises InputError when it cannot be
    written, and CheckpointError when a weight is not finite; then nothing is written.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
        check_finite(name, tensors[name], f"{folder} is not written")
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_files(tokenizer_from, temporary, (*TOKENIZER_FILES, "generation_config.json"))


def rewrite_checkpoint(source: str | Path, target: str | Path, change: Change) -> int:
    """Copy a checkpoint, each tensor changed by `change`; returns the number of tensors.

    Shards, data types and all other files stay the same. One tensor is in memory at a time.
    Raises CheckpointError, and InputError when `target` cannot be written.
    """
    source = Path(source)
    stored = stored_tensors(source)
    check_floats(stored)
    entries = [path for path in source.iterdir() if path.is_file()]
    others = tuple(path.name for path in entries if path.suffix not in WEIGHT_SUFFIXES)
    with new_folder(target, replaces=(*OURS, *others)) as temporary:
        for path in sorted({place.path for place in stored.values()}):
            inside = {name: place for name, place in stored.items() if place.path == path}
            _rewrite_file(inside, temporary / path.name, change)
        copy_files(source, temporary, others)
    return len(stored)


def _rewrite_file(stored: dict[str, Stored], target: Path, change: Change) -> None:
    """Write a changed copy of a safetensors file, tensor by tensor."""
    header = header_of(stored)
    with open(target, "wb") as out:
        out.write(header)
        for name, old in read_tensors(stored):
            new = change(name, old).contiguous()
            assert new.shape == old.shape and new.dtype == old.dtype, name
            check_finite(name, old, stored[name].path)
            check_finite(name, new, f"{target.name} is not written")
            flat = new if new.dim() else new.reshape(1)
            out.write(flat.view(torch.uint8).numpy().data)


def copy_files(source: str | Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files `names` that exist."""
    for name in names:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, target / name)
