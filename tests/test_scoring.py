"""Scores under guidance equal the log-probabilities of decoding; answers survive a crash."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_model

from cfgsafe import subject
from cfgsafe.decode import Request, generate
from cfgsafe.files import AnswerLog, read_answers
from cfgsafe.guidance import SPACES
from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.measure import canaries, perplexity, recollect, scoring, utility
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.subject import Answer, Subject, answers


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_scores_are_what_decoding_computed(space, alpha):
    model = random_model()
    requests = [
        Request([5, 6, 7], [8, 9], guidance=3.0, space=space, alpha=alpha, max_new_tokens=9),
        Request([5], max_new_tokens=4),
        Request(
            [9] * 20, [3], guidance=0.5, space=space, alpha=alpha, temperature=1.0, seed=3, max_new_tokens=12
        ),
    ]
    completions = generate(model, requests)
    scored = continuation_logprobs(model, requests, [c.tokens for c in completions], batch=2)
    for completion, logprobs in zip(completions, scored, strict=True):
        assert torch.allclose(logprobs, torch.tensor(completion.logprobs), atol=1e-4)


CHAT = [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "one"}] * 3


@pytest.mark.parametrize(
    "score",
    [
        lambda who, model, tokenizer: canaries.likelihoods(who, model, tokenizer, [[(CHAT[:1], " one")] * 3]),
        lambda *of: perplexity.dialogue_logprobs(*of, [("d:1", CHAT)]),
        lambda *of: utility.option_logprobs(*of, [("q:1", {"options": ["a", "b", "c"]})], [CHAT[:1]]),
        lambda *of: recollect.mean_losses(*of, [CHAT[:1]], [["Ann", "Bo", "Cy"]]),
    ],
    ids=["canaries", "perplexity", "utility", "recollect"],
)
def test_batch_limits_what_is_scored_together(score, model, tokenizer, monkeypatch):
    sizes = []
    whole = scoring._score_batch

    def spy(model, requests, *more):
        sizes.append(len(requests))
        return whole(model, requests, *more)

    monkeypatch.setattr(scoring, "_score_batch", spy)
    for batch, expected in ((2, [2, 1]), (128, [3])):
        score(Subject("", batch=batch), model, tokenizer)
        assert sizes == expected
        sizes.clear()


def test_a_forward_of_scoring_holds_no_more_tokens_than_one_of_prefill(model, monkeypatch):
    """Guided pairs of 4 + 2 tokens: two pairs fill 24 slots; a longer one goes alone, and first."""
    monkeypatch.setattr(scoring, "FORWARD_TOKENS", 24)
    pair, long = Request([5, 6, 7, 8], [9], guidance=2.0), Request([5] * 30)
    requests = [pair, pair, pair, long, long]
    whole, sizes = scoring._score_batch, []

    def spy(model, some, *more):
        sizes.append(len(some))
        return whole(model, some, *more)

    expected = continuation_logprobs(model, requests, [[3, 4]] * 5, batch=1)
    monkeypatch.setattr(scoring, "_score_batch", spy)
    scored = continuation_logprobs(model, requests, [[3, 4]] * 5, batch=128)
    assert sizes == [1, 1, 2, 1]
    for one, other in zip(scored, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_guidance_changes_the_score():
    model = random_model()
    plain, guided = continuation_logprobs(
        model, [Request([5, 6], [7]), Request([5, 6], [7], guidance=3.0)], [[9, 10], [9, 10]]
    )
    assert not torch.allclose(plain, guided)


def test_a_request_without_adapter_is_scored_without_one_on_the_head():
    model, request = random_model(tie_word_embeddings=False), Request([5, 6], adapter=None)
    bare = continuation_logprobs(model, [request], [[9, 10]])
    for parameter in attach(model, LoRAConfig(targets=("lm_head",))):
        torch.nn.init.normal_(parameter)
    assert torch.equal(continuation_logprobs(model, [request], [[9, 10]])[0], bare[0])


def test_each_request_is_scored_with_its_own_adapter():
    model = random_model()
    for number, name in enumerate(("default", "other")):
        torch.manual_seed(number)
        for parameter in attach(model, LoRAConfig(rank=4), name):
            torch.nn.init.normal_(parameter, std=0.2)
    adapters = ("other", None, "default")
    requests = [Request([5, 6], [7, 8], guidance=2.0, adapter=name, max_new_tokens=3) for name in adapters]
    completions = generate(model, requests)
    scored = continuation_logprobs(model, requests, [completion.tokens for completion in completions])
    for completion, logprobs in zip(completions, scored, strict=True):
        assert torch.allclose(logprobs, torch.tensor(completion.logprobs), atol=1e-4)


def test_an_answer_is_in_the_file_as_soon_as_it_is_kept(tmp_path):
    path = tmp_path / "kept.jsonl"
    with AnswerLog(path) as log:
        log.keep("key", Answer("answer", "length"))
        assert read_answers(path) == {"key": Answer("answer", "length")}


def test_an_answer_says_whether_the_limit_cut_it_off_also_when_it_was_kept(tmp_path, checkpoint):
    who = Subject(checkpoint)
    chats = [[{"role": "user", "content": "Say 1"}]]
    for _ in range(2):  # asked, and then read from the file
        (answer,) = answers(who, *subject.load(who), chats, "test", 5, kept=tmp_path / "kept.jsonl")
        assert answer.finish_reason == "length" and answer.cut
    assert not Answer("I do.", "stop").cut and not Answer("I do.").cut


def test_answers_that_are_written_are_not_asked_for_again(tmp_path, checkpoint, monkeypatch):
    who = Subject(checkpoint, guidance=2.0)
    model, tokenizer = subject.load(who)
    chats = [[{"role": "user", "content": f"Say {n}"}] for n in range(6)]
    whole = answers(who, model, tokenizer, chats, "test", 5, kept=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert len(lines) == 6
    killed_in_the_fourth = "\n".join(lines[:3]) + "\n" + lines[3][:20]
    (tmp_path / "cut.jsonl").write_text(killed_in_the_fourth)
    asked = []
    real = subject.generate

    def listening(model, requests, **more):
        asked.extend(requests)
        return real(model, requests, **more)

    monkeypatch.setattr(subject, "generate", listening)
    assert answers(who, model, tokenizer, chats, "test", 5, kept=tmp_path / "cut.jsonl") == whole
    assert len(asked) == 3
    assert {json.loads(line)["key"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()} == {
        json.loads(line)["key"] for line in lines
    }
    asked.clear()
    answers(
        Subject(checkpoint, guidance=3.0), model, tokenizer, chats, "test", 5, kept=tmp_path / "cut.jsonl"
    )
    assert len(asked) == 6  # another guidance is another question
    asked.clear()
    other = replace(who, dtype="bfloat16")
    answers(other, model, tokenizer, chats[:1], "test", 5, kept=tmp_path / "cut.jsonl")
    assert len(asked) == 1  # and so is another data type; for other weights see test_identity.py


def test_texts_of_similar_length_are_computed_together(model, monkeypatch):
    """And each gets its own numbers, in the order in which it was given."""
    widths = []
    whole = scoring._score_batch

    def spy(model, requests, continuations, look):
        widths.append([len(r.prompt) + len(c) for r, c in zip(requests, continuations, strict=True)])
        return whole(model, requests, continuations, look)

    requests = [Request([5] * length) for length in (3, 20, 4, 21, 5)]
    texts = [[7], [8, 9], [10], [11], [12, 13]]
    alone = [continuation_logprobs(model, [r], [t])[0] for r, t in zip(requests, texts, strict=True)]
    monkeypatch.setattr(scoring, "_score_batch", spy)
    together = continuation_logprobs(model, requests, texts, batch=2)
    assert widths == [[22, 22], [7, 5], [4]]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
