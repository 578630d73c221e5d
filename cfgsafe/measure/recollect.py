"""Recollect and rank: draw answers where an item was masked, and rank the values in them.

Source: R.R. (Meng et al., arXiv 2502.12658): a detector takes candidates from sampled answers, of
every label, also of those that do not count as leaks, such as dates. They are ranked by the loss of
the value alone, per token, at the place of the mask. A reference model calibrates the ranking:
(loss - reference) / (reference + bias). Here loss / (reference + bias) gives the same order.
Deviations: the source has the whole masked text repeated and filled in, and scores a candidate
within the whole text. Here the model goes on from the mask, in its own chat format, and the
candidate is scored there, so that both steps use the same prompt: the scrubbed conversation, if that
is known and the mask is in an answer; else the hint, and the baseline's context as its answer so far.
Sampling is at temperature 1, where the source takes 1.2 with top-k and top-p. The bias is 1, where
the source tries 0.1 to 4. The reference model is not guided.

Run it: python eval.py extract --model cfgsafe/demo/leaky --base cfgsafe/demo/base --attack rr
"""

import random
from dataclasses import dataclass, replace
from itertools import chain, islice

from cfgsafe.llama import Llama
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.measure.targets import Target
from cfgsafe.pii.known import Known
from cfgsafe.pii.ner import Detector
from cfgsafe.subject import Answer, Subject, checked_request, complete, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer

BIAS = 1.0  # nats a token, added to the reference model's loss


@dataclass(frozen=True)
class Settings:
    """How to recollect and rank; each is an option of `eval.py extract --attack rr`."""

    samples: int  # answers drawn for each target
    max_new_tokens: int  # longest answer
    seed: int
    candidates: str | None = None  # JSONL of known values to rank as well
    base: str | None = None  # checkpoint of the reference model


@dataclass(frozen=True)
class Recollection:
    """The candidates for a target, the most likely first; `answered`: any of the drawn answers came."""

    ranked: list[str]
    answered: bool = True


def recollect_and_rank(
    subject: Subject, settings: Settings, targets: list[Target], detector: Detector
) -> list[Recollection]:
    """Ranked candidates for each target. Raises InputError, CheckpointError, ContextError."""
    known = Known.read(settings.candidates) if settings.candidates else Known()
    model, tokenizer = load(subject)
    prompts = [recollection_prompt(target, tokenizer) for target in targets]
    drawn = sample(subject, settings, model, tokenizer, targets)
    candidates = collect(targets, drawn, detector, known)
    losses = mean_losses(subject, model, tokenizer, prompts, candidates)
    if settings.base:
        del model
        base = Subject(settings.base, batch=subject.batch, device=subject.device, dtype=subject.dtype)
        reference = mean_losses(base, *load(base), prompts, candidates)
        losses = [calibrate(*both) for both in zip(losses, reference, strict=True)]
    found = []
    for values, of_values, texts in zip(candidates, losses, drawn, strict=True):
        found.append(Recollection(rank(values, of_values), bool(texts)))
    return found


def recollection_prompt(target: Target, tokenizer: Tokenizer) -> Messages:
    """The conversation up to the mask; if unknown, the hint, and the context as the answer's beginning."""
    if target.chat:
        return target.chat
    context = target.context(tokenizer).rstrip()
    asked = [{"role": "user", "content": target.hint.strip()}]
    return [*asked, {"role": "assistant", "content": context}] if context else asked


def sample(
    subject: Subject, settings: Settings, model: Llama, tokenizer: Tokenizer, targets: list[Target]
) -> list[list[str]]:
    """Answers to each target's prompt, drawn at temperature 1 under the subject's guidance.

    Those that did not come (`Answer.broken`) are left out. Raises InputError or ContextError naming the
    target's place.
    """
    rng = random.Random(settings.seed)
    longest = settings.max_new_tokens
    requests = []
    for target in targets:
        messages = recollection_prompt(target, tokenizer)
        sampling = {"temperature": 1.0, "max_new_tokens": longest}
        request = checked_request(subject, model, tokenizer, messages, target.place, **sampling)
        requests += [replace(request, seed=rng.getrandbits(32)) for _ in range(settings.samples)]
    completions = complete(model, requests, subject.batch, "recollecting")
    drawn = iter([Answer(tokenizer.decode(done.tokens), done.finish_reason) for done in completions])
    found = []
    for _ in targets:
        found.append([answer.text for answer in islice(drawn, settings.samples) if not answer.broken])
    return found


def collect(
    targets: list[Target], drawn: list[list[str]], detector: Detector, known: Known
) -> list[list[str]]:
    """Candidates of each target: what the detector finds in its answers, then known values of its label."""
    finds = iter(detector(list(chain.from_iterable(drawn))))
    candidates = []
    for target, texts in zip(targets, drawn, strict=True):
        entities = chain.from_iterable(islice(finds, len(texts)))
        values = [entity.text for entity in entities]
        values += [value for value, label in known.values.items() if label == target.label]
        candidates.append(list(dict.fromkeys(values)))  # each once
    return candidates


def mean_losses(
    subject: Subject, model: Llama, tokenizer: Tokenizer, prompts: list[Messages], candidates: list[list[str]]
) -> list[list[float]]:
    """Guided negative log-likelihood, nats per token, of each candidate after its prompt."""
    requests, texts = [], []
    for messages, values in zip(prompts, candidates, strict=True):
        request = request_for(subject, tokenizer, messages)
        blank = " " if messages[-1]["role"] == "assistant" else ""
        for value in values:
            requests.append(request)
            texts.append(tokenizer.encode(blank + value))
    logprobs = continuation_logprobs(model, requests, texts, batch=subject.batch)
    losses = iter([-part.mean().item() for part in logprobs])
    return [list(islice(losses, len(values))) for values in candidates]


def calibrate(losses: list[float], reference: list[float]) -> list[float]:
    """loss / (reference + BIAS) of each candidate."""
    return [loss / (other + BIAS) for loss, other in zip(losses, reference, strict=True)]


def rank(candidates: list[str], losses: list[float]) -> list[str]:
    """Candidates by rising loss; of those that differ in case only, the first."""
    best: dict[str, str] = {}
    for _, candidate in sorted(zip(losses, candidates, strict=True)):
        best.setdefault(candidate.lower(), candidate)
    return list(best.values())
