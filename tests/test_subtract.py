"""Task-vector subtraction, tensor by tensor."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import config, random_model
from safetensors.torch import load_file, save_file

from cfgsafe import load_model
from cfgsafe.blue.subtract import Options, run, subtract
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import BASE


def test_by_hand():
    base, tuned = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0])
    assert subtract("t", base, tuned, 0.5, relu=False).tolist() == [0.0, 1.5]
    assert subtract("t", base, tuned, 0.5, relu=True).tolist() == [0.0, 1.0]


def test_arithmetic_is_float32_and_the_result_the_bases_dtype():
    base, tuned = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([257.0], dtype=torch.float32)
    out = subtract("t", base, tuned, -1.0, relu=False)
    assert out.dtype == torch.bfloat16 and out.item() == torch.tensor(257.0).bfloat16().item()


def test_a_written_model_is_the_formula(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        save_checkpoint(tmp_path / name, random_model(seed), tokenizer_from=BASE, dtype=torch.float32)
    run(Options(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "sub"), scale=0.5))
    base, tuned, out = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned", "sub"))
    assert set(out) == set(base)
    for name in base:
        assert torch.allclose(out[name], 1.5 * base[name] - 0.5 * tuned[name], atol=1e-6)
    load_model(tmp_path / "sub")


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_weight_that_is_not_finite_names_its_file_and_nothing_is_written(tmp_path, which):
    for name in ("base", "tuned"):
        save_checkpoint(tmp_path / name, random_model(), tokenizer_from=BASE, dtype=torch.float32)
    path = tmp_path / which / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=f"{path}: tensor '.*up_proj.weight' holds numbers that are not"
    ):
        run(Options(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "sub")))
    assert not (tmp_path / "sub").exists()


PEAK = """
import resource, sys
from cfgsafe.blue.subtract import Options, run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(Options(*sys.argv[1:]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """193 MB in four shards; memory holds the largest tensor (16.8 MB) in float32, and file pages."""
    shapes = {"model.embed_tokens.weight": (4096, 2048)}
    shapes |= {f"model.layers.{n}.mlp.up_proj.weight": (2048, 2048) for n in range(21)}
    largest = 4096 * 2048 * 2
    for name in ("base", "tuned"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config().to_dict()))
        index = {}
        for part in range(4):
            tensors = {key: torch.randn(shape).bfloat16() for key, shape in list(shapes.items())[part::4]}
            save_file(tensors, folder / f"{part}.safetensors")
            index |= dict.fromkeys(tensors, f"{part}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    arguments = [str(tmp_path / name) for name in ("base", "tuned", "sub")]
    command = [sys.executable, "-c", PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(done.stdout.splitlines()[-1])
    written = sum(file.stat().st_size for file in (tmp_path / "sub").glob("*.safetensors"))
    assert grown < 10 * largest < written
    assert {f.name for f in (tmp_path / "sub").iterdir()} == {f.name for f in (tmp_path / "base").iterdir()}
    last = [load_file(tmp_path / name / "3.safetensors") for name in ("base", "tuned", "sub")]
    for key, value in last[2].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (1.5 * last[0][key].float() - 0.5 * last[1][key].float()).bfloat16())


def test_another_end_token_is_no_other_architecture(tmp_path):
    for name, end in (("base", 2046), ("tuned", 2045)):
        model = random_model(eos_token_id=end)
        save_checkpoint(tmp_path / name, model, tokenizer_from=BASE, dtype=torch.float32)
    (tmp_path / "base" / "LICENSE").write_text("terms")
    for _ in range(2):  # also over an earlier result
        run(Options(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "sub")))
    assert (tmp_path / "sub" / "LICENSE").read_text() == "terms"


def test_models_that_do_not_match_are_refused_and_nothing_is_written(tmp_path):
    base, tuned = random_model(), random_model(intermediate_size=64)
    save_checkpoint(tmp_path / "base", base, tokenizer_from=BASE, dtype=torch.float32)
    save_checkpoint(tmp_path / "tuned", tuned, tokenizer_from=BASE, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="config.json differs"):
        run(Options(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "sub")))
    with pytest.raises(CheckpointError, match="'t' has shape"):
        subtract("t", torch.zeros(2), torch.zeros(3), 0.5, relu=False)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned"}
