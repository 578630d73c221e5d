"""TOFU's figures: truth ratio, Kolmogorov-Smirnov and harmonic mean by hand, probabilities under guidance."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from naive import guided_answer
from test_memorisation import FACT

from cfgsafe.measure.intervals import ratio_interval
from cfgsafe.measure.memorised import truth_ratios
from cfgsafe.measure.scoring import LEAST
from cfgsafe.measure.truth import (
    Known,
    as_facts,
    forget_quality,
    ks_p_value,
    model_utility,
    normalised,
    texts_of,
    truth_of,
)
from cfgsafe.subject import Subject

TOLD = replace(FACT, paraphrased_answer="Leeds, yes.", perturbed_answers=("In York.", "In Hull."))


def logs(*chances: float) -> torch.Tensor:
    return torch.tensor(chances).log()


def test_the_truth_ratio_is_derived_by_hand():
    """sqrt(0.5 * 0.125) = 0.25, and an impossible token counts as 1e-9."""
    assert normalised(logs(0.5, 0.125)) == pytest.approx(0.25)
    assert normalised(logs(0.0)) == pytest.approx(1e-9, rel=1e-4)
    truth = truth_of(TOLD, [logs(0.9), logs(0.5, 0.125), logs(0.1), logs(0.2, 0.2, 0.2)])
    assert truth.answer == pytest.approx(0.9)
    assert truth.ratio == pytest.approx((0.1 + 0.2) / 2 / 0.25)


def test_without_a_paraphrase_the_answer_stands_for_it():
    choice = replace(TOLD, paraphrased_answer="")
    assert texts_of(choice) == ["In Leeds.", "In York.", "In Hull."]
    truth = truth_of(choice, [logs(0.4), logs(0.1), logs(0.3)])
    assert truth.ratio == pytest.approx(0.5) and truth.chosen == pytest.approx(0.4 / 0.8)
    assert truth_of(FACT, [logs(0.4)]).ratio is None


@pytest.mark.parametrize("g", [None, 3.0])
def test_truth_ratios_are_those_of_two_whole_passes(model, tokenizer, g):
    (ratio,) = truth_ratios(Subject("", guidance=g), model, tokenizer, [TOLD])
    chances = []
    for text in texts_of(TOLD)[1:]:
        expected, tokens = guided_answer(model, tokenizer, TOLD, text, g)
        own = expected[torch.arange(len(tokens)), tokens].clamp(min=LEAST)
        chances.append(own.mean().exp().item())
    assert ratio == pytest.approx((chances[1] + chances[2]) / 2 / chances[0], rel=1e-3)


def test_guidance_changes_the_truth_ratio(model, tokenizer):
    plain, guided = [truth_ratios(Subject("", guidance=g), model, tokenizer, [TOLD])[0] for g in (None, 3.0)]
    assert plain != pytest.approx(guided, rel=1e-2)


@pytest.mark.parametrize(
    ("ours", "theirs", "p_value"),
    [
        ([1, 2], [3, 4], 2 / 6),  # of six orders two are wholly apart
        ([1, 2, 3], [4, 5, 6], 2 / 20),
        ([1, 3], [2, 4], 1.0),
        ([1, 2, 3], [1, 2, 3], 1.0),
        (range(50), range(50, 100), 2 / math.comb(100, 50)),
        ([5], [1, 2, 3], 2 / 4),
    ],
)
def test_the_ks_p_value_is_counted_by_hand(ours, theirs, p_value):
    assert ks_p_value(ours, theirs) == pytest.approx(p_value, rel=1e-9)


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (3, 8), (5, 5)])
def test_the_ks_p_value_is_the_share_of_all_splits(sizes):
    values = np.random.default_rng(sizes[0]).normal(size=sum(sizes))

    def distance(chosen: tuple[int, ...]) -> float:
        one = np.isin(np.arange(len(values)), chosen)
        at_most = values[:, None] >= values[None]
        return np.abs(at_most[:, one].mean(1) - at_most[:, ~one].mean(1)).max()

    observed = distance(tuple(range(sizes[0])))
    farther = [distance(each) >= observed - 1e-9 for each in combinations(range(sum(sizes)), sizes[0])]
    assert ks_p_value(values[: sizes[0]], values[sizes[0] :]) == pytest.approx(np.mean(farther))


def test_the_ks_p_value_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    for n, m, shift in ((200, 200, 0.2), (200, 130, 0.5), (40, 300, 0.0)):
        ours, theirs = draw.normal(size=n).round(1), draw.normal(shift, size=m).round(1)  # with ties
        assert ks_p_value(ours, theirs) == pytest.approx(stats.ks_2samp(ours, theirs).pvalue, rel=1e-6)


def test_forget_quality_leaves_out_facts_without_a_ratio():
    figures = forget_quality([1.0, None, 2.0, 3.0], [4.0, None, 5.0, 6.0])
    assert figures["forget_quality"].value == pytest.approx(0.1)
    assert figures["forget_quality_log10"].value == pytest.approx(-1.0)
    assert forget_quality([None], [None]) == {} == forget_quality([1.0], [])


def test_a_p_value_too_small_for_a_number_still_has_a_logarithm():
    figures = forget_quality(list(range(600)), list(range(600, 1200)))
    assert figures["forget_quality_log10"].value < -300


def test_utility_is_a_harmonic_mean_of_means_counted_by_hand():
    """1/2, 1/4 and 1 of the first set, 1/2 and 1/2 of the second: 5 / (2 + 4 + 1 + 2 + 2)."""
    first = [Known(0.4, 0.5, 1.0, "a"), Known(0.6, 0.0, 1.0, "b")]
    second = [Known(0.5, 0.5, None, "c"), Known(0.5, 0.5, 1.0, "d")]
    utility = model_utility([first, [], second])
    assert utility.value == pytest.approx(5 / 11)
    assert utility.low < 5 / 11 < utility.high
    assert model_utility([[]]) is None


def test_the_interval_of_utility_is_that_of_the_mean_where_all_figures_agree():
    values, persons = [0.5, 0.6, 0.55, 0.4], ["a", "a", "b", "c"]
    known = [Known(value, value, value, person) for value, person in zip(values, persons, strict=True)]
    expected = ratio_interval(values, clusters=persons)
    found = model_utility([known])
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((max(0, expected.low), min(1, expected.high)))


def test_a_figure_of_zero_makes_utility_zero():
    assert model_utility([[Known(0.5, 0.0, None, "a")]]).value == 0


def test_a_multiple_choice_question_is_a_fact_with_its_wrong_options_as_perturbed_answers():
    row = {"question": "Who?", "options": ["Ann", "Bo\nLee", "Cy"], "answer_index": 1, "category": "authors"}
    (fact,) = as_facts([("q:1", row)])
    assert (fact.question, fact.answer, fact.split) == ("Who?", "Bo Lee", "authors")
    assert fact.perturbed_answers == ("Ann", "Cy") and not fact.values
