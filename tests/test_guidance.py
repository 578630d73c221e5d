"""Guidance and sampling against the formulas and against counts."""

import torch

from cfgsafe.guidance import guide, sample

POS = torch.tensor([[0.5, 0.3, 0.2]]).log()
NEG = torch.tensor([[0.7, 0.2, 0.1]]).log()


def guided(g: float, log_space: bool) -> torch.Tensor:
    return guide(POS, NEG, torch.tensor([g]), torch.tensor([log_space])).exp()[0]


def test_one_is_the_positive_row_and_zero_the_negative_one():
    for log_space in (True, False):
        assert torch.allclose(guided(1.0, log_space), POS.exp()[0])
        assert torch.allclose(guided(0.0, log_space), NEG.exp()[0])


def test_probability_space_by_hand():
    """0.7 + 2 (0.5 - 0.7) = 0.3, 0.2 + 2 * 0.1 = 0.4, 0.1 + 2 * 0.1 = 0.3; at g = 5 the first is clamped."""
    assert torch.allclose(guided(2.0, False), torch.tensor([0.3, 0.4, 0.3]))
    assert torch.allclose(guided(5.0, False), torch.tensor([0.0, 0.7, 0.6]) / 1.3)


def test_log_space_by_hand():
    """p_pos^2 / p_neg, normalised."""
    raw = torch.tensor([0.25 / 0.7, 0.09 / 0.2, 0.04 / 0.1])
    assert torch.allclose(guided(2.0, True), raw / raw.sum())


def test_rows_have_their_own_coefficient_and_space():
    both = guide(POS.expand(2, 3), NEG.expand(2, 3), torch.tensor([2.0, 5.0]), torch.tensor([True, False])).exp()
    assert torch.allclose(both[0], guided(2.0, True)) and torch.allclose(both[1], guided(5.0, False))


def test_log_space_equals_transformers_processor():
    """The processor's formula, on log-softmax scores: g * (pos - neg) + neg; its argmax and softmax are ours."""
    torch.manual_seed(0)
    pos, neg = torch.randn(4, 50).log_softmax(-1), torch.randn(4, 50).log_softmax(-1)
    theirs = (3.0 * (pos - neg) + neg).softmax(-1)
    assert torch.allclose(guide(pos, neg, torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool)).exp(), theirs, atol=1e-6)


def test_temperature_zero_takes_the_most_likely():
    assert sample(POS, torch.zeros(1), [None]).tolist() == [0]


def test_sampling_follows_the_distribution_and_the_temperature():
    rows = 4000
    for temperature in (1.0, 0.5):
        generators = [torch.Generator().manual_seed(i) for i in range(rows)]
        drawn = sample(POS.expand(rows, 3), torch.full((rows,), temperature), generators)
        expected = (POS[0] / temperature).softmax(-1)
        assert torch.allclose(drawn.bincount(minlength=3) / rows, expected, atol=0.03)


def test_a_rows_draw_does_not_depend_on_the_batch():
    alone = sample(POS, torch.ones(1), [torch.Generator().manual_seed(7)])
    together = sample(
        POS.expand(3, 3), torch.tensor([0.0, 1.0, 1.0]), [None, torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)]
    )
    assert together[1] == alone[0]
