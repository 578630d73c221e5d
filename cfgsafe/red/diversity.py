"""How different the successful attacks are: one number hides collapse, so there are several.

Source: Lee et al. (arXiv 2405.18540): mean pairwise cosine distance of all-MiniLM-L6-v2 embeddings; Stable-GFN (arXiv 2605.00553): unique
attacks; distinct-n, Li et al. (arXiv 1510.03055); self-BLEU, Zhu et al. (arXiv 1802.01886).
Deviation: where sentence-transformers is not installed, the embedding counts a text's character n-grams, hashed (Weinberger et al., arXiv
0902.2206). Like the sentence model it depends on no other text, so figures of different runs compare; reports name which one it was.

Run it: python -m pytest tests/test_diversity.py
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
THRESHOLDS = (0.3, 0.5, 0.7)
HASHED = 1024  # places of the hashed n-grams


def embed(texts: list[str]) -> tuple[np.ndarray, str]:
    """Unit vectors (N, D) of `texts`, and the name of the embedding."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return character_ngrams(texts), "hashed character 3- to 5-grams"
    model = SentenceTransformer(SENTENCE_MODEL)
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False), SENTENCE_MODEL


def character_ngrams(texts: list[str]) -> np.ndarray:
    """Vectors of length 1 (N, HASHED); a text without any 3-gram is the zero vector.

    Each n-gram, in lower case, adds 1 or -1 at a place; both are its hash's, so that n-grams that share a place cancel out on average.
    """
    vectors = np.zeros((len(texts), HASHED))
    for row, text in enumerate(texts):
        lowered = text.lower()
        for gram in (lowered[i : i + n] for n in (3, 4, 5) for i in range(len(lowered) - n + 1)):
            hashed = zlib.crc32(gram.encode())  # hash() differs from process to process
            vectors[row, hashed % HASHED] += 1 if hashed >> 31 else -1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def mean_cosine_distance(vectors: np.ndarray) -> float:
    """Of all pairs of unit `vectors` (N, D); 0 for fewer than two."""
    n = len(vectors)
    if n < 2:
        return 0.0
    total = vectors.sum(0)
    return max(
        0.0, float(1 - (total @ total - (vectors * vectors).sum()) / (n * (n - 1)))
    )  # not below 0 by rounding


def clusters(vectors: np.ndarray, threshold: float) -> int:
    """Unique attacks: taken in order, a vector is new when its cosine distance to every new one before it is at least `threshold`."""
    new, count = np.empty_like(vectors), 0
    for vector in vectors:
        if not count or (1 - new[:count] @ vector).min() >= threshold - 1e-9:
            new[count], count = vector, count + 1
    return count


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams of words, as a share of all of them; 0 where there is none."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others, in [0, 1]: 1 where they are all the same. Add-one smoothing above unigrams."""
    if len(texts) < 2:
        return 0.0
    words = [text.split() for text in texts]
    lengths = Counter(map(len, words))
    logs = np.zeros(len(texts))
    for size in range(1, n + 1):
        counts = [Counter(_grams(line, size)) for line in words]
        highest: dict[
            tuple[str, ...], list[int]
        ] = {}  # n-gram -> its second highest and its highest count in a text
        for count in counts:
            for gram, times in count.items():
                highest[gram] = sorted([*highest.get(gram, (0, 0)), times])[1:]
        smooth = 0 if size == 1 else 1
        for number, count in enumerate(counts):
            hits = sum(
                min(times, highest[gram][0]) for gram, times in count.items()
            )  # no more than some other text has
            share = (hits + smooth) / max(count.total() + smooth, 1)
            logs[number] += math.log(share) / n if share else -math.inf
    return float(
        np.mean([math.exp(log) * _brevity(len(line), lengths) for log, line in zip(logs, words, strict=True)])
    )


def _brevity(length: int, lengths: Counter) -> float:
    """The penalty of a text that is shorter than the closest in length of the others; of two as close the shorter one."""
    others = lengths - Counter([length])
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= closest else math.exp(1 - closest / max(length, 1))


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
