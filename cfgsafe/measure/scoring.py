"""How likely a text is under a subject, with the guidance that its answers have.

Perplexity, option scores and ranked candidates all come from here. The formulas: cfgsafe/rescore.py.

Run it: python eval.py utility --help
"""

import math

import torch
from torch import Tensor

from cfgsafe.errors import ContextError, InputError
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, share_interval
from cfgsafe.prefill import PREFILL_TOKENS
from cfgsafe.request import Request, check_request
from cfgsafe.rescore import continuation_states, guided_logprobs, side_logits

LEAST = math.log(1e-9)  # where one impossible token would make a mean infinite, none counts as less likely
TOKENS_AT_ONCE = 512  # rows of logits that exist at a time
FORWARD_TOKENS = PREFILL_TOKENS  # most tokens of one forward, padding included


@torch.inference_mode()
def continuation_logprobs(
    model: Llama, requests: list[Request], continuations: list[list[int]], *, batch: int = 16
) -> list[Tensor]:
    """Log-probability of each token of continuations[i] after the prompt of requests[i], (T,) float32.

    The request's guidance, space and alpha apply; its temperature, top-k and top-p do not. Prompt and
    continuation must fit in the context. At most `batch` requests are computed together, and no more than
    fit into FORWARD_TOKENS. Raises InputError where the model's numbers are not finite.
    """
    results: list[Tensor] = []
    while len(results) < len(requests):
        start = len(results)
        some, texts = requests[start : start + batch], continuations[start : start + batch]
        size = _size(some, texts)
        results += _score_batch(model, some[:size], texts[:size])
    return results


def _size(requests: list[Request], continuations: list[list[int]]) -> int:
    """How many of the first requests fit into FORWARD_TOKENS; at least 1."""
    rows = width = 0
    for number, (request, continuation) in enumerate(zip(requests, continuations, strict=True)):
        rows += len(request.rows)
        width = max(width, max(map(len, request.rows)) + len(continuation))
        if number and rows * width > FORWARD_TOKENS:
            return number
    return len(requests)


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


def _score_batch(model: Llama, requests: list[Request], continuations: list[list[int]]) -> list[Tensor]:
    """`continuation_logprobs` in one forward."""
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
        scores.append(_score(model, request, sides, continuation))
    return scores


def _score(model: Llama, request: Request, sides: list[Tensor], continuation: list[int]) -> Tensor:
    """Log-probabilities (T,) of the continuation from the hidden states (T, C) of each side."""
    targets = torch.tensor(continuation, device=model.device)[:, None]  # (T, 1)
    parts = []
    for start in range(0, len(continuation), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        logits = side_logits(model, request, [states[part] for states in sides])
        logprobs = guided_logprobs(request, logits[0], logits[1] if request.guided else None)
        parts.append(logprobs.gather(-1, targets[part])[:, 0])
    scores = torch.cat(parts).cpu() if parts else torch.zeros(0)
    if scores.isnan().any():  # as `guide` gives it where a logit is not finite
        raise InputError(
            "the model gives numbers that are not finite, so that no likelihood can be told; look at its "
            "weights and its adapter, or take --dtype float32"
        )
    return scores
