"""A merged checkpoint on disk: the attached model's logits, in our hands and in transformers'."""

import pytest
import torch
from conftest import random_model

from cfgsafe import load_model
from cfgsafe.blue.merge import Options, run
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.errors import CheckpointError
from cfgsafe.hub import BASE
from cfgsafe.lora import LoRAConfig, attach, save_adapter

TOKENS = torch.arange(30).view(2, 15)


def adapted(folder, targets=("q_proj", "down_proj"), **changes):
    """A checkpoint and an adapter for it in `folder`; the attached model."""
    model, adapter = random_model(**changes), LoRAConfig(rank=4, alpha=8, targets=targets)
    save_checkpoint(folder / "m", model, tokenizer_from=BASE, dtype=torch.float32)
    for parameter in attach(model, adapter):
        torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(folder / "a", model, adapter, base="m")
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("changes", [{}, {"targets": ("lm_head", "v_proj"), "tie_word_embeddings": False}])
def test_the_merged_checkpoint_is_the_attached_model(tmp_path, changes):
    model = adapted(tmp_path, **changes)
    run(Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out")))
    merged = load_model(tmp_path / "out")
    want = model.head(model(TOKENS))
    assert torch.allclose(merged.head(merged(TOKENS)), want, atol=1e-4)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(theirs(TOKENS).logits, want, atol=1e-4)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in (tmp_path / "m").iterdir()}


def test_an_adapter_on_a_tied_head_cannot_be_merged(tmp_path):
    adapted(tmp_path, targets=("lm_head",))
    with pytest.raises(CheckpointError, match="tied to the embedding"):
        run(Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
