"""The memory formula against measured peaks, within 10 %, and what it says of an 8B model."""

import pytest
import torch
from conftest import random_model
from torch.profiler import ProfilerActivity, profile

from cfgsafe.blue import memory
from cfgsafe.blue.batches import Pair, Row, collate
from cfgsafe.logprobs import COPY_BYTES, head_logprobs
from cfgsafe.lora import LoRAConfig, attach

SHAPES = {
    "deep": dict(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
    ),
    "wide MLP": dict(
        hidden_size=64,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    ),
    "8B in proportion": dict(
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    ),
}


def measured_peak(work) -> int:
    """The most bytes of tensors alive at once during `work`, above those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_of_blocks", [0, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_formula_is_within_ten_percent(shape, dtype, share_of_blocks):
    assert_within_ten_percent(shape, dtype, share_of_blocks)


@pytest.mark.parametrize("shape", ["deep", "8B in proportion"])
def test_where_all_blocks_are_recomputed_one_is_restored_at_a_time(shape):
    assert_within_ten_percent(SHAPES[shape], torch.bfloat16, 1)


def assert_within_ten_percent(shape: dict[str, int], dtype: torch.dtype, share_of_blocks: float) -> None:
    """One step is measured, and compared with the formula."""
    model = random_model(vocab_size=512, max_position_embeddings=1024, **shape).to(dtype)
    attach(model, LoRAConfig(16))
    model.train()
    model.recomputed = int(share_of_blocks * shape["num_hidden_layers"])
    pair = Pair(Row([*range(400), *[1] * 50], 400), Row([*range(400), *[2] * 50], 400))
    batch = collate([pair, pair], share=True)
    logits = 64 * COPY_BYTES * 512

    def step():
        hidden = model(batch.ids, batch.positions, mask=batch.mask).flatten(0, 1)
        head_logprobs(model, hidden[batch.reads], batch.targets, logits).mean().backward()

    measured = measured_peak(step)
    formula = memory.step_bytes(
        model.config,
        slots=batch.ids.numel(),
        reads=len(batch.targets),
        adapter=0,
        rank=16,
        activation=dtype.itemsize,
        recomputed=model.recomputed,
        logits=logits,
    )
    assert formula.total == pytest.approx(measured, rel=0.1)


def test_a_parameter_of_the_adapter_takes_16_bytes():
    """Weight, gradient and the two moments of AdamW, in float32."""
    model = random_model()
    settings = dict(slots=8, reads=4, rank=2, activation=4, recomputed=0)
    with_adapter = memory.step_bytes(model.config, adapter=1000, **settings)
    without = memory.step_bytes(model.config, adapter=0, **settings)
    assert with_adapter.total - without.total == 16_000
