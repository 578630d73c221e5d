"""Top-k and top-p of the Triton kernel at their borders, and how often each path reads the vocabulary."""

import math
import os
import struct
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import Sampling

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
from cfgsafe.kernels import guidance  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 512


def sampling(top_k: list[int], top_p: list[float], temperature: float = 1.0) -> Sampling:
    """Requests without guidance, each with a row of its own."""
    rows = torch.arange(len(top_k), device=DEVICE)
    settings = Sampling.uniform(rows, torch.full_like(rows, -1), 1.0, "prob", temperature)
    k = torch.tensor(top_k, dtype=torch.int32, device=DEVICE)
    return replace(settings, top_k=k, top_p=torch.tensor(top_p, device=DEVICE), truncates=True)


def kept(scores: torch.Tensor, settings: Sampling) -> list[list[int]]:
    """The tokens that the kernel's bounds keep of scores (B, V)."""
    B, V = scores.shape
    records = torch.zeros(B, -(-V // BLOCK), guidance.RECORD.value)
    for number, part in enumerate(scores.split(BLOCK, dim=1)):
        records[:, number, guidance.SCORE_MAX.value] = part.amax(1)
    bounds = guidance.find_bounds(scores.to(DEVICE), records.to(DEVICE), settings, BLOCK).cpu()
    found = []
    for row, (k, p) in enumerate(zip(settings.top_k.tolist(), settings.top_p.tolist(), strict=True)):
        bound = -math.inf
        if k > 0 or p < 1:
            bound = float_of(int(bounds[row, 1 if p < 1 else 0]))
        found.append((scores[row] >= bound).logical_and(scores[row] > -math.inf).nonzero()[:, 0].tolist())
    return found


def float_of(key: int) -> float:
    """The float32 with this key, by another way than the kernel's."""
    bits = key - 2**31 if key >= 2**31 else 2**32 - 1 - key
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def wanted(scores: torch.Tensor, settings: Sampling) -> list[list[int]]:
    """The same by the reference, in float64."""
    left = reference.truncate(scores.double(), settings.top_k.cpu(), settings.top_p.cpu())
    return [(row > -math.inf).nonzero()[:, 0].tolist() for row in left]


def neighbours(start: float, count: int) -> torch.Tensor:
    """Adjacent float32 numbers, the lowest first."""
    numbers = [np.float32(start)]
    for _ in range(count - 1):
        numbers.append(np.nextafter(numbers[-1], np.float32(np.inf)))
    return torch.tensor(np.array(numbers))


def shuffled(values: torch.Tensor) -> torch.Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]


ROWS = {
    "adjacent floats": shuffled(neighbours(-7.3, 1300)),
    "adjacent floats around 0": shuffled(torch.cat((-neighbours(0.0, 600), neighbours(1e-45, 600)))),
    "equal": torch.full((1100,), -3.0),
    "two values": shuffled(torch.tensor([-1.0, -2.0]).repeat(600)),
    "few are possible": shuffled(
        torch.cat((torch.full((1200,), -math.inf), torch.tensor([-1.0, -2.0, -4.0])))
    ),
    "one is possible": shuffled(torch.cat((torch.full((1200,), -math.inf), torch.tensor([-80.0])))),
    "falling to the end": torch.linspace(-30, 0, 1537),
    "far apart": shuffled(torch.cat((torch.linspace(-1e4, -90, 1000), torch.tensor([0.0, -1e-3, -3e38])))),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_tokens_kept_are_those_of_the_reference_in_float64(name):
    """One token, most, all and more than there are; shares from none to nearly all; and both together."""
    limits = [(k, 1.0) for k in (1, 2, 3, 600, 1099, 1100, 10**6)]
    limits += [(0, p) for p in (0.0, 1e-30, 1e-7, 0.3, 0.5, 0.9, 0.999)]
    limits += [(3, 0.5), (600, 0.9), (10**6, 0.3), (1, 0.99)]
    settings = sampling([k for k, _ in limits], [p for _, p in limits])
    scores = ROWS[name][None].repeat(len(limits), 1)
    for limit, ours, theirs in zip(limits, kept(scores, settings), wanted(scores, settings), strict=True):
        assert ours == theirs, limit


def test_random_rows_keep_what_the_reference_keeps():
    random = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 6.0):
        scores = spread * torch.randn(40, 2000, generator=random)
        k = torch.randint(0, 2100, (40,), generator=random) * (torch.rand(40, generator=random) < 0.7)
        settings = sampling(k.tolist(), torch.rand(40, generator=random).tolist())
        assert kept(scores, settings) == wanted(scores, settings)


def test_the_last_token_of_the_vocabulary_can_be_the_only_one():
    logits = torch.zeros(2, 1501)
    logits[:, -1] = 5.0
    tokens, _ = guidance.next_tokens(logits.to(DEVICE), sampling([1, 0], [1.0, 1e-6]), BLOCK)
    assert tokens.tolist() == [1500, 1500]


def test_a_row_does_not_depend_on_the_batch():
    logits = 3 * torch.randn(12, 1500, generator=torch.Generator().manual_seed(1))
    k, p = [0, 1, 40, 700] * 3, [0.9, 1.0, 0.8, 0.2] * 3
    tokens, logprobs = guidance.next_tokens(logits.to(DEVICE), sampling(k, p, 1.3), BLOCK)
    for row in range(12):
        settings = sampling([k[row]], [p[row]], 1.3)
        seed = torch.tensor([row], device=DEVICE)  # `uniform` numbers its rows
        alone = replace(settings, positive=seed, seed=seed)
        token, logprob = guidance.next_tokens(logits.to(DEVICE), alone, BLOCK)
        assert token[0] == tokens[row] and torch.equal(logprob[0], logprobs[row])


@pytest.mark.skipif(DEVICE == "cuda", reason="counts in Triton's interpreter")
@pytest.mark.parametrize(
    ("temperature", "k", "p", "sweeps"),
    [(0.0, 0, 1.0, 0), (1.0, 0, 1.0, 0), (1.0, 5, 1.0, 4), (1.0, 0, 0.9, 4), (1.0, 5, 0.9, 7)],
)
@pytest.mark.parametrize("guided", [True, False])
def test_how_often_each_path_reads_and_writes_the_vocabulary(monkeypatch, temperature, k, p, sweeps, guided):
    """Logits twice; scores, where needed, are written once, read at three levels a limit, and drawn."""
    from triton.runtime.interpreter import interpreter_builder

    V, moved = 1300, Counter()
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(2)).bfloat16()
    first, last = logits.data_ptr(), logits.data_ptr() + logits.nbytes
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def loading(ptrs, mask, *more):
        if ptrs.data.size == BLOCK:  # all else is of other sizes
            of_logits = ((ptrs.data >= first) & (ptrs.data < last) & mask.data).sum()
            moved["logits"] += int(of_logits)
            moved["scores read"] += int(mask.data.sum() - of_logits)
        return load(ptrs, mask, *more)

    def storing(ptrs, value, mask, *more):
        if ptrs.data.size == BLOCK:
            moved["scores written"] += int(mask.data.sum())
        return store(ptrs, value, mask, *more)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", loading)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", storing)
    settings = replace(sampling([k], [p], temperature), truncates=bool(sweeps))
    if guided:
        settings = replace(settings, negative=torch.tensor([1]), guidance=torch.tensor([3.0]))
    guidance.next_tokens(logits, settings, BLOCK)
    assert moved["logits"] == 2 * (2 if guided else 1) * V
    assert moved["scores read"] == sweeps * V
    assert moved["scores written"] == (V if sweeps else 0)
