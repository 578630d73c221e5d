"""Log-probabilities in chunks against the dense ones."""

import math

import pytest
import torch
from conftest import random_model

from cfgsafe.logprobs import COPY_BYTES, head_logprobs, token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_by_hand(dtype):
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=dtype)
    assert torch.allclose(token_logprobs(logits, torch.tensor([1])).exp(), torch.tensor([0.75]), atol=5e-3)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_chunks_equal_dense(rows, dtype, tolerance):
    model = random_model().to(dtype)
    targets = torch.randint(2048, (7,))
    weights = torch.rand(7)
    results = []

    def chunked(h: torch.Tensor) -> torch.Tensor:
        return head_logprobs(model, h, targets, rows * COPY_BYTES * 2048)

    def dense(h: torch.Tensor) -> torch.Tensor:
        return token_logprobs(model.head(h), targets)

    for score in (chunked, dense):
        hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        found = score(hidden)
        (found * weights).sum().backward()
        results.append((found, hidden.grad))
    (found, gradient), (expected, wanted) = results
    assert found.dtype == expected.dtype != torch.bfloat16
    assert torch.allclose(found, expected, atol=10 * tolerance)
    assert torch.allclose(gradient, wanted, atol=tolerance)


def test_huge_logits_stay_finite():
    model = random_model()
    hidden = (1e4 * torch.randn(3, 32)).requires_grad_()
    found = head_logprobs(model, hidden, torch.tensor([1, 2, 3]))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(hidden.grad).all()
