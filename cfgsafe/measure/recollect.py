"""Recollect and rank: draw several answers where an item was masked, and rank the values in them by how likely the model finds each.

Source: R.R. (Meng et al., arXiv 2502.12658): candidates come out of sampled answers by a detector, and are ranked by the loss of the
value alone, per token, in the place of the mask; calibrated by a reference model, by (loss - reference) / (reference + bias), of which
loss / (reference + bias) gives the same order.
Deviations: the source asks for the whole masked text to be repeated and filled in, and places a candidate in the whole text; here the
model goes on from the mask, in its own chat format, and the candidate is scored there, so that recollecting and ranking put one request.
The chat is the scrubbed conversation where it is known and masked within an answer; else the hint, answered by the baseline's context.
Sampling is at temperature 1, where the source takes 1.2 with top-k and top-p; the bias, which it sweeps from 0.1 to 4, is 1. The reference
model is not guided.

Run it: python eval.py extract --model cfgsafe/demo/leaky --base cfgsafe/demo/base --attack rr
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from cfgsafe.decode import check_request, generate
from cfgsafe.llama import Llama
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.pii.known import Known
from cfgsafe.pii.ner import Detector
from cfgsafe.subject import Subject, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

if TYPE_CHECKING:
    from cfgsafe.measure.extract import Options
    from cfgsafe.measure.targets import Target

BIAS = 1.0  # nats a token, added to the reference model's loss


@dataclass(frozen=True)
class Recollection:
    """The candidates for a target, the likeliest first."""

    ranked: list[str]


def recollect_and_rank(options: Options, targets: list[Target], detector: Detector) -> list[Recollection]:
    """Candidates for each target, ranked. Raises InputError, CheckpointError, ContextError."""
    known = Known.read(options.candidates) if options.candidates else Known()
    model, tokenizer = load(options)
    prompts = [recollection_prompt(target, tokenizer) for target in targets]
    drawn = sample(options, model, tokenizer, prompts, [target.place for target in targets])
    entities = iter(detector([text for texts in drawn for text in texts]))
    candidates = []
    for target, texts in zip(targets, drawn, strict=True):
        found = [entity.text for _ in texts for entity in next(entities)]
        candidates.append(
            list(
                dict.fromkeys(
                    found + [value for value, label in known.values.items() if label == target.label]
                )
            )
        )
    losses = mean_losses(options, model, tokenizer, prompts, candidates)
    if options.base:
        del model
        base = Subject(options.base, batch=options.batch, device=options.device, dtype=options.dtype)
        reference = mean_losses(base, *load(base), prompts, candidates)
        losses = [
            [loss / (other + BIAS) for loss, other in zip(*both, strict=True)]
            for both in zip(losses, reference, strict=True)
        ]
    return [Recollection(rank(*both)) for both in zip(candidates, losses, strict=True)]


def recollection_prompt(target: Target, tokenizer: Tokenizer) -> Messages:
    """The scrubbed conversation up to the mask; or the hint as the user's message, and the context as the beginning of the answer."""
    if target.chat:
        return target.chat
    context = target.context(tokenizer).rstrip()
    asked = [{"role": "user", "content": target.hint.strip()}]
    return [*asked, {"role": "assistant", "content": context}] if context else asked


def sample(
    options: Options, model: Llama, tokenizer: Tokenizer, prompts: list[Messages], places: list[str]
) -> list[list[str]]:
    """`options.samples` answers to each prompt at temperature 1, through the subject's guidance."""
    rng = random.Random(options.seed)
    requests = []
    for messages, place in zip(prompts, places, strict=True):
        request = request_for(
            options, tokenizer, messages, temperature=1.0, max_new_tokens=options.max_new_tokens
        )
        check_request(request, model, place)
        requests += [replace(request, seed=rng.getrandbits(32)) for _ in range(options.samples)]
    with tqdm(total=len(requests), desc="recollecting", leave=False) as bar:
        texts = [
            tokenizer.decode(c.tokens)
            for c in generate(model, requests, batch=options.batch, on_completion=lambda *_: bar.update())
        ]
    return [texts[at : at + options.samples] for at in range(0, len(texts), options.samples)]


def mean_losses(
    subject: Subject, model: Llama, tokenizer: Tokenizer, prompts: list[Messages], candidates: list[list[str]]
) -> list[list[float]]:
    """Negative log-likelihood per token, in nats, of each candidate where its prompt ends, under the subject's guidance."""
    requests = [
        request_for(subject, tokenizer, messages)
        for messages, values in zip(prompts, candidates, strict=True)
        for _ in values
    ]
    blank = [" " if messages[-1]["role"] == "assistant" else "" for messages in prompts]
    values = [
        tokenizer.encode(before + value)
        for before, some in zip(blank, candidates, strict=True)
        for value in some
    ]
    logprobs = iter(continuation_logprobs(model, requests, values))
    return [[-next(logprobs).mean().item() for _ in some] for some in candidates]


def rank(candidates: list[str], losses: list[float]) -> list[str]:
    """Candidates by rising loss; spellings that differ in case count once."""
    best: dict[str, str] = {}
    for _, candidate in sorted(zip(losses, candidates, strict=True)):
        best.setdefault(candidate.lower(), candidate)
    return list(best.values())
