"""Checkpoints in the Hugging Face layout, read strictly and written whole or not at all.

Source: the layout of Hugging Face: `config.json`, `model.safetensors` (or shards that
`model.safetensors.index.json` lists), and the tokenizer's files.
Deviation: each missing, unexpected or mis-shaped tensor is an error that names it; pickle is never
read. Tensors go to the device one by one, so that loading needs the memory of the model and of one
tensor more.

Run it: python infer.py --model cfgsafe/demo/base --prompt "Hello!"
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cfgsafe.errors import CheckpointError
from cfgsafe.files import read_json
from cfgsafe.folders import OURS, new_folder
from cfgsafe.llama import Llama, LlamaConfig, rope_frequencies

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
STORED = {"F32": 4, "BF16": 2, "F16": 2}  # data type in a safetensors file -> bytes of an element
Change = Callable[[str, Tensor], Tensor]  # (name, tensor) -> its replacement, of the same shape and data type


def read_config(folder: str | Path) -> LlamaConfig:
    """The configuration of a checkpoint's model. Raises CheckpointError.

    If `generation_config.json` names end tokens, they replace those of `config.json`: there may be more.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
        raw["eos_token_id"] = generation.get("eos_token_id", raw.get("eos_token_id"))
    return LlamaConfig.from_dict(raw)


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        files = {name: folder / file for name, file in weight_map.items()}
        for path in sorted(set(files.values())):
            if path.parent != folder or not path.exists():
                raise CheckpointError(
                    f"{folder / INDEX}: names the shard {path.name!r}, which is not there; download it again"
                )
        return files
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / WEIGHTS}: not found; only safetensors checkpoints are read")
    with open_weights(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


@contextmanager
def open_weights(path: Path):
    """Open a safetensors file as `safe_open` does. Raises CheckpointError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); it is damaged or was not downloaded whole"
        ) from None


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor of a checkpoint. Raises CheckpointError."""
    for name, path in weight_files(folder).items():
        with open_weights(path) as file:  # opened for each tensor: an open file keeps all it has read mapped
            if name not in file.keys():
                raise CheckpointError(f"{path}: tensor {name!r}, which the index places there, is missing")
            tensor = file.get_tensor(name)
        yield name, tensor


def read_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """A `Llama` with the weights of `folder`, in eval mode, without gradients.

    Raises CheckpointError naming the tensor that is missing, unexpected or of another shape.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    expected = {name: p.shape for name, p in model.named_parameters()}  # a tied head is listed once
    found = {}
    for name, tensor in read_tensors(folder):
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # old files store the RoPE table, and some repeat the tied tensor
        if name not in expected:
            raise CheckpointError(f"{folder}: unexpected tensor {name!r}")
        if tensor.shape != expected[name]:
            found_shape, asked = tuple(tensor.shape), tuple(expected[name])
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {found_shape}, config.json asks for {asked}"
            )
        found[name] = tensor.to(device=device, dtype=dtype)
    missing = sorted(set(expected) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: missing tensor {missing[0]!r}{more}")
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(config).to(device)  # not stored in the file
    return model.requires_grad_(False).eval()


def save_checkpoint(
    folder: str | Path, model: Llama, *, tokenizer_from: str | Path, dtype: torch.dtype
) -> None:
    """Write `model` as a checkpoint folder that `transformers` loads.

    The tokenizer's files are copied from another checkpoint. Raises InputError when it cannot be
    written.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
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
    source, count = Path(source), 0
    files = weight_files(source)
    entries = [path for path in source.iterdir() if path.is_file()]
    others = tuple(path.name for path in entries if path.suffix not in WEIGHT_SUFFIXES)
    with new_folder(target, replaces=(*OURS, *others)) as temporary:
        for path in sorted(set(files.values())):
            with open_weights(path) as file:
                names = list(file.keys())
            count += len(names)
            _rewrite_file(path, temporary / path.name, names, change)
        copy_files(source, temporary, others)
    return count


def _rewrite_file(source: Path, target: Path, names: list[str], change: Change) -> None:
    """Write a changed copy of a safetensors file, tensor by tensor.

    The format: the length of the header in 8 bytes, the header in JSON, and the data of all
    tensors.
    """
    header = _header(source, names)
    with open(target, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            with open_weights(source) as file:
                old = file.get_tensor(name)
            new = change(name, old).contiguous()
            assert new.shape == old.shape and new.dtype == old.dtype, name
            flat = new if new.dim() else new.reshape(1)
            out.write(flat.view(torch.uint8).numpy().data)


def _header(source: Path, names: list[str]) -> bytes:
    """The header of a safetensors file with the tensors `names` of `source` in that order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        with open_weights(source) as file:
            part = file.get_slice(name)
            shape, kind = part.get_shape(), part.get_dtype()
        if kind not in STORED:
            known = ", ".join(STORED)
            raise CheckpointError(f"{source}: tensor {name!r} is stored as {kind}; supported are {known}")
        end = start + torch.Size(shape).numel() * STORED[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def copy_files(source: str | Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files `names` that exist."""
    for name in names:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, target / name)
