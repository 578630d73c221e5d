"""Two gloo processes equal one, with DDP and FSDP2: every step's values and the adapter; and a clean exit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cfgsafe.blue import orpo
from cfgsafe.blue.orpo import Options
from cfgsafe.files import write_jsonl

ROOT = Path(__file__).parent.parent
SETTINGS = {"batch_size": 4, "epochs": 2, "grad_accum": 2}
MEASURED = {"tokens_per_second", "peak_memory_bytes"}


def torchrun(*command: str) -> subprocess.CompletedProcess:
    """Run a Python command as two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Eleven: the last batch has three, so the processes get unequal shares of it."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for n in range(11):
        prompt, rejected = f"Say {n}" * (n % 3 + 1), " two" * (n % 5 + 1)
        rows.append({"prompt": prompt, "chosen": f" one {n * n}", "rejected": rejected})
    write_jsonl(path, rows)
    return str(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint, pairs) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    orpo.run(Options(checkpoint, pairs, str(out), eval_pairs=pairs, **SETTINGS))
    return out


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--fsdp"], marks=pytest.mark.slow), ["--fsdp", "--recompute", "1"]],
    ids=["ddp", "fsdp", "fsdp-recompute"],
)
def test_two_processes_equal_one(tmp_path, checkpoint, pairs, alone, more):
    stage = ["train.py", "orpo", "--model", checkpoint, "--out", str(tmp_path)]
    stage += ["--pairs", pairs, "--eval-pairs", pairs]
    for name, value in SETTINGS.items():
        stage += [f"--{name.replace('_', '-')}", str(value)]
    done = torchrun(*stage, *more)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # the main process alone speaks
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = read_lines(tmp_path / name), read_lines(alone / name)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            for key in one.keys() - MEASURED:
                assert one[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), key
    one, other = (load_file(out / "epoch-2" / "adapter_model.safetensors") for out in (tmp_path, alone))
    assert one.keys() == other.keys()
    # Adam magnifies the rounding of small gradients: 4 steps at the tests' texts give up to 2e-6.
    assert max((one[key] - other[key]).abs().max() for key in one) < 5e-6


DDP_RUN = """
import pathlib, torch
from cfgsafe.parallel import join, wrap
with join("cpu") as world:
    wrap(torch.nn.Linear(2, 2), world, fsdp=False)(torch.ones(1, 2)).sum().backward()
    world.barrier()
print([thread.read_text() for thread in pathlib.Path("/proc/self/task").glob("*/comm")])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that Linux lists")
def test_no_thread_of_gloo_is_left_to_abort_the_exit(tmp_path):
    """One that frees a tensor while the interpreter ends takes the process down: exit code -6."""
    (tmp_path / "run.py").write_text(DDP_RUN)
    done = torchrun(str(tmp_path / "run.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[") == 2 and "gloo" not in done.stdout
