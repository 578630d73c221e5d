"""The state of a training run on disk: a killed run goes on from it to the identical result.

OUT/state-STEP holds the adapter, the moments of the optimiser, the random number generators, and a
digest of the data. The order of the pairs and the learning rate follow from the step. A state is
written whole under another name before the one before it is deleted: a crash costs nothing.
OUT/config.json holds the options, and digests of the files that they name: a run goes on only with
the same weights and data, whatever stands at their paths now.

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

from cfgsafe.errors import CfgsafeError, InputError
from cfgsafe.files import read_json, read_jsonl, write_jsonl, write_text
from cfgsafe.folders import new_folder
from cfgsafe.parallel import World, fill, whole

CPU_RNG, GPU_RNG = "rng.cpu", "rng.cuda"
CONFIG, CONTENTS = "config.json", "contents"  # its key in that file


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


def begin(
    out: Path,
    settings: dict,
    held: dict[str, str],
    free: tuple[str, ...],
    *,
    resumed: bool,
    file: str = CONFIG,
) -> None:
    """Write OUT/config.json, or another `file`, at the beginning of a run.

    A resumed run must have the settings and the contents of the run that it continues, and a new one
    deletes the states of an earlier run first. Raises what `check_same_run` raises.
    """
    if resumed:
        check_same_run(out / file, settings, held, free)
    else:
        for state in states(out):
            shutil.rmtree(state)
    write_config(out / file, settings, held)


def write_config(path: Path, settings: dict, held: dict[str, str]) -> None:
    """Write the settings of a run, and with them the digests of `identity.contents`."""
    write_text(path, json.dumps({**settings, CONTENTS: held}, indent=2) + "\n")


def check_same_run(path: Path, settings: dict, held: dict[str, str], free: tuple[str, ...]) -> None:
    """Compare a run with the one that wrote the file `path`; no such file: nothing to compare.

    Raises InputError for the first of `settings`, not in `free`, that differs; then for the first
    option of `held`, free or not, whose file or folder has other contents.
    """
    if not path.exists():
        return
    before, out = read_json(path), path.parent
    for name, value in json.loads(json.dumps(settings)).items():
        if name not in free and before.get(name) != value:
            raise InputError(
                f"{_option(name)} {value}: the run in {out} began with {before.get(name)}; "
                "give that, or start anew without --resume"
            )
    known = before.get(CONTENTS, {})
    for name, digest in held.items():
        if known.get(name, digest) != digest:
            raise InputError(
                f"{_option(name)}: holds something else than when the run in {out} began; "
                "restore it, or start anew without --resume"
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
