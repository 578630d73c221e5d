"""Two gloo processes equal one, with DDP and with FSDP2: every step's values, the adapter, and a resumed run."""

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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Eleven: the last batch has three, so the processes get unequal shares of it."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_jsonl(
        path,
        [
            {"prompt": f"Say {n}" * (n % 3 + 1), "chosen": f" one {n * n}", "rejected": " two" * (n % 5 + 1)}
            for n in range(11)
        ],
    )
    return str(path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint, pairs) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    orpo.run(Options(checkpoint, pairs, str(out), eval_pairs=pairs, **SETTINGS))
    return out


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--fsdp"], marks=pytest.mark.slow), ["--fsdp", "--recompute", "1"]],
    ids=["ddp", "fsdp", "fsdp-recompute"],
)
def test_two_processes_equal_one(tmp_path, checkpoint, pairs, alone, more):
    settings = [
        part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = [
        "train.py",
        "orpo",
        "--model",
        checkpoint,
        "--pairs",
        pairs,
        "--eval-pairs",
        pairs,
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *stage, *settings, *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # the main process alone speaks
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = (
            [json.loads(line) for line in (out / name).read_text().splitlines()] for out in (tmp_path, alone)
        )
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            for key in one.keys() - {"tokens_per_second", "peak_memory_bytes"}:
                assert one[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), key
    one, other = (load_file(out / "epoch-2" / "adapter_model.safetensors") for out in (tmp_path, alone))
    assert one.keys() == other.keys()
    assert max((one[key] - other[key]).abs().max() for key in one) < 1e-6
