"""Guidance and sampling against the formulas, against counts, against transformers, and against float64."""

import math

import pytest
import torch
from conftest import random_model

from cfgsafe.guidance import combine, next_tokens
from cfgsafe.kernels import reference
from cfgsafe.kernels.reference import SPACES, Sampling, guide, gumbel, philox, truncate

POS = torch.tensor([[0.5, 0.3, 0.2]]).log()
NEG = torch.tensor([[0.7, 0.2, 0.1]]).log()


def guided(g: float, space: str, alpha: float = 0.0) -> torch.Tensor:
    return guide(POS, NEG, torch.tensor([g]), number(space), torch.tensor([alpha])).exp()[0]


def number(space: str, rows: int = 1) -> torch.Tensor:
    """The same space for all `rows`, as `guide` wants it."""
    return torch.full((rows,), SPACES.index(space), dtype=torch.int32)


def settings(rows: int, **changes) -> Sampling:
    """The same settings for all `rows` requests, on rows 0 and 1 of the logits; each has its own seed."""
    plain = {"guidance": 1.0, "alpha": 0.0, "temperature": 1.0, "top_p": 1.0} | changes
    return Sampling(
        positive=torch.zeros(rows, dtype=torch.long),
        negative=torch.ones(rows, dtype=torch.long),
        space=number(plain.pop("space", "prob"), rows),
        top_k=torch.full((rows,), plain.pop("top_k", 0), dtype=torch.int32),
        seed=torch.arange(rows),
        step=torch.zeros(rows, dtype=torch.long),
        **{name: torch.full((rows,), value) for name, value in plain.items()},
    )


def test_one_is_the_positive_row_and_zero_the_negative_one():
    for space in SPACES:
        assert torch.allclose(guided(1.0, space), POS.exp()[0])
        assert torch.allclose(guided(0.0, space), NEG.exp()[0])


def test_probability_space_by_hand():
    """0.7 + 2 (0.5 - 0.7) = 0.3, 0.2 + 2 * 0.1 = 0.4, 0.1 + 2 * 0.1 = 0.3; at g = 5 the first is clamped."""
    assert torch.allclose(guided(2.0, "prob"), torch.tensor([0.3, 0.4, 0.3]))
    assert torch.allclose(guided(5.0, "prob"), torch.tensor([0.0, 0.7, 0.6]) / 1.3)


def test_log_space_by_hand():
    """p_pos^2 / p_neg, normalised."""
    raw = torch.tensor([0.25 / 0.7, 0.09 / 0.2, 0.04 / 0.1])
    assert torch.allclose(guided(2.0, "log"), raw / raw.sum())


def test_log_space_where_one_side_excludes_a_token():
    """Its logarithm counts as -1000: g = 0 is still the negative row, and at g = 2 the token wins."""
    excluding = torch.tensor([[0.5, 0.5, 0.0]]).log()
    found = guide(excluding, NEG, torch.tensor([0.0]), number("log")).exp()[0]
    assert torch.allclose(found, NEG.exp()[0])
    found = guide(POS, excluding, torch.tensor([2.0]), number("log")).exp()[0]
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 1.0]))


def test_the_mask_keeps_what_is_plausible():
    """0.3 is at least half of 0.5, 0.2 is not."""
    assert torch.allclose(guided(2.0, "prob", 0.5), torch.tensor([0.3, 0.4, 0.0]) / 0.7)
    assert torch.allclose(guided(2.0, "log", 0.9), torch.tensor([1.0, 0.0, 0.0]))


def test_a_mask_of_one_keeps_all_of_the_most_likely_tokens():
    """The bound itself is plausible. 0.4 + 2 (0.4 - 0.4) and 0.4 + 2 (0.4 - 0.2) stay, as 1 to 2."""
    pos, neg = torch.tensor([[0.4, 0.4, 0.2]]).log(), torch.tensor([[0.4, 0.2, 0.4]]).log()
    found = guide(pos, neg, torch.tensor([2.0]), number("prob"), torch.tensor([1.0])).exp()[0]
    assert torch.allclose(found, torch.tensor([0.4, 0.6, 0.0]))


def test_rows_have_their_own_coefficient_and_space():
    spaces = torch.cat((number("log"), number("prob")))
    both = guide(POS.expand(2, 3), NEG.expand(2, 3), torch.tensor([2.0, 5.0]), spaces).exp()
    assert torch.allclose(both[0], guided(2.0, "log")) and torch.allclose(both[1], guided(5.0, "prob"))


def test_log_space_equals_transformers_processor():
    """The processor's formula on log-softmax scores is g * (pos - neg) + neg; its softmax is ours."""
    torch.manual_seed(0)
    pos, neg = torch.randn(4, 50).log_softmax(-1), torch.randn(4, 50).log_softmax(-1)
    theirs = (3.0 * (pos - neg) + neg).softmax(-1)
    ours = guide(pos, neg, torch.full((4,), 3.0), number("log", 4)).exp()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_every_space_has_a_formula_and_any_other_number_gives_nan():
    for index in range(len(SPACES)):
        assert guide(POS, NEG, torch.tensor([2.0]), torch.tensor([index])).isfinite().all()
    assert guide(POS, NEG, torch.tensor([2.0]), torch.tensor([len(SPACES)])).isnan().all()


