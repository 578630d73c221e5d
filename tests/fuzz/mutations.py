"""How the fuzzers damage files: bytes, values of JSON, headers of safetensors."""

import json
import os
import random
from copy import deepcopy
from pathlib import Path

from cfgsafe.errors import CfgsafeError

RAW = ("NaN", "-Infinity", "1e999", "1e308", "-1e-320", "9" * 400, "9" * 5000, "[" * 5000, '{"a": 1, "a": 2}')
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2047, 2048, 2**31, 2**63, 10**12, 10**400, 0.0, -0.0, 0.5, 1.5),
    *(
        1e-45,
        1e300,
        -3.7,
        "",
        "1",
        "true",
        "x" * 100_000,
        "../x",
        "/etc/passwd",
        "\0",
        "\ud800",
        "é" * 9,
        "\n",
    ),
    *([], [0], [[1]], [None], ["q_proj"], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0}),
    *("llama", "float16", "float77", "linear", "dynamic", "q_proj", ".*", "(", "([a-z._0-9]+)+!"),
)


def one_line(error: CfgsafeError, *names: Path | str) -> None:
    """Check the message of an error: a line of some length that names one of `names`."""
    text = str(error)
    assert "\n" not in text and "Traceback" not in text and len(text) < 1000, text[:2000]
    assert any(str(name) in text for name in names), text
    text.encode()  # a lone surrogate could not be printed


def mutate_bytes(case: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled or added."""
    data = bytearray(content)
    for _ in range(case.choice([1, 1, 1, 2, 8])):
        at = case.randrange(len(data) + 1)
        way = case.randrange(6)
        if way == 0 and at < len(data):
            data[at] ^= 1 << case.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            del data[at : at + case.randrange(1, 50)]
        elif way == 3:
            data[at:at] = data[at : at + case.randrange(1, 50)]
        elif way == 4:
            data[at:at] = case.randbytes(case.randrange(1, 20))
        else:
            data[at : at + 4] = case.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f", b"NaN,"])
    return bytes(data)


def mutate_json(case: random.Random, value: dict) -> tuple[bytes, set[str]]:
    """A JSON object with other values, keys or texts in one or two places, and the fields concerned."""
    fields, mark = set(), None
    for _ in range(case.choice([1, 1, 2])):
        place, path = value, []
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = case.choice(keys)
            path.append(key)
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and case.random() < 0.7:
                place = inner
                continue
            way = case.random()
            if way < 0.1:
                del place[key]
            elif way < 0.2 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
                place[key] = inner + case.choice([-1, 1])
            elif way < 0.3:
                place[key] = [inner]
            elif way < 0.4 and isinstance(place, dict):
                place[case.choice(["quantization_config", "rope_parameters", "x", "layers_to_transform"])] = (
                    deepcopy(case.choice(VALUES))
                )
                path = list(place)
            elif way < 0.5:
                place[key] = mark = "@RAW@"
            else:
                place[key] = deepcopy(case.choice(VALUES))
            break
        fields |= {str(part) for part in path}
    text = json.dumps(value)
    if mark:
        text = text.replace(f'"{mark}"', case.choice(RAW))
    return text.encode(), fields


def mutate_safetensors(case: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, or another length of it."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    way = case.random()
    if way < 0.1:
        length = case.choice([0, 1, size - 1, size + 1, 2**24, 2**32, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + header + data
    if way < 0.5:
        header, _ = mutate_json(case, json.loads(header))
    elif way < 0.7:
        header = mutate_bytes(case, header)
    elif way < 0.85:  # numbers that are not finite
        at = 4 * case.randrange(len(data) // 4)
        data = data[:at] + case.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"]) + data[at + 4 :]
    else:
        old, new = case.choice(
            [("F32", "I32"), ("F32", "U32"), ("F32", "BF16"), ("F32", "F8_E4M3"), ("lora_A", "lora_B")]
        )
        header = header.replace(old.encode(), new.encode(), case.choice([1, 100]))
    return len(header).to_bytes(8, "little") + header + data


def stand_in(case: random.Random, path: Path) -> None:
    """Something else than a file, or nothing, in place of a file."""
    kind = case.choice(["pipe", "folder", "nothing", "device", "circle", "empty"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(case.choice(["/dev/zero", "/dev/null", "/dev/full"]))
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "empty":
        path.touch()
