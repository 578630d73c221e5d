"""Faults for the engine's tests: a call inside a step that fails, and a cache whose unused parts are NaN."""

import random
from collections.abc import Callable

import torch

from cfgsafe import lockstep, prefill
from cfgsafe.decode import Completion, Engine, generate
from cfgsafe.llama import KVCache, Llama, LlamaConfig, Slots
from cfgsafe.lockstep import Batch, Sampler
from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.prefill import Prefill
from cfgsafe.request import Request

# Every call of a step that computes something.
CALLS = (
    *((Llama, "forward"), (Llama, "head"), (KVCache, "copy"), (KVCache, "part"), (Slots, "write")),
    *(
        (Prefill, "__call__"),
        (Prefill, "_compute_prefixes"),
        (Prefill, "_fill"),
        (Prefill, "_forget_prefixes"),
    ),
    *(
        (Sampler, "__init__"),
        (Sampler, "__call__"),
        (Batch, "__init__"),
        (Batch, "_make_room"),
        (Batch, "step"),
    ),
    *((Batch, "_advance"), (Batch, "_feed"), (Engine, "_close_gaps"), (lockstep, "head_tokens")),
    *((lockstep, "combine"), (lockstep, "certified"), (lockstep, "set_adapters"), (prefill, "set_adapters")),
)


def watch(monkeypatch, strike: Callable[[str, tuple], None]) -> None:
    """Call strike(name, arguments) before and after each of CALLS; what it raises comes out of the call."""
    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, _watched(getattr(owner, name), name, strike))


def _watched(call: Callable, name: str, strike: Callable[[str, tuple], None]) -> Callable:
    def watched(*arguments, **named):
        strike(name, arguments)
        result = call(*arguments, **named)
        strike(name, arguments)
        return result

    return watched


def poison(engine: Engine) -> None:
    """Fill all that no request has stored: free rows with NaN, and what lies behind a row's end with 999.

    A slot behind the end of a row in use is multiplied by a weight of 0, so it must be finite, and only so.
    """
    for stored in (engine.cache.keys, engine.cache.values):
        stored[:, engine._free_rows()] = torch.nan
        for state in engine.running:
            for row, length in zip(state.rows, state.positions, strict=True):
                stored[:, row, :, length:] = 999.0


def small_model(vocabulary: int) -> Llama:
    """In float64, where the order of a sum cannot change an argmax; with two adapters, also on the head."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.model.norm.weight.data.fill_(5)
    for seed, name in enumerate(("default", "other")):
        torch.manual_seed(seed)
        for parameter in attach(model, LoRAConfig(rank=2, targets=("q_proj", "up_proj", "lm_head")), name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().requires_grad_(False)


def random_request(
    rng: random.Random,
    vocabulary: int,
    adapters: tuple[str | None, ...] = ("default", "other", None),
    longest_prompt: int = 8,
) -> Request:
    """Guided or not, in each space, masked, sampled, with beginnings that are shared, stops and adapters."""

    def words() -> list[int]:
        return [rng.randrange(4, vocabulary) for _ in range(rng.randrange(1, longest_prompt + 1))]

    guided = rng.random() < 0.5
    shared = [7] * 17 if rng.random() < 0.3 else []
    return Request(
        shared + words(),
        shared + words() if guided else None,
        guidance=rng.choice((0.5, 1.3, 2.0, 5.0)) if guided else 1.0,
        space=rng.choice(("prob", "log")),
        alpha=rng.choice((0.0, 0.0, 0.1)),
        temperature=rng.choice((0.0, 0.0, 0.8)),
        top_k=rng.choice((0, 0, 5)),
        top_p=rng.choice((1.0, 0.9)),
        seed=rng.randrange(1000),
        max_new_tokens=rng.randrange(1, 9),
        stop=((rng.randrange(4, vocabulary),),) if rng.random() < 0.3 else (),
        adapter=rng.choice(adapters),
    )


def alone(model: Llama, requests: list[Request], **settings) -> list[Completion]:
    """The completion of each request when it is served by itself."""
    return [generate(model, [request], **settings)[0] for request in requests]


def same(one: Completion, other: Completion) -> bool:
    """Equal answers, to the last digit that the order of a sum in float64 leaves."""
    if (one.tokens, one.finish_reason) != (other.tokens, other.finish_reason):
        return False
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return all(a == b or (None not in (a, b) and abs(a - b) < 1e-6) for a, b in pairs)
