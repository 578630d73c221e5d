"""Safetensors files: damage is named before a tensor is read, and NaN and infinity wherever they stand."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfgsafe.errors import CheckpointError
from cfgsafe.weights import check_finite, header_of, is_finite, read_header, read_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 7, 131])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(dtype, bad, size):
    for at in range(size):
        tensor = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)  # a sum would overflow
        assert is_finite(tensor)
        tensor[at] = bad
        assert not is_finite(tensor), at


def test_tensors_without_elements_or_of_integers_are_finite():
    for tensor in (torch.ones(0), torch.ones(3, 0), torch.ones(3, dtype=torch.uint8)):
        check_finite("x", tensor, "f")
    with pytest.raises(CheckpointError, match=r"f: tensor 'x' holds numbers that are not finite"):
        check_finite("x", torch.tensor(float("nan")), "f")


@pytest.fixture
def path(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def with_header(path, change) -> None:
    """Change the text of a safetensors file's header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + size].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def test_the_header_tells_shapes_and_writes_the_same_file_again(path):
    stored = read_header(path)
    assert {name: (place.dtype, place.shape) for name, place in stored.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F32", (4,)),
    }
    data = b"".join(tensor.numpy().tobytes() for _, tensor in read_tensors(stored))
    again = path.with_name("again.safetensors")
    again.write_bytes(header_of(stored) + data)
    for name, tensor in load_file(again).items():
        assert torch.equal(tensor, load_file(path)[name])


DAMAGES = [
    (lambda h: h.replace('"b"', '"a"'), "the key 'a' stands twice"),
    (lambda h: h.replace("[2,3]", "[3,3]"), "damaged"),
    (lambda h: h.replace("[2,3]", "[true,6]"), "tensor 'a': field 'shape' is .True, 6."),
    (lambda h: h.replace("[2,3]", "6"), "tensor 'a': field 'shape' is 6"),
    (lambda h: h.replace('"F32"', "3", 1), "field 'dtype' is 3; it must be a string"),
    (lambda h: h.replace('"F32"', '"F33"', 1), "damaged"),
    (lambda h: h.replace("[0,24]", "[4,28]"), "damaged"),
    (lambda h: h.replace("[0,24]", "[0,NaN]"), "NaN is no JSON number"),
    (lambda h: json.dumps({**json.loads(h), "a": 3}), "describes tensor 'a' by a int"),
    (lambda h: json.dumps({**json.loads(h), "__metadata__": {"x": 3}}), "damaged"),
    (lambda h: "[]", "its header is no object"),
    (lambda h: h[:-2], "damaged"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGES)
def test_a_damaged_header_is_one_line(path, change, words):
    with_header(path, change)
    with pytest.raises(CheckpointError, match=f"w.safetensors: .*{words}") as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_lengths_that_the_file_does_not_have_are_one_line(path):
    content = path.read_bytes()
    for size in (0, 1, 2**24 + 1, 2**63, 2**64 - 1):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        with pytest.raises(CheckpointError, match="w.safetensors: cannot be read"):
            read_header(path)
    for length in (0, 3, 8, 20, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="w.safetensors: cannot be read"):
            read_header(path)


def test_a_pipe_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read .a folder, pipe or device"):
            read_header(place)
