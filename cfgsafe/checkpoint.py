"""Checkpoints in the Hugging Face layout, read strictly and written whole or not at all.

A checkpoint is a folder with `config.json`, `model.safetensors` (or shards under `model.safetensors.index.json`), and the
tokenizer's files. Every missing, unexpected or mis-shaped tensor is an error that names it. Safetensors only, never pickle.
Tensors go to the device one by one, so a load needs the model's own memory and one tensor more.

Run it: python infer.py --model cfgsafe/demo/base --prompt "Hello!"
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cfgsafe.errors import CheckpointError, InputError
from cfgsafe.files import read_json
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
OURS = ("*.safetensors", "*.json", "*.jinja")  # what we write
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


def read_config(folder: str | Path) -> LlamaConfig:
    """The model's shape; `generation_config.json` may name more end tokens than `config.json`. Raises CheckpointError."""
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    if (folder / "generation_config.json").exists():
        raw["eos_token_id"] = read_json(folder / "generation_config.json").get(
            "eos_token_id", raw.get("eos_token_id")
        )
    return LlamaConfig.from_dict(raw)


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, for single and sharded checkpoints. Raises CheckpointError."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        files = {
            name: folder / file for name, file in read_json(folder / INDEX).get("weight_map", {}).items()
        }
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
    """`safe_open` whose errors are CheckpointErrors that name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); it is damaged or was not downloaded whole"
        ) from None


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) one by one."""
    for name, path in weight_files(folder).items():
        with open_weights(path) as file:  # opened anew each time, so that no more of it stays mapped
            if name not in file.keys():
                raise CheckpointError(f"{path}: tensor {name!r}, which the index places there, is missing")
            tensor = file.get_tensor(name)
        yield name, tensor


def read_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """A `Llama` with the weights of `folder`, in eval mode, without gradients. Raises CheckpointError naming the tensor."""
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
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[name])}"
            )
        found[name] = tensor.to(device=device, dtype=dtype)
    if missing := sorted(set(expected) - set(found)):
        raise CheckpointError(
            f"{folder}: missing tensor {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.frequencies = rope_frequencies(config).to(device)  # computed, not stored
    return model.requires_grad_(False).eval()


def save_checkpoint(
    folder: str | Path, model: Llama, *, tokenizer_from: str | Path, dtype: torch.dtype
) -> None:
    """Write `model` as a checkpoint folder that `transformers` loads; tokenizer files are copied from another one."""
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_files(tokenizer_from, temporary, (*TOKENIZER_FILES, "generation_config.json"))


def rewrite_checkpoint(
    source: str | Path, target: str | Path, change: Callable[[str, Tensor], Tensor]
) -> int:
    """Write `source` to `target` with each tensor replaced by `change(name, tensor)` of its shape and dtype; returns their number.

    Sharding, dtypes and all other files stay. One tensor is in memory at a time.
    """
    source, count = Path(source), 0
    files = weight_files(source)
    others = tuple(p.name for p in source.iterdir() if p.is_file() and p.suffix not in WEIGHT_SUFFIXES)
    with new_folder(target, replaces=(*OURS, *others)) as temporary:
        for path in sorted(set(files.values())):
            with open_weights(path) as file:
                names = list(file.keys())
            count += len(names)
            _stream(path, temporary / path.name, names, change)
        copy_files(source, temporary, others)
    return count


def _stream(source: Path, target: Path, names: list[str], change: Callable[[str, Tensor], Tensor]) -> None:
    """Write a safetensors file tensor by tensor: 8 bytes of header length, the JSON header, the data end to end."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        with open_weights(source) as file:
            part = file.get_slice(name)
            shape, kind = part.get_shape(), part.get_dtype()
        if kind not in STORED.values():
            raise CheckpointError(
                f"{source}: tensor {name!r} is stored as {kind}; supported are {', '.join(STORED.values())}"
            )
        size = torch.Size(shape).numel() * (4 if kind == "F32" else 2)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            with open_weights(source) as file:
                old = file.get_tensor(name)
            new = change(name, old).contiguous()
            assert new.shape == old.shape and new.dtype == old.dtype, name
            out.write(
                new.view(torch.uint8).numpy().data
                if new.dim()
                else new.reshape(1).view(torch.uint8).numpy().data
            )


def copy_files(source: str | Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of `names` that exist."""
    for name in names:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, target / name)


@contextmanager
def new_folder(folder: str | Path, replaces: tuple[str, ...] = OURS) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    An existing `folder` is replaced at the end, and only if all it holds is named as in `replaces`: nobody's other files are
    lost. Raises InputError when it holds others or cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: cannot be written (a file has that name); choose another folder")
    if others := [
        p.name
        for p in (folder.iterdir() if folder.exists() else ())
        if not any(p.match(pattern) for pattern in replaces)
    ]:
        raise InputError(f"{folder}: holds other files, such as {min(others)!r}; choose another folder")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another folder"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
