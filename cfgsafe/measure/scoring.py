"""How likely a text is under a subject, guided as its answers are.

Source: Smirnov (arXiv 2412.06846), eq. 2 and 6, applied to given tokens instead of drawn ones; perplexity, option scores and ranked
candidates come from here, so that none of them can run without the guidance that was asked for.

Run it: python eval.py utility --help
"""

import torch
from torch import Tensor

from cfgsafe.decode import Request, check_request
from cfgsafe.errors import ContextError
from cfgsafe.kernels.reference import guide, log_probabilities
from cfgsafe.llama import Llama
from cfgsafe.lora import set_adapters

TOKENS_AT_ONCE = 512  # rows of logits in one piece


@torch.inference_mode()
def continuation_logprobs(
    model: Llama, requests: list[Request], continuations: list[list[int]], *, batch: int = 16
) -> list[Tensor]:
    """Log-probability of each token of continuations[i] after requests[i]'s prompt, (tokens,) float32, under its guidance, space and alpha.

    Temperature, top-k and top-p do not count. Prompt and continuation must fit in the context.
    """
    results: list[Tensor] = []
    for start in range(0, len(requests), batch):
        some = list(zip(requests[start : start + batch], continuations[start : start + batch], strict=True))
        rows = [
            (request, prompt + continuation[:-1]) for request, continuation in some for prompt in request.rows
        ]
        width = max(len(ids) for _, ids in rows)
        set_adapters(model, [request.adapter for request, _ in rows])
        hidden = model(torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows], device=model.device))
        set_adapters(model, None)
        row = 0
        for request, continuation in some:
            sides = [
                hidden[row + n, len(p) - 1 : len(p) - 1 + len(continuation)]
                for n, p in enumerate(request.rows)
            ]
            row += len(sides)
            targets = torch.tensor(continuation, device=model.device)
            parts = [
                _guided(
                    model,
                    request,
                    [side[at : at + TOKENS_AT_ONCE] for side in sides],
                    targets[at : at + TOKENS_AT_ONCE],
                )
                for at in range(0, len(continuation), TOKENS_AT_ONCE)
            ]
            results.append(torch.cat(parts).cpu() if parts else torch.zeros(0))
    return results


def check_fits(model: Llama, request: Request, continuation: list[int], place: str) -> None:
    """Raise InputError or ContextError, naming `place`, for a text that cannot be scored after the request's prompt."""
    check_request(request, model, place)
    length, limit = max(map(len, request.rows)) + len(continuation), model.config.max_position_embeddings
    if length > limit:
        raise ContextError(
            f"{place}: prompt and text have {length} tokens, the model's context is {limit}; shorten them"
        )


def _guided(model: Llama, request: Request, sides: list[Tensor], targets: Tensor) -> Tensor:
    logits = [model.head(side) for side in sides]
    if len(logits) == 1 and request.alpha == 0:
        logs = log_probabilities(logits[0])
    else:
        full = lambda value: torch.full((len(targets),), value, device=targets.device)
        logs = guide(
            logits[0], logits[-1], full(request.guidance), full(request.space == "log"), full(request.alpha)
        )
    return logs.gather(-1, targets[:, None])[:, 0]
