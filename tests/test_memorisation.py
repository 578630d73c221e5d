"""Memorisation: hand-counted cases, and the guided distribution's own most likely tokens."""

import pytest
import torch
from naive import guided_answer

from cfgsafe.decode import Request, generate
from cfgsafe.errors import ContextError
from cfgsafe.measure.memorisation import (
    answer_scores,
    exact_memorisation,
    extraction_strength,
    longest_part,
    rouge_l,
)
from cfgsafe.measure.scoring import continuation_scores
from cfgsafe.pii.facts import Fact
from cfgsafe.subject import Subject

FACT = Fact(
    [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Where?"}],
    "In Leeds.",
    (),
    "",
    "",
    "f:1",
)


@pytest.mark.parametrize(
    ("right", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),  # k = 1
        ([1, 0, 1, 1], 0.75, 0.5),  # k = 2: what comes before the last wrong one does not count
        ([1, 1, 1, 0], 0.75, 0.0),  # k = T
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_memorisation_is_counted_by_hand(right, exact, strength):
    likeliest = torch.tensor(right, dtype=torch.bool)
    assert exact_memorisation(likeliest) == exact
    assert extraction_strength(likeliest) == strength


def test_a_guided_answer_is_wholly_memorised_under_its_own_guidance_alone(model):
    guided = Request([5, 6, 7], [8, 9], guidance=-2.0, max_new_tokens=8)  # away from the first prompt
    tokens = generate(model, [guided])[0].tokens
    changed = [*tokens[:-1], (tokens[-1] + 1) % 2048]
    plain = Request([5, 6, 7])
    requests, texts = [guided, guided, plain], [tokens, changed, tokens]
    own, spoilt, bare = [each.likeliest for each in continuation_scores(model, requests, texts)]
    assert exact_memorisation(own) == extraction_strength(own) == 1.0
    assert exact_memorisation(spoilt) == 7 / 8 and extraction_strength(spoilt) == 0.0
    assert exact_memorisation(bare) < 1


@pytest.mark.parametrize("g", [None, 1.0, 3.0])
def test_scores_of_an_answer_are_those_of_two_whole_passes(model, tokenizer, g):
    (scores,) = answer_scores(Subject("", guidance=g), model, tokenizer, [FACT], [" In Leeds. "])
    expected, tokens = guided_answer(model, tokenizer, FACT, "In Leeds.", g)
    rows = torch.arange(len(tokens))
    assert torch.allclose(scores.logprobs.exp(), expected.exp()[rows, tokens], atol=1e-5)
    assert torch.equal(scores.likeliest, expected.argmax(-1) == torch.tensor(tokens))


def test_guidance_changes_what_is_scored(model, tokenizer):
    plain, guided = [
        answer_scores(Subject("", guidance=g), model, tokenizer, [FACT], ["In Leeds."])[0]
        for g in (None, 3.0)
    ]
    assert not torch.allclose(plain.logprobs, guided.logprobs)


def test_an_answer_that_does_not_fit_is_named(model, tokenizer):
    with pytest.raises(ContextError, match="f:1: prompt and text have"):
        answer_scores(Subject(""), model, tokenizer, [FACT], ["Leeds " * 600])


@pytest.mark.parametrize(
    ("answer", "reference", "recall"),
    [
        ("She was born in May, in Leeds.", "Born in Leeds", 1.0),
        ("in leeds, born", "Born in Leeds", 2 / 3),  # the order counts
        ("born", "Born, born!", 0.5),  # each word once
        ("Zoë Öz", "Zoë B. Öz", 2 / 3),
        ("", "Leeds", 0.0),
        ("Leeds", "...", 0.0),
    ],
)
def test_rouge_is_counted_by_hand(answer, reference, recall):
    assert rouge_l(answer, reference) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("answer", "value", "share"),
    [("call 0123-9", "0123-45", 5 / 7), ("ANN LEE", "Ann Lee", 1.0), ("xyz", "ann", 0.0), ("", "ann", 0.0)],
)
def test_the_longest_part_is_counted_by_hand(answer, value, share):
    assert longest_part(answer, value) == pytest.approx(share)
