"""Damaged adapters: one line that names the folder and an untouched model, or the update that the files say.

What loads is compared with a second reading of the two files, written here after PEFT: for each pair of
tensors W + scale B A, where the scale follows from the settings. Ternary adapters, whose tensors PEFT does
not read, are compared with the adapter as it was.
"""

import copy
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from mutations import mutate_bytes, mutate_json, mutate_safetensors, one_line, stand_in
from safetensors.torch import load_file

from cfgsafe import patterns
from cfgsafe.config import LlamaConfig
from cfgsafe.errors import CfgsafeError
from cfgsafe.llama import Llama
from cfgsafe.lora import adapted_layers, attach, load_adapter, save_adapter
from cfgsafe.lora_config import LoRAConfig

pytestmark = pytest.mark.slow

SIZES = dict(
    vocab_size=64, hidden_size=8, intermediate_size=12, num_hidden_layers=2, max_position_embeddings=64
)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=4)
SETTINGS = (
    {"rank": 2, "alpha": 4.0},
    {"rank": 2, "targets": r".*\.1\..*(up|v)_proj", "rslora": True},
    {"rank": 2, "rank_pattern": {"q_proj": 1, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"q_proj": 1.0}},
    {"rank": 4, "bits": 1.58},
)
SCALING = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "cfgsafe_bits"}
TOKENS = torch.arange(24).view(2, 12)
SECONDS = 5  # of the processor, a case
BEYOND = 1e6  # of an update, where two orders of summation are no longer close
PREFIX, CONFIG, WEIGHTS = "base_model.model.", "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plain() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**SIZES)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def originals(tmp_path_factory, plain) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("adapters"), []
    for number, settings in enumerate(SETTINGS):
        model, config = copy.deepcopy(plain), LoRAConfig(**settings)
        for parameter in attach(model, config):
            torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(folder / str(number), model, config, base="b")
        made.append(folder / str(number))
    return made


def change(case: random.Random, folder: Path) -> set[str]:
    """Change one file; returns the settings that were changed."""
    path = folder / case.choice([CONFIG, CONFIG, WEIGHTS])
    content, way = path.read_bytes(), case.random()
    if way < 0.1:
        stand_in(case, path)
        return set()
    if way < 0.3:
        path.write_bytes(mutate_bytes(case, content))
        return SCALING
    if path.name == WEIGHTS:
        path.write_bytes(mutate_safetensors(case, content))
        return set()
    text, fields = mutate_json(case, json.loads(content))
    path.write_bytes(text)
    return fields


def first(table: dict, name: str, default: float) -> float:
    return next((table[key] for key in table if re.match(rf"(.*\.)?({key})$", name)), default)


def second_reading(plain: Llama, folder: Path) -> tuple[torch.Tensor, float]:
    """The logits of the model with what the files add to its weights, and the largest number added."""
    model, raw = copy.deepcopy(plain), json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    tensors, largest = load_file(folder / WEIGHTS), 0.0
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = first(raw.get("rank_pattern") or {}, name, raw["r"])
        alpha = first(raw.get("alpha_pattern") or {}, name, raw["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
        assert a.shape[0] == rank
        update = scale * (tensors[key.replace("lora_A", "lora_B")].float() @ a.float())
        model.get_parameter(f"{name}.weight").data += update
        largest = max(largest, update.abs().max().item())
    return model.head(model(TOKENS)), largest


def test_fuzz_adapters(cases, originals, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    logits = plain.head(plain(TOKENS))
    ternary = copy.deepcopy(plain)
    load_adapter(originals[3], ternary)
    ternary_logits = ternary.head(ternary(TOKENS))
    folder, loaded, compared, refused = tmp_path / "a", 0, 0, 0
    for case in cases:
        shutil.rmtree(folder, ignore_errors=True)
        source = case.choice(originals)
        shutil.copytree(source, folder)
        model = copy.deepcopy(plain)
        changed = change(case, folder)
        start = time.process_time()
        try:
            config = load_adapter(folder, model)
        except CfgsafeError as error:
            one_line(error, folder)
            assert not adapted_layers(model) and not model.shares
            assert torch.equal(model.head(model(TOKENS)), logits)
            refused += 1
        else:
            got = model.head(model(TOKENS))
            if config.bits is None:
                expected, largest = second_reading(plain, folder)
                if largest < BEYOND:
                    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
                    compared += 1
            elif not SCALING & changed and (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes():
                assert torch.equal(got, ternary_logits)
            loaded += 1
        assert time.process_time() - start < SECONDS, changed
    print(f"{loaded} loaded, {compared} compared, {refused} refused")
    assert loaded + refused == 1 or (compared and refused)  # one case can be run alone
