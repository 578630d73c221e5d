"""What is kept belongs to what gave it: new files in the same place, of the same size and date, are seen."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model

from cfgsafe import subject
from cfgsafe.errors import CheckpointError, InputError
from cfgsafe.identity import file_digest, identity
from cfgsafe.lora import LoRAConfig, adapter_parameters, attach, write_adapter
from cfgsafe.subject import Answer, Subject, answers

CHATS = [[{"role": "user", "content": f"Say {n}"}] for n in range(3)]


def overwrite(path: Path, content: bytes) -> None:
    """Give the file other bytes, but leave its size and its date."""
    before = path.stat()
    assert len(content) == before.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def spoil(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    overwrite(path, content[:-1] + bytes([content[-1] ^ 1]))


def write_random_adapter(folder: Path, seed: int) -> None:
    model, config = random_model(), LoRAConfig(rank=4)
    torch.manual_seed(seed)
    for parameter in attach(model, config):
        torch.nn.init.normal_(parameter, std=0.3)
    write_adapter(folder, adapter_parameters(model), config, base="m")


def asked(who: Subject, kept: Path) -> list[Answer]:
    return answers(who, *subject.load(who), CHATS, "test", 8, kept=kept)


def test_a_retrained_adapter_in_the_same_folder_is_asked_again(tmp_path, checkpoint):
    adapter, kept = tmp_path / "adapter", tmp_path / "kept.jsonl"
    write_random_adapter(adapter, seed=1)
    write_random_adapter(tmp_path / "retrained", seed=2)
    who = Subject(checkpoint, str(adapter))
    first = asked(who, kept)
    assert asked(who, kept) == first and len(kept.read_text().splitlines()) == len(CHATS)
    weights = (tmp_path / "retrained" / "adapter_model.safetensors").read_bytes()
    overwrite(adapter / "adapter_model.safetensors", weights)
    second = asked(who, kept)
    assert second != first
    assert second == asked(Subject(checkpoint, str(tmp_path / "retrained")), tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_new_files_of_a_checkpoint_are_asked_again(name, tmp_path, checkpoint, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }} ")
    who, kept, requests = Subject(str(folder)), tmp_path / "kept.jsonl", []
    real = subject.generate

    def counted(model, some, **more):
        requests.extend(some)
        return real(model, some, **more)

    monkeypatch.setattr(subject, "generate", counted)
    loaded = subject.load(Subject(checkpoint))
    for _ in range(2):
        answers(who, *loaded, CHATS, "test", 2, kept=kept)
    assert len(requests) == len(CHATS)
    spoil(folder / name)
    answers(who, *loaded, CHATS, "test", 2, kept=kept)
    assert len(requests) == 2 * len(CHATS)


def test_an_identity_is_of_contents_not_of_places_and_dates(tmp_path, checkpoint):
    before = identity(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "moved", copy_function=shutil.copyfile)
    (tmp_path / "moved" / "README.md").write_text("no part of the model")
    os.utime(tmp_path / "moved" / "model.safetensors", (1, 1))
    assert identity(tmp_path / "moved") == before != identity(checkpoint, checkpoint)
    (tmp_path / "moved" / "tokenizer.json").rename(tmp_path / "moved" / "tokenizer_config.json")
    assert identity(tmp_path / "moved") != before
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        identity(tmp_path / "nowhere")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot be read .a folder, pipe or device"):
        file_digest(tmp_path / "pipe")
