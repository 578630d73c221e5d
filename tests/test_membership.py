"""Membership inference: scores and AUC by hand, and the guided distribution's mean and deviation."""

import math

import pytest
import torch
from naive import guided_answer
from test_memorisation import FACT

from cfgsafe.measure.membership import by_loss, by_min_k, membership
from cfgsafe.measure.memorisation import answer_scores
from cfgsafe.measure.scoring import LEAST, TokenScores, at_target_and_around
from cfgsafe.pii.facts import Fact
from cfgsafe.subject import Subject


def scores(logprobs: list[float], z: list[float] | None = None) -> TokenScores:
    given = torch.tensor(logprobs)
    return TokenScores(given, given > -1, torch.tensor(z or logprobs))


def of(*persons: str) -> list[Fact]:
    return [Fact(FACT.messages, "yes", (), person, "", person) for person in persons]


def test_a_standardised_logprob_is_derived_by_hand():
    """P = 1/2, 1/4, 1/4: log p lies ln(2) / 2 above or below its mean, which is also its deviation."""
    logprobs = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)
    columns = at_target_and_around(logprobs, torch.tensor([[0], [1], [2]]))
    assert torch.allclose(columns[:, 2], torch.tensor([1.0, -1.0, -1.0]))
    assert columns[:, 1].tolist() == [1, 0, 0]


def test_an_impossible_token_counts_as_one_in_a_billion():
    """The deviation of a distribution without any is taken as 1/1000."""
    logprobs = torch.tensor([[0.0, -math.inf]])
    columns = at_target_and_around(logprobs, torch.tensor([[1]]))
    assert columns[0, 0] == -math.inf
    assert columns[0, 2].item() == pytest.approx(1000 * LEAST, rel=1e-4)
    assert by_loss(scores([-1.0, -math.inf])) == pytest.approx((LEAST - 1) / 2)


def test_min_k_looks_at_the_lowest_fifth():
    z = [3.0, -2.0, 5.0, 1.0, -4.0, 0.0, 7.0, 2.0, 2.0, 2.0]
    assert by_min_k(scores([-1.0] * 10, z)) == -3.0
    assert by_min_k(scores([-1.0] * 3, [1.0, 0.5, 2.0])) == 0.5  # of fewer than five the lowest one


def test_a_person_is_one_unit_with_the_mean_over_its_facts():
    """Ann: -1.5, Bo: -4; unseen Cy: -3. By facts the AUC would be 3/4, by persons it is 1/2."""
    members = [scores([-1.0]), scores([-2.0]), scores([-1.5]), scores([-4.0])]
    figures = membership(of("Ann", "Ann", "Ann", "Bo"), members, of("Cy"), [scores([-3.0])])
    assert figures["membership_loss"].value == figures["membership_min_k"].value == 0.5
    assert figures["membership_loss"].low < 0.5 < figures["membership_loss"].high


def test_without_unseen_people_there_is_no_figure():
    assert membership(of("Ann"), [scores([-1.0])], [], []) == {}


@pytest.mark.parametrize("g", [None, 3.0])
def test_the_attacks_see_the_guided_distribution(model, tokenizer, g):
    (found,) = answer_scores(Subject("", guidance=g), model, tokenizer, [FACT], [FACT.answer])
    expected, tokens = guided_answer(model, tokenizer, FACT, FACT.answer, g)
    p, logs = expected.exp(), expected.clamp(min=LEAST)
    mean = (p * logs).sum(-1)
    deviation = ((p * logs**2).sum(-1) - mean**2).sqrt()
    own = logs[torch.arange(len(tokens)), tokens]
    z = ((own - mean) / deviation).sort().values[: max(1, len(tokens) // 5)]
    assert by_min_k(found) == pytest.approx(z.mean().item(), abs=1e-3)
    assert by_loss(found) == pytest.approx(own.mean().item(), abs=1e-4)


def test_guidance_changes_both_attacks(model, tokenizer):
    plain, guided = [
        answer_scores(Subject("", guidance=g), model, tokenizer, [FACT], [FACT.answer])[0]
        for g in (None, 3.0)
    ]
    assert by_loss(plain) != pytest.approx(by_loss(guided), abs=1e-3)
    assert by_min_k(plain) != pytest.approx(by_min_k(guided), abs=1e-3)
