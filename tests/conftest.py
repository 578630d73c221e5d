"""Fixtures: a tiny random Llama over the demo's tokenizer, also as a checkpoint; an endpoint on loopback.

`cases` is the fixture of the fuzzers, tests/fuzzing.py.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too: the workers share the cores

import endpoint
import pytest
import torch
from fuzzing import cases as cases

from cfgsafe import remote
from cfgsafe.checkpoint import save_checkpoint
from cfgsafe.hub import BASE
from cfgsafe.llama import Llama, LlamaConfig
from cfgsafe.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

KEY = "sk-never-to-be-seen"
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(**changes) -> LlamaConfig:
    fields = dict(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    fields |= dict(
        max_position_embeddings=512,
        rope_theta=10000.0,
        rope_scaling=ROPE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2046,
    )
    return LlamaConfig(**{**fields, **changes})


def random_model(seed: int = 0, **changes) -> Llama:
    torch.manual_seed(seed)
    model = Llama(config(**changes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.requires_grad_(False).eval()


@pytest.fixture
def model() -> Llama:
    return random_model()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BASE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint(folder, random_model(), tokenizer_from=BASE, dtype=torch.float32)
    return str(folder)


@pytest.fixture
def quick(monkeypatch):
    """A key for an endpoint, and short waits between attempts."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


@pytest.fixture
def serve(quick, monkeypatch):
    """Start an endpoint and point the environment at it."""
    started = []

    def start(reply=lambda body: "Fine.", **settings):
        context = endpoint.running(reply, **{"share": 0, **settings})
        started.append(context)
        server = context.__enter__()
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return server

    yield start
    for context in started:
        context.__exit__(None, None, None)
