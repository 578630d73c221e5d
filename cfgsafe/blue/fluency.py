"""Whether the answers are still sentences: broken words, and perplexity under the model's own ancestor.

High guidance in log space breaks words, because the ratio of two tiny probabilities decides (Smirnov, arXiv 2412.06846, section 5); the
paper saw it by eye, here it is a number.

Run it: python train.py demo
"""

import math
import re
from collections.abc import Set

import torch

from cfgsafe.blue.intervals import Estimate, ratio_interval
from cfgsafe.llama import Llama
from cfgsafe.logprobs import head_logprobs
from cfgsafe.tokenizer import Messages, Tokenizer


def words(text: str) -> list[str]:
    """Runs of letters, of any script, as they are written."""
    return re.findall(r"[^\W\d_]+", text)


def broken_words(texts: list[str], conversations: list[Messages], vocabulary: Set[str]) -> Estimate:
    """Percentage of words that stand neither in `vocabulary` (lower-case) nor in their own conversation."""
    broken, total = [], []
    for text, messages in zip(texts, conversations, strict=True):
        known = {word.lower() for m in messages for word in words(m["content"])}
        found = words(text)
        broken.append(100 * sum(w.lower() not in vocabulary and w.lower() not in known for w in found))
        total.append(len(found))
    return ratio_interval(broken, total)


@torch.inference_mode()
def perplexity(model: Llama, tokenizer: Tokenizer, texts: list[str], conversations: list[Messages], batch: int = 64) -> Estimate:
    """Perplexity of the answers, end token included, under `model`, each after its conversation; pooled over tokens."""
    end = tokenizer.special[tokenizer.end_of_turn]
    rows = [(tokenizer.encode_chat(m), [*tokenizer.encode(text), end]) for text, m in zip(texts, conversations, strict=True)]
    limit = model.config.max_position_embeddings
    nlls = []
    for start in range(0, len(rows), batch):
        group = [((prompt + answer)[:limit], len(prompt)) for prompt, answer in rows[start : start + batch]]
        width = max(len(ids) for ids, _ in group)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group], device=model.device)
        place = torch.arange(width - 1, device=model.device)
        mask = torch.stack([(place >= begin - 1) & (place < len(row) - 1) for row, begin in group])
        logprobs = head_logprobs(model, model(ids)[:, :-1][mask], ids[:, 1:][mask])
        nlls += [-part.sum().item() for part in logprobs.split(mask.sum(1).tolist())]
    estimate = ratio_interval(nlls, [len(answer) for _, answer in rows])
    return Estimate(*(math.exp(min(v, 50.0)) for v in (estimate.value, estimate.low, estimate.high)))
