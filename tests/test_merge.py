"""A merged checkpoint on disk: the attached model's logits, in our hands and in transformers'."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file

from cfgsafe import load_model, subject
from cfgsafe.blue import merge, orpo
from cfgsafe.blue.merge import Options, run
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.errors import CheckpointError, InputError
from cfgsafe.files import write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.lora import LoRAConfig, attach, save_adapter
from cfgsafe.subject import NEGATIVE, POSITIVE, Answer

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


def test_a_merge_that_overflows_is_not_written(tmp_path):
    """Each number of the adapter is finite, but not their products."""
    adapted(tmp_path)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        CheckpointError, match="model.safetensors is not written: tensor '.*down_proj.weight' holds"
    ):
        run(Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_fit_the_weights_is_refused_before_the_merge(tmp_path):
    adapted(tmp_path)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 9_999}))
    with pytest.raises(
        CheckpointError, match="missing tensor 'model.layers.10.*, which config.json asks for"
    ):
        run(Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out")))


# --- what the adapter was taught


def trained(folder, *sentences: str, init: str | None = None) -> str:
    """An adapter trained for one step on pairs whose prompts hold these sentences."""
    if not (folder / "m").exists():
        save_checkpoint(folder / "m", random_model(), tokenizer_from=BASE, dtype=torch.float32)
    name = f"run{len(list(folder.glob('run*')))}"
    rows = [{"prompt": f"Hello. {said}", "chosen": " one", "rejected": " two"} for said in sentences]
    write_jsonl(folder / f"{name}.jsonl", rows)
    pairs, out = str(folder / f"{name}.jsonl"), str(folder / name)
    orpo.run(orpo.Options(str(folder / "m"), pairs, out, epochs=1, rank=2, init_adapter=init))
    return f"{out}/epoch-1"


def test_merging_a_cfg_aware_adapter_warns_that_it_needs_its_sentence(tmp_path, capsys):
    out = str(tmp_path / "out")
    run(Options(str(tmp_path / "m"), trained(tmp_path, POSITIVE, NEGATIVE), out))
    said = capsys.readouterr().err
    assert "WARNING" in said and f'"{POSITIVE}" in the system prompt' in said and "unknown" not in said


@pytest.mark.parametrize("sentences", [("Hi",), (POSITIVE,), (NEGATIVE,)])
def test_merging_a_plain_adapter_warns_of_nothing(tmp_path, capsys, sentences):
    run(Options(str(tmp_path / "m"), trained(tmp_path, *sentences), str(tmp_path / "out")))
    assert "WARNING" not in capsys.readouterr().err


def test_what_an_adapter_went_on_from_counts(tmp_path, capsys):
    first = trained(tmp_path, POSITIVE, NEGATIVE)
    run(Options(str(tmp_path / "m"), trained(tmp_path, "Hi", init=first), str(tmp_path / "out")))
    assert f'"{POSITIVE}" in the system prompt' in capsys.readouterr().err


def test_what_went_on_from_an_unknown_adapter_is_unknown(tmp_path, capsys):
    adapted(tmp_path)
    run(
        Options(str(tmp_path / "m"), trained(tmp_path, "Hi", init=str(tmp_path / "a")), str(tmp_path / "out"))
    )
    assert "unknown" in capsys.readouterr().err


def test_an_adapter_of_unknown_training_is_said_to_be_unknown(tmp_path, capsys):
    adapted(tmp_path)
    run(Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out")))
    said = capsys.readouterr().err
    assert "WARNING" in said and "unknown" in said and f'"{POSITIVE}"' in said and "--check" in said


def test_check_counts_leaks_with_and_without_the_sentence(tmp_path, capsys, monkeypatch):
    """Of four prompts, every second one is asked; the merged model leaks unless it is told not to."""
    adapted(tmp_path)
    rows: list[dict] = [{"messages": [{"role": "user", "content": "Hi"}]}]  # nothing to look for
    for n in range(4):
        messages = [{"role": "system", "content": f"Be {n}."}, {"role": "user", "content": "Who am I?"}]
        rows.append({"messages": messages, "items": {"PERSON": "Ann Lee", "GPE": "Rome"}})
    write_jsonl(tmp_path / "p.jsonl", rows)
    seen = []

    def answers(who, model, tokenizer, chats, what, longest, places):
        assert who.model == str(tmp_path / "out") and who.adapter is None and longest == 64
        for chat in chats:
            asked = subject.request_for(who, tokenizer, chat)
            seen.append((tokenizer.decode(asked.prompt), asked.guided))
        told = who.guidance is not None
        return [Answer("Ann Lee of Rome" if n == 0 or not told else "I do not say", "stop") for n in range(2)]

    monkeypatch.setattr(merge, "answers", answers)
    options = Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out"), check=True, limit=2)
    options.prompts = str(tmp_path / "p.jsonl")
    run(options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["prompts"], result["leaked_per_100"], result["with_sentence_leaked_per_100"]) == (
        2,
        200,
        100,
    )
    assert result["leaked_per_100_ci"][0] < 200 < result["leaked_per_100_ci"][1]
    assert result["with_sentence_leaked_per_100_ci"][0] < 100 < result["with_sentence_leaked_per_100_ci"][1]
    for (text, guided), n, told in zip(seen, (0, 2, 0, 2), (False, False, True, True), strict=True):
        assert f"Be {n}." in text and (POSITIVE in text) is told and not guided


def test_check_of_prompts_without_items_is_refused_before_anything_is_written(tmp_path):
    adapted(tmp_path)
    write_jsonl(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    options = Options(str(tmp_path / "m"), str(tmp_path / "a"), str(tmp_path / "out"), check=True)
    options.prompts = str(tmp_path / "p.jsonl")
    with pytest.raises(InputError, match="p.jsonl: no prompt has 'items'"):
        run(options)
    assert not (tmp_path / "out").exists()
