"""Whether the answers are still sentences: broken words, and perplexity under the base model.

Source: Smirnov (arXiv 2412.06846), section 5: high guidance in log space breaks words, because the
ratio of two tiny probabilities decides.
Deviation: the paper judges by eye; here it is measured.

Run it: python train.py demo
"""

import re
from collections.abc import Set

from cfgsafe.decode import Request
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Clusters, Estimate, share_interval
from cfgsafe.measure.perplexity import pooled
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.tokenizer import Messages, Tokenizer


def words(text: str) -> list[str]:
    """Runs of letters of any script, in their own case."""
    return re.findall(r"[^\W\d_]+", text)


def broken_words(
    texts: list[str], conversations: list[Messages], vocabulary: Set[str], clusters: Clusters = None
) -> Estimate | None:
    """Percentage of words that are neither in `vocabulary` (lower case) nor in their conversation.

    None if there are no words. Answers are the units, in `clusters`.
    """
    broken, total = [], []
    for text, messages in zip(texts, conversations, strict=True):
        known: set[str] = set()
        for message in messages:
            known.update(word.lower() for word in words(message["content"]))
        found = [word.lower() for word in words(text)]
        broken.append(sum(word not in vocabulary and word not in known for word in found))
        total.append(len(found))
    return share_interval(broken, total, clusters)


def perplexity(
    model: Llama,
    tokenizer: Tokenizer,
    texts: list[str],
    conversations: list[Messages],
    clusters: Clusters = None,
    batch: int = 64,
) -> Estimate | None:
    """Perplexity of the answers, with their end tokens, under `model`, each after its conversation.

    An answer is cut where the context ends. Answers are the units, in `clusters`.
    """
    requests = [Request(tokenizer.encode_chat(messages)) for messages in conversations]
    ended = [[*tokenizer.encode(text), tokenizer.special[tokenizer.end_of_turn]] for text in texts]
    limit = model.config.max_position_embeddings
    rooms = [limit - len(request.prompt) for request in requests]
    fitting = [answer[:room] for answer, room in zip(ended, rooms, strict=True)]
    return pooled(continuation_logprobs(model, requests, fitting, batch=batch), clusters)
