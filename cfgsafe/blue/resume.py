"""The state of a training run on disk: a killed run goes on from it to the identical result.

OUT/state-STEP holds the adapter, the moments of the optimiser, the random number generators, and a
fingerprint of the data. The order of the pairs and the learning rate follow from the step. A state is
written whole under another name before the one before it is deleted: a crash costs nothing.

Run it: python train.py orpo --resume ...
"""

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from cfgsafe.checkpoint import new_folder
from cfgsafe.errors import CfgsafeError, InputError
from cfgsafe.files import read_json, read_jsonl, write_jsonl
from cfgsafe.parallel import World, fill, whole

CPU_RNG, GPU_RNG = "rng.cpu", "rng.cuda"


class Stopped(CfgsafeError):
    """A signal ended the run after its state was saved."""

    exit_code = 130


def save(
    out: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimiser: Optimizer,
    data: str,
    world: World,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write the state after `step` steps and delete those before; `more` adds files to its folder.

    All processes must call it; the main one writes.
    """
    tensors = {CPU_RNG: torch.get_rng_state()}
    if world.device.startswith("cuda"):
        tensors[GPU_RNG] = torch.cuda.get_rng_state(world.device)
    for name, parameter in parameters.items():
        tensors[name] = whole(parameter.detach()).cpu()
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{name}.{moment}"] = whole(value).cpu()
    if world.main:
        folder = out / f"state-{step:06d}"
        with new_folder(folder, replaces=("*",)) as temporary:
            packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(packed, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, "data": data}) + "\n")
            if more:
                more(temporary)
        for other in states(out):
            if other != folder:
                shutil.rmtree(other)
    world.barrier()


def states(out: Path) -> list[Path]:
    """The folders of saved states, the latest last."""
    return sorted(path for path in out.glob("state-*") if re.fullmatch(r"state-\d{6,}", path.name))


def load(out: Path, parameters: Mapping[str, Tensor], optimiser: Optimizer, data: str, world: World) -> int:
    """Restore parameters, optimiser and generators; returns the step of the state, 0 without one.

    Raises InputError when the data are not those of the run.
    """
    found = states(out)
    if not found:
        return 0
    latest = found[-1]
    facts, tensors = read_json(latest / "state.json"), load_file(latest / "state.safetensors")
    if facts["data"] != data:
        raise InputError(
            f"{out}: the data differ from those the run began with; "
            "restore them, or start anew without --resume"
        )
    torch.set_rng_state(tensors.pop(CPU_RNG))
    if GPU_RNG in tensors:
        torch.cuda.set_rng_state(tensors.pop(GPU_RNG), world.device)
    for name, parameter in parameters.items():
        fill(parameter, tensors[name])
        if f"{name}.step" not in tensors:
            continue  # saved before the first update
        moments = {"step": tensors[f"{name}.step"].to(parameter.device)}
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[moment] = torch.zeros_like(parameter)
            fill(moments[moment], tensors[f"{name}.{moment}"])
        optimiser.state[parameter] = moments
    return facts["step"]


def check_same_run(out: Path, settings: dict, free: tuple[str, ...]) -> None:
    """Raise InputError for the first of `settings`, not in `free`, that differs from OUT/config.json."""
    if not (out / "config.json").exists():
        return
    before = read_json(out / "config.json")
    for name, value in settings.items():
        if name not in free and before.get(name) != value:
            option = name.replace("_", "-")
            raise InputError(
                f"--{option} {value}: the run in {out} began with {before.get(name)}; "
                "give that, or start anew without --resume"
            )


def keep_steps(path: Path, key: str, last: int) -> None:
    """Drop the lines of a JSONL log with `key` above `last`, and a line that a crash cut short."""
    if not path.exists():
        return
    whole_lines = path.read_bytes().rpartition(b"\n")[0]
    path.write_bytes(whole_lines + b"\n" if whole_lines else b"")
    write_jsonl(path, [row for _, row in read_jsonl(path) if row[key] <= last])


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list of the SIGINT and SIGTERM that have arrived within the block."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: arrived.append(number)) for kind in kinds]
    try:
        yield arrived
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