def test_philox_gives_its_published_numbers():
    """The known answer of Random123 for counter and key 0; and the key counts."""
    zero = torch.zeros(1, dtype=torch.long)
    assert philox(zero, zero, zero).item() == 0x6627E8D5
    assert philox(torch.tensor([-1]), zero, zero).item() != philox(torch.tensor([1]), zero, zero).item()


def test_the_noise_of_a_large_vocabulary_is_that_of_its_tokens_one_by_one(monkeypatch):
    """Computed in parts that fit the cache, the last one smaller; seeds may be negative or large."""
    monkeypatch.setattr(reference, "IN_CACHE", 3 * 16)
    seeds, steps = torch.tensor([-5, 2**40, 7]), torch.tensor([0, 3, 10**6])
    noise = gumbel(seeds, steps, 50)
    assert noise.shape == (3, 50)
    for token in (0, 15, 16, 49):
        bits = philox(seeds, torch.full((3,), token), steps)
        uniform = ((bits >> 9).double() + 0.5) / 2**23
        assert torch.allclose(noise[:, token].double(), -(-uniform.log()).log(), atol=1e-5)


def test_the_noise_is_another_for_each_seed_step_and_token():
    seeds, steps = torch.tensor([5, 5, 6, 5]), torch.tensor([0, 1, 0, 0])
    noise = gumbel(seeds, steps, 50)
    assert torch.equal(noise[3], noise[0]) and len(noise[:3].unique()) == 150


def p_value(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of Pearson's chi-square test, by the Wilson-Hilferty approximation.

    Tokens that are expected less than ten times are pooled.
    """
    expected = expected.double() * len(drawn)
    counts = drawn.bincount(minlength=len(expected)).double()
    rare = expected < 10
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("g", [0.5, 1.0, 3.0, 10.0])
def test_the_drawn_tokens_follow_the_guided_distribution(g, space):
    torch.manual_seed(0)
    logits = torch.randn(2, 40) * torch.tensor([[1.0], [0.7]])
    pos, neg, coefficient = logits[:1], logits[1:], torch.tensor([g])
    expected = guide(pos, neg, coefficient, number(space)).exp()[0]
    drawn, logprobs = next_tokens(logits, settings(40_000, guidance=g, space=space))
    assert p_value(drawn, expected) > 1e-3
    assert torch.allclose(logprobs, expected.log()[drawn], atol=1e-5)
    if g == 1.0:
        return
    # Planted bugs: eq. 6 handed on as if its values were log-scores, or the distribution of the other space.
    raw = neg.softmax(-1) + g * (pos.softmax(-1) - neg.softmax(-1))
    other_space = guide(pos, neg, coefficient, number("prob")).exp()[0]
    wrong = raw.softmax(-1)[0] if space == "prob" else other_space
    assert p_value(drawn, wrong) < 1e-6


def test_temperature_and_truncation_act_on_the_guided_distribution():
    torch.manual_seed(0)
    logits = torch.randn(2, 30)
    guided_logs = guide(logits[:1], logits[1:], torch.tensor([2.0]), number("prob"))
    scores = truncate(guided_logs / 0.7, torch.tensor([8]), torch.tensor([0.8]))
    drawn, _ = next_tokens(logits, settings(20_000, guidance=2.0, temperature=0.7, top_k=8, top_p=0.8))
    assert p_value(drawn, scores.softmax(-1)[0]) > 1e-3
    assert set(drawn.tolist()) == set((scores[0] > -torch.inf).nonzero()[:, 0].tolist())


def test_truncation_by_hand():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def kept(k: int, p: float) -> list[bool]:
        return (truncate(scores, torch.tensor([k]), torch.tensor([p]))[0] > -torch.inf).tolist()

    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]  # 0.4 is not enough
    assert kept(0, 0.0) == [True, False, False, False]
    assert kept(3, 0.75) == [True, True, False, False]  # of the mass of three, 0.9: 0.7 is 0.78
    assert kept(0, 1.0) == [True] * 4
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept(0, 0.5) == [True, False, False, False]  # 0.5 is just enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combining_before_the_head_is_as_exact_as_after_it(dtype):
    """Both ways to log space against float64, with g up to 10.

    Neither error is more than a few times the rounding of the inputs, times g.
    """
    exact = random_model(hidden_size=64, num_hidden_layers=1).double()
    model = random_model(hidden_size=64, num_hidden_layers=1).to(dtype)
    exact.lm_head.weight.data.copy_(model.lm_head.weight)
    torch.manual_seed(0)
    pos = torch.randn(50, 64)
    pos, neg = pos.to(dtype), (pos + 0.3 * torch.randn(50, 64)).to(dtype)
    unit = torch.finfo(dtype).eps * exact.head(pos.double()).abs().max().item()
    for g in (1.0, 2.0, 3.0, 5.0, 10.0):
        each = torch.full((50,), g)
        wanted = guide(exact.head(pos.double()), exact.head(neg.double()), each, number("log", 50))
        after = guide(model.head(pos), model.head(neg), each, number("log", 50))
        before = model.head(combine(pos, neg, each)).float().log_softmax(-1)
        errors = [(found - wanted).abs().max().item() for found in (before, after)]
        assert max(errors) < 4 * (2 * g - 1) * unit, (g, errors)
