"""Safetensors files: what they hold, told from the header alone, and tensors whose numbers are finite.

Source: the format of safetensors: the length of the header in 8 bytes, the header in JSON (tensor ->
dtype, shape, data_offsets), and the data of all tensors.
Deviation: the header is read here first, because the library takes a name that stands twice, waits for
pipes, and passes on any data type. The library then checks what else makes a file whole.

Run it: python -m pytest tests/test_weights.py
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfgsafe.errors import CheckpointError
from cfgsafe.files import check_regular, parse_json
from cfgsafe.settings import TEXT, brief, check_fields, integer, list_of, shown

FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # data types that weights may have -> bytes of an element
MOST_HEADER = 2**24  # bytes; 16 MB describe about 150,000 tensors
LARGEST = 2**40  # of a dimension
ENTRY = {"dtype": TEXT, "shape": list_of(integer(0, LARGEST))}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its data type as safetensors calls it ("BF16"), and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> tensor of a safetensors file, in the file's order of data; no tensor is read.

    Raises CheckpointError naming the file.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MOST_HEADER:
                raise ValueError(f"its header would have {size:,} bytes")
            header = parse_json(file.read(size).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise damaged(path, error) from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise damaged(path, f"its header describes tensor {shown(name)} by a {type(entry).__name__}")
        check_fields(entry, ENTRY, f"{path}: tensor {shown(name)}", needed=tuple(ENTRY))
        found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]))
    with open_weights(path) as file:  # checks offsets, sizes and the length of the file
        assert set(file.keys()) == set(found), path
    return found


def damaged(path: Path, reason: BaseException | str) -> CheckpointError:
    """The error for a file that is no whole safetensors file."""
    return CheckpointError(
        f"{path}: cannot be read ({brief(reason)}); it is damaged or was not downloaded whole"
    )


@contextmanager
def open_weights(path: Path):
    """Open a safetensors file as `safe_open` does. Raises CheckpointError naming the file."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def read_tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each of the tensors, on the CPU in its stored data type."""
    for name, place in stored.items():
        with open_weights(place.path) as file:  # opened for each: an open file keeps all it has read mapped
            tensor = file.get_tensor(name)
        yield name, tensor


def header_of(stored: Mapping[str, Stored]) -> bytes:
    """The beginning of a safetensors file with these tensors in this order, up to their data."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, place in stored.items():
        end = start + math.prod(place.shape) * FLOATS[place.dtype]
        header[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_floats(stored: Mapping[str, Stored]) -> None:
    """Raise CheckpointError for the first tensor that is not stored as floats.

    The integers of a quantised checkpoint mean something else than their values.
    """
    for name, place in stored.items():
        if place.dtype not in FLOATS:
            raise CheckpointError(
                f"{place.path}: tensor {shown(name)} is stored as {place.dtype}; weights must be "
                f"{', '.join(FLOATS)}: give a checkpoint that is not quantised"
            )


def check_shapes(
    stored: Mapping[str, Stored], asked: Mapping[str, tuple[int, ...]], folder: str | Path, asker: str
) -> None:
    """Compare the tensors of a folder with the shapes that `asker` asks for.

    Raises CheckpointError naming the tensor that is missing, unexpected, or of another shape.
    """
    for name, place in stored.items():
        if name not in asked:
            raise CheckpointError(
                f"{folder}: unexpected tensor {shown(name)}; {asker} asks for none of that name"
            )
        if place.shape != asked[name]:
            raise CheckpointError(
                f"{folder}: tensor {shown(name)} has shape {place.shape}, {asker} asks for {asked[name]}"
            )
    missing = sorted(set(asked) - set(stored))
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: missing tensor {shown(missing[0])}{more}, which {asker} asks for")


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither NaN nor infinity.

    The least and the largest number tell: both take over NaN, and cannot overflow as a sum can. On two
    CPU cores that reads 17 to 49 GB a second, `isfinite().all()` 0.4 to 0.9.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, largest = torch.aminmax(tensor.detach())
    return bool(least.isfinite() & largest.isfinite())


def check_finite(name: str, tensor: Tensor, place: str | Path) -> None:
    """Raise CheckpointError, naming place and tensor, for a tensor that holds NaN or infinity."""
    if not is_finite(tensor):
        raise CheckpointError(
            f"{place}: tensor {shown(name)} holds numbers that are not finite (NaN or infinity)"
        )
