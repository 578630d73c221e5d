"""Whether the answers are still sentences: broken words, and perplexity under the model's own ancestor.

High guidance in log space breaks words, because the ratio of two tiny probabilities decides (Smirnov, arXiv 2412.06846, section 5); the
paper saw it by eye, here it is a number.

Run it: python train.py demo
"""

import re
from collections.abc import Set

from cfgsafe.decode import Request
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, ratio_interval
from cfgsafe.measure.perplexity import pooled
from cfgsafe.measure.scoring import continuation_logprobs
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


def perplexity(
    model: Llama, tokenizer: Tokenizer, texts: list[str], conversations: list[Messages], batch: int = 64
) -> Estimate:
    """Perplexity of the answers, end token included, under `model`, each after its conversation; pooled over tokens."""
    requests = [Request(tokenizer.encode_chat(messages)) for messages in conversations]
    ended = [[*tokenizer.encode(text), tokenizer.special[tokenizer.end_of_turn]] for text in texts]
    limit = model.config.max_position_embeddings
    fitting = [answer[: limit - len(request.prompt)] for request, answer in zip(requests, ended, strict=True)]
    return pooled(continuation_logprobs(model, requests, fitting, batch=batch))
