"""The log-probability of given tokens under a request's guidance; no token is drawn.

Source: Smirnov (arXiv 2412.06846), eq. 2 and 6. `explain` and every score of cfgsafe/measure use these
functions, so none of them can leave out the guidance.
Shapes: n rows, T tokens of a continuation, C hidden, V vocabulary.

Run it: python infer.py --model M --prompt "Who am I?" --guidance 3 --explain
"""

import torch
from torch import Tensor

from cfgsafe.guidance import SPACES
from cfgsafe.kernels.reference import guide, log_probabilities
from cfgsafe.llama import Llama
from cfgsafe.lora import set_adapters
from cfgsafe.request import Request


def continuation_states(
    model: Llama, prompts: list[list[int]], continuations: list[list[int]], adapters: list[str | None]
) -> list[Tensor]:
    """Hidden states (T, C) that predict the T tokens of continuations[i] after prompts[i].

    One forward over all n rows, padded on the right. Row i uses adapters[i].
    """
    rows = [prompt + given[:-1] for prompt, given in zip(prompts, continuations, strict=True)]
    width = max(map(len, rows))
    padded = [ids + [0] * (width - len(ids)) for ids in rows]
    set_adapters(model, adapters)
    hidden = model(torch.tensor(padded, device=model.device))  # (n, width, C)
    set_adapters(model, None)
    states = []
    for row, (prompt, given) in enumerate(zip(prompts, continuations, strict=True)):
        first = len(prompt) - 1  # the last token of the prompt predicts the first one after it
        states.append(hidden[row, first : first + len(given)])
    return states


def side_logits(model: Llama, request: Request, sides: list[Tensor]) -> list[Tensor]:
    """Logits (T, V) of each side of the request from its hidden states (T, C)."""
    set_adapters(model, [request.adapter])  # an adapter can sit on the head
    logits = [model.head(states) for states in sides]
    set_adapters(model, None)
    return logits


def guided_logprobs(request: Request, positive: Tensor, negative: Tensor | None) -> Tensor:
    """Log-probabilities (T, V) under the request's guidance, space and alpha, from logits (T, V).

    `negative` is None for a request that is not guided.
    """
    if negative is None:
        if request.alpha == 0:
            return log_probabilities(positive)
        negative = positive
    T = len(positive)
    settings = (request.guidance, SPACES.index(request.space), request.alpha)
    guidance, space, alpha = (torch.full((T,), value, device=positive.device) for value in settings)
    return guide(positive, negative, guidance, space, alpha)
