"""How likely a text is under a subject, with the guidance that its answers have.

Perplexity, option scores, ranked candidates and the measures of memory all come from here. The
formulas: cfgsafe/rescore.py; of the standardised log-probability, Min-K%++ (Zhang et al., arXiv
2404.02936).

Run it: python eval.py utility --help
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.errors import ContextError, InputError
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, share_interval
from cfgsafe.prefill import PREFILL_TOKENS
from cfgsafe.progress import progress
from cfgsafe.request import Request, check_request
from cfgsafe.rescore import continuation_states, guided_logprobs, side_logits

LEAST = math.log(1e-9)  # where one impossible token would make a mean infinite, none counts as less likely
TOKENS_AT_ONCE = 512  # rows of logits that exist at a time
FORWARD_TOKENS = PREFILL_TOKENS  # most tokens of one forward, padding included
LEAST_VARIANCE = 1e-6  # of the log-probability of a token that is all but certain

# Turns guided log-probabilities (t, V) and the tokens (t, 1) into numbers about each token (t, K), of which
# the first is its log-probability.
Look = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TokenScores:
    """What the guided distribution says about each token of a text; all are (T,), on the CPU."""

    logprobs: Tensor  # float32, nats; -inf where guidance makes the token impossible
    likeliest: Tensor  # bool: it is the most likely one, so that greedy decoding would go on with it
    standardised: Tensor  # float32: (log p - mean) / deviation, both over the distribution


@torch.inference_mode()
def continuation_logprobs(
    model: Llama,
    requests: list[Request],
    continuations: list[list[int]],
    *,
    batch: int = 16,
    desc: str | None = None,
) -> list[Tensor]:
    """Log-probability of each token of continuations[i] after the prompt of requests[i], (T,) float32.

    The request's guidance, space and alpha apply; its temperature, top-k and top-p do not. Prompt
    and continuation must fit in the context. At most `batch` requests are computed together, and no
    more than fit into FORWARD_TOKENS. With `desc`, progress is shown under that name. Raises
    InputError where the model's numbers are not finite.
    """
    return [columns[:, 0] for columns in _in_batches(model, requests, continuations, batch, desc, at_target)]


@torch.inference_mode()
def continuation_scores(
    model: Llama,
    requests: list[Request],
    continuations: list[list[int]],
    *,
    batch: int = 16,
    desc: str | None = None,
) -> list[TokenScores]:
    """As `continuation_logprobs`, with all that `TokenScores` tells."""
    scores = []
    for columns in _in_batches(model, requests, continuations, batch, desc, at_target_and_around):
        logprobs, likeliest, standardised = columns.unbind(-1)
        scores.append(TokenScores(logprobs, likeliest > 0, standardised))
    return scores


def at_target(logprobs: Tensor, targets: Tensor) -> Tensor:
    """A `Look`: the log-probability alone, (t, 1)."""
    return logprobs.gather(-1, targets)


def at_target_and_around(logprobs: Tensor, targets: Tensor) -> Tensor:
    """A `Look`: log-probability, whether it is the highest, and the standardised one, (t, 3).

    Ties go to the lowest token id, as in decoding. No token counts as less likely than LEAST.
    """
    found = logprobs.gather(-1, targets)  # (t, 1)
    likeliest = logprobs.argmax(-1, keepdim=True) == targets
    chances, bounded = logprobs.exp(), logprobs.clamp(min=LEAST)  # (t, V)
    mean = (chances * bounded).sum(-1, keepdim=True)
    variance = (chances * (bounded - mean).square()).sum(-1, keepdim=True)
    standardised = (found.clamp(min=LEAST) - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()
    return torch.cat((found, likeliest.to(found), standardised), -1)


def _in_batches(
    model: Llama,
    requests: list[Request],
    continuations: list[list[int]],
    batch: int,
    desc: str | None,
    look: Look,
) -> list[Tensor]:
    """What `look` tells of each token of each continuation, (T, K) float32.

    Texts of similar length are computed together: little of a batch is padding.
    """
    lengths = []
    for request, continuation in zip(requests, continuations, strict=True):
        lengths.append(max(map(len, request.rows)) + len(continuation))
    order = sorted(range(len(requests)), key=lengths.__getitem__, reverse=True)
    results: dict[int, Tensor] = {}
    with progress(total=len(order), desc=desc, disable=desc is None) as bar:
        while len(results) < len(order):
            some = order[len(results) : len(results) + batch]
            rows = sum(len(requests[number].rows) for number in some)
            while len(some) > 1 and rows * lengths[some[0]] > FORWARD_TOKENS:
                rows -= len(requests[some.pop()].rows)
            texts = [continuations[number] for number in some]
            scores = _score_batch(model, [requests[number] for number in some], texts, look)
            results |= zip(some, scores, strict=True)
            bar.update(len(some))
    return [results[number] for number in range(len(order))]


def impossible(parts: list[Tensor]) -> Estimate | None:
    """Percentage of tokens that guidance makes impossible. The tokens of a part are a cluster."""
    counts = [(part == -math.inf).sum().item() for part in parts]
    return share_interval(counts, [len(part) for part in parts])


def check_fits(model: Llama, request: Request, continuation: list[int], place: str) -> None:
    """Raise InputError or ContextError, naming `place`, if the text cannot be scored after the prompt."""
    check_request(request, model, place)
    length = max(map(len, request.rows)) + len(continuation)
    limit = model.config.max_position_embeddings
    if length > limit:
        raise ContextError(
            f"{place}: prompt and text have {length} tokens, the model's context is {limit}; shorten them"
        )


def _score_batch(
    model: Llama, requests: list[Request], continuations: list[list[int]], look: Look
) -> list[Tensor]:
    """`_in_batches` in one forward."""
    prompts, given, adapters = [], [], []  # of each row
    for request, continuation in zip(requests, continuations, strict=True):
        for prompt in request.rows:
            prompts.append(prompt)
            given.append(continuation)
            adapters.append(request.adapter)
    states = iter(continuation_states(model, prompts, given, adapters))
    scores = []
    for request, continuation in zip(requests, continuations, strict=True):
        sides = [next(states) for _ in request.rows]
        scores.append(_score(model, request, sides, continuation, look))
    return scores


def _score(
    model: Llama, request: Request, sides: list[Tensor], continuation: list[int], look: Look
) -> Tensor:
    """What `look` tells of each token, (T, K), from the hidden states (T, C) of each side."""
    targets = torch.tensor(continuation, device=model.device)[:, None]  # (T, 1)
    parts = []
    for start in range(0, len(continuation), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        logits = side_logits(model, request, [states[part] for states in sides])
        logprobs = guided_logprobs(request, logits[0], logits[1] if request.guided else None)
        parts.append(look(logprobs, targets[part]))
    scores = torch.cat(parts).cpu() if parts else torch.zeros(0, 3)
    if scores.isnan().any():  # as `guide` gives it where a logit is not finite
        raise InputError(
            "the model gives numbers that are not finite, so that no likelihood can be told; look at its "
            "weights and its adapter, or take --dtype float32"
        )
    return scores
