"""Damaged checkpoints: one line that names the file, or the logits of the checkpoint as it was.

A case changes one file of a tiny checkpoint: a field of its JSON, bytes of any file, the header of its
weights, or what kind of thing stands at its name. It must end in seconds, with a CheckpointError of one
line, or load. What loads must be right: where the change is one that a model's numbers do not depend on,
the logits are those of the model as it was; where it is another, they are finite or the weights differ.
"""

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from mutations import mutate_bytes, mutate_json, mutate_safetensors, one_line, stand_in
from safetensors.torch import load_file, save_file

from cfgsafe import load_model, load_tokenizer
from cfgsafe.checkpoint import rewrite_checkpoint
from cfgsafe.config import LlamaConfig
from cfgsafe.errors import CfgsafeError
from cfgsafe.llama import Llama

pytestmark = pytest.mark.slow

SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 64}
SIZES = dict(
    num_hidden_layers=2,
    max_position_embeddings=64,
    rope_scaling=SCALING,
    eos_token_id=5,
    vocab_size=2048,
    hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
TOKENS = torch.arange(24).view(2, 12)
SECONDS = 5  # of the processor, a case
MEGABYTES = 400  # that all cases together may add to the memory of the process
# What changes the numbers of the model when it loads.
NUMBERS = {
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "num_attention_heads",
}
NUMBERS |= {"num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"}


def shard(folder: Path) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for part in range(2):
        name = f"model-{part}.safetensors"
        save_file(dict(tensors[part::2]), folder / name)
        places |= {key: name for key, _ in tensors[part::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="module")
def originals(tmp_path_factory, checkpoint) -> list[Path]:
    """A checkpoint in one file, and in two shards."""
    whole, sharded = (tmp_path_factory.mktemp("fuzz") / name for name in ("whole", "sharded"))
    shutil.copytree(checkpoint, whole)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SIZES))
    save_file({name: p.contiguous() for name, p in model.named_parameters()}, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(model.config.to_dict() | {"extra": {"kept": [1]}}))
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": [2046, 3], "top_p": 0.5}))
    shutil.copytree(whole, sharded)
    shard(sharded)
    return [whole, sharded]


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def replaced(path: Path, content: bytes) -> None:
    path.unlink()  # a link to the original
    path.write_bytes(content)


def change(case: random.Random, folder: Path) -> tuple[str, bool]:
    """Change one file; returns what was changed, and whether a model that loads must be as it was."""
    files = sorted(path for path in folder.iterdir() if path.name != "tokenizer.json")
    path = case.choice(files)
    way = case.choice(["json", "json", "bytes", "stand-in"])
    if way == "stand-in":
        stand_in(case, path)
        return f"{path.name} replaced", path.name == "generation_config.json"
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        if way == "json":
            replaced(path, mutate_safetensors(case, content))
        else:
            replaced(path, mutate_bytes(case, content))
        return path.name, False
    if way == "bytes" or path.suffix != ".json":
        replaced(path, mutate_bytes(case, content))
        return path.name, path.name != "config.json"
    value, fields = mutate_json(case, json.loads(content))
    replaced(path, value)
    return f"{path.name} {fields}", path.name != "config.json" or not NUMBERS & fields


def test_fuzz_checkpoints(cases, originals, tmp_path):
    expected = load_model(originals[0])
    logits = expected.head(expected(TOKENS))
    weights = dict(expected.named_parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = refused = 0
    for case in cases:
        folder = copy(case.choice(originals), tmp_path / "m")
        what, same = change(case, folder)
        start = time.process_time()
        try:
            model = load_model(folder)
            got = model.head(model(TOKENS))
            altered = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
            if same or (not altered and "config.json" not in what):
                assert torch.equal(got, logits), what
            assert all(torch.isfinite(p).all() for p in model.parameters()), what
            if altered:
                assert "safetensors" in what, what
            loaded += 1
        except CfgsafeError as error:
            one_line(error, folder)
            refused += 1
        for use in (
            load_tokenizer,
            lambda folder: rewrite_checkpoint(folder, tmp_path / "copy", lambda _, t: t),
        ):
            try:
                use(folder)
            except CfgsafeError as error:
                one_line(error, folder)
                assert not (tmp_path / "copy").exists(), what
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        assert time.process_time() - start < SECONDS, what
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES
    print(f"{loaded} loaded, {refused} refused, {grown:.0f} MB more")
    assert loaded + refused == 1 or (loaded and refused)  # one case can be run alone
