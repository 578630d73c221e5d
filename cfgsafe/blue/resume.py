"""The state of a training run on disk: a killed run goes on from it to the identical result.

OUT/state-STEP holds the adapter, the moments of the optimiser, the random number generators, a digest
of the data, and digests of its own files: a damaged state is refused. The order of the pairs and the
learning rate follow from the step. A state is written whole under another name before the one before it
is deleted, in one step: a crash costs nothing.
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

from cfgsafe.errors import CfgsafeError, InputError, option
from cfgsafe.files import read_json, read_json_value, read_log, write_bytes, write_text
from cfgsafe.folders import new_folder
from cfgsafe.identity import file_digest
from cfgsafe.parallel import World, fill, whole
from cfgsafe.settings import shown
from cfgsafe.weights import is_finite

CPU_RNG, GPU_RNG = "rng.cpu", "rng.cuda"
CONFIG, CONTENTS = "config.json", "contents"  # its key in that file
STATE, TENSORS = "state.json", "state.safetensors"
FORMAT = 1  # of CONFIG and STATE; a file of another format is refused
LEFT = ("state-*", "epoch-*", "attacker.json", "attacks*.jsonl")  # what is of no use without its CONFIG
ANEW = "start anew without --resume"


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

    All processes must call it; the main one writes. Raises InputError where a weight or a moment is not
    finite, before anything is written.
    """
    tensors = {}
    for name, parameter in parameters.items():
        tensors[name] = whole(parameter.detach()).cpu()
        for moment, value in optimiser.state[parameter].items():
            tensors[f"{name}.{moment}"] = whole(value).cpu()
    check_finite(tensors, f"{out}: after step {step}")
    tensors[CPU_RNG] = torch.get_rng_state()
    if world.device.startswith("cuda"):
        tensors[GPU_RNG] = torch.cuda.get_rng_state(world.device)
    if world.main:
        folder = out / f"state-{step:06d}"
        with new_folder(folder, replaces=("*",)) as temporary:
            packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(packed, temporary / TENSORS)
            if more:
                more(temporary)
            facts = {"format": FORMAT, "step": step, "data": data, "files": digests(temporary)}
            write_text(temporary / STATE, json.dumps(facts) + "\n")
        delete_states(out, but=folder)
    world.barrier()


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError naming the first tensor that holds a number that is not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{where} {name} holds a number that is not finite; start anew with a lower --lr"
            )


def digests(folder: Path) -> dict[str, str]:
    """The names and digests of the files of a state, without STATE."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != STATE}


def states(out: Path) -> list[Path]:
    """The folders of saved states, the latest last."""
    return sorted(path for path in out.glob("state-*") if re.fullmatch(r"state-\d{6,}", path.name))


def delete_states(out: Path, but: Path | None = None) -> None:
    """Delete the saved states; each gets another name first, so that a kill leaves no half of one."""
    for left in out.glob("state-*.deleted"):
        shutil.rmtree(left)
    for state in states(out):
        if state != but:
            shutil.rmtree(state.rename(state.with_suffix(".deleted")))


def read_state(folder: Path) -> dict:
    """The facts about a saved state, whose files are as they were written.

    Raises InputError naming the file that is damaged or missing, or of another version.
    """
    advice = f"delete {folder} to go on without it"
    facts = read_json_value(folder / STATE, InputError, "cannot be read", advice)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{folder / STATE}: damaged, or of another version of this program; {advice}")
    step, data, files = facts.get("step"), facts.get("data"), facts.get("files")
    if not (isinstance(step, int) and isinstance(data, str) and isinstance(files, dict)):
        raise InputError(f"{folder / STATE}: damaged; {advice}")
    if folder.name != f"state-{step:06d}":
        raise InputError(f"{folder / STATE}: is of step {step}; {advice}")
    found = digests(folder)
    for name in sorted(files.keys() | found.keys()):
        if files.get(name) != found.get(name):
            raise InputError(f"{folder / name}: not what was saved there; {advice}")
    return facts


def load(out: Path, parameters: Mapping[str, Tensor], optimiser: Optimizer, data: str, world: World) -> int:
    """Restore parameters, optimiser and generators; returns the step of the state, 0 without one.

    Raises InputError when the state is damaged, or the data are not those of the run.
    """
    found = states(out)
    if not found:
        return 0
    facts = read_state(found[-1])
    if facts["data"] != data:
        raise InputError(
            f"{out}: the data differ from those the run began with; "
            "restore them, or start anew without --resume"
        )
    tensors = load_file(found[-1] / TENSORS)
    generator = tensors.pop(GPU_RNG, None)
    if generator is not None and world.device.startswith("cuda"):
        torch.cuda.set_rng_state(generator, world.device)
    torch.set_rng_state(tensors.pop(CPU_RNG))
    check_finite(tensors, f"{found[-1] / TENSORS}:")
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
        delete_states(out)
    write_config(out / file, settings, held)


def write_config(path: Path, settings: dict, held: dict[str, str]) -> None:
    """Write the settings of a run, and with them the digests of `identity.contents`."""
    write_text(path, json.dumps({"format": FORMAT, **settings, CONTENTS: held}, indent=2) + "\n")


def check_same_run(
    path: Path, settings: dict, held: dict[str, str], free: tuple[str, ...], anew: str = ANEW
) -> None:
    """Compare a run with the one that wrote the file `path`; in a new folder there is nothing to compare.

    Raises InputError for a folder that holds a run without that file, and for a file of another version;
    for the first of `settings`, not in `free`, that differs; then for the first option of `held`, free or
    not, whose file or folder has other contents. `anew` is how to begin another run.
    """
    out = path.parent
    if not path.exists():
        for pattern in LEFT:
            for left in sorted(out.glob(pattern)):
                raise InputError(
                    f"{path}: not found, and without it nobody knows what {left.name} belongs to; "
                    f"restore it, or {anew}"
                )
        return
    before = read_json(path)
    known = before.get(CONTENTS)
    if before.get("format") != FORMAT or not isinstance(known, dict):
        raise InputError(f"{path}: damaged, or of another version of this program; {anew}")
    for name, value in json.loads(json.dumps(settings)).items():
        if name not in free and before.get(name) != value:
            raise InputError(
                f"{option(name)} {value}: the run in {out} began with {shown(before.get(name))}; "
                f"give that, or {anew}"
            )
    for name in {**held, **known}:
        if known.get(name) != held.get(name):
            raise InputError(
                f"{_named(name, settings)}: holds something else than when the run in {out} began; "
                f"restore it, or {anew}"
            )


def _named(name: str, settings: dict) -> str:
    """An option and the files that it names."""
    value = settings.get(name) or ()
    files = (value,) if isinstance(value, str) else value
    return " ".join([option(name), *files])


def keep_steps(path: Path, key: str, last: int) -> int:
    """Drop the lines of a JSONL log with `key` above `last`, and a line that a crash cut short.

    The lines that stay are not touched; returns the `key` of the last of them, 0 for none. Raises
    InputError naming the line whose `key` is no step, or comes before that of the line above.
    """
    if not path.exists():
        return 0
    before = kept = reached = 0
    for place, row in read_log(path, key):
        step = row.get(key)
        if type(step) is not int or step < before:
            raise InputError(f"{place}: {key!r} must be a number, not below that of the line above")
        before = step
        if step <= last:
            kept, reached = kept + 1, step
    lines = [line + b"\n" for line in path.read_bytes().split(b"\n") if line.strip()]
    if kept < len(lines):
        write_bytes(path, b"".join(lines[:kept]))
    return reached


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
