"""Guidance without batches, caches or kernels: two passes over the whole text, eq. 6 of arXiv 2412.06846."""

import torch
from torch import Tensor

from cfgsafe.llama import Llama
from cfgsafe.pii.facts import Fact
from cfgsafe.request import NEGATIVE, POSITIVE
from cfgsafe.tokenizer import Messages, Tokenizer, with_system


def guided_answer(
    model: Llama, tokenizer: Tokenizer, fact: Fact, text: str, g: float | None
) -> tuple[Tensor, list[int]]:
    """Log-probabilities (T, V) in probability space at each token of `text` as the answer; its tokens."""
    tokens = tokenizer.encode(text)

    def chances(messages: Messages) -> Tensor:
        prompt = tokenizer.encode_chat(messages)
        states = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        return model.head(states).softmax(-1)

    if g is None:
        return chances(fact.messages).log(), tokens
    followed, avoided = (chances(with_system(fact.messages, each, "add")) for each in (POSITIVE, NEGATIVE))
    mixed = (g * followed + (1 - g) * avoided).clamp(min=0)
    return (mixed / mixed.sum(-1, keepdim=True)).log(), tokens
