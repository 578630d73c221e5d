"""How different the successful attacks are. One number can hide collapse, so there are several.

Source: Lee et al. (arXiv 2405.18540), mean pairwise cosine distance of all-MiniLM-L6-v2 embeddings;
Stable-GFN (arXiv 2605.00553), unique attacks; distinct-n, Li et al. (arXiv 1510.03055); self-BLEU,
Zhu et al. (arXiv 1802.01886).
Deviation: where sentence-transformers is not installed, the embedding counts the character n-grams
of a text, hashed (Weinberger et al., arXiv 0902.2206). As with the sentence model, an embedding
depends on no other text, so figures of different runs compare. Reports name the embedding.

Run it: python -m pytest tests/test_diversity.py
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
THRESHOLDS = (0.3, 0.5, 0.7)  # cosine distances at which unique attacks are counted
HASHED = 1024  # dimension of the hashed n-grams
NGRAM_SIZES = (3, 4, 5)

Gram = tuple[str, ...]


def embed(texts: list[str]) -> tuple[np.ndarray, str]:
    """Unit vectors (N, D) of `texts`, and the name of the embedding."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return character_ngrams(texts), "hashed character 3- to 5-grams"
    model = SentenceTransformer(SENTENCE_MODEL)
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False), SENTENCE_MODEL


def character_ngrams(texts: list[str]) -> np.ndarray:
    """Unit vectors (N, HASHED); a text without any 3-gram is the zero vector.

    Each n-gram, in lower case, adds 1 or -1 to one component. Component and sign come from the hash
    of the n-gram, so that n-grams that share a component cancel out on average.
    """
    vectors = np.zeros((len(texts), HASHED))
    for row, text in enumerate(texts):
        lowered = text.lower()
        for size in NGRAM_SIZES:
            for start in range(len(lowered) - size + 1):
                gram = lowered[start : start + size]
                hashed = zlib.crc32(gram.encode())  # hash() differs from process to process
                vectors[row, hashed % HASHED] += 1 if hashed >> 31 else -1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def mean_cosine_distance(vectors: np.ndarray) -> float:
    """Mean of 1 - u.v over all pairs of unit `vectors` (N, D); 0 for fewer than two.

    The sum over pairs is (|sum of v|^2 - sum of |v|^2) / 2.
    """
    n = len(vectors)
    if n < 2:
        return 0.0
    total = vectors.sum(0)
    similarity = (total @ total - (vectors * vectors).sum()) / (n * (n - 1))
    return max(0.0, float(1 - similarity))  # rounding must not bring it below 0


def clusters(vectors: np.ndarray, threshold: float) -> int:
    """Number of unique attacks among unit `vectors` (N, D).

    A vector is unique if its cosine distance to all unique ones before is at least `threshold`.
    """
    unique, count = np.empty_like(vectors), 0
    for vector in vectors:
        distances = 1 - unique[:count] @ vector
        if count == 0 or distances.min() >= threshold - 1e-9:
            unique[count] = vector
            count += 1
    return count


def distinct_n(texts: list[str], n: int) -> float:
    """Different word n-grams / all word n-grams; 0 where there is none."""
    grams: list[Gram] = []
    for text in texts:
        grams.extend(_grams(text.split(), n))
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others, in [0, 1]; 1 where all are the same.

    Precisions of n-grams longer than one word have add-one smoothing.
    """
    if len(texts) < 2:
        return 0.0
    words = [text.split() for text in texts]
    log_precisions = np.zeros(len(texts))  # geometric mean over the sizes of n-grams
    for size in range(1, n + 1):
        counts = [Counter(_grams(line, size)) for line in words]
        seconds = _second_highest(counts)
        smooth = 0 if size == 1 else 1
        for number, count in enumerate(counts):
            # The count of an n-gram is clipped at its highest count in another text.
            hits = sum(min(times, seconds[gram]) for gram, times in count.items())
            precision = (hits + smooth) / max(count.total() + smooth, 1)
            log_precisions[number] += math.log(precision) / n if precision else -math.inf
    lengths = Counter(len(line) for line in words)
    scores = []
    for log_precision, line in zip(log_precisions, words, strict=True):
        scores.append(math.exp(log_precision) * _brevity(len(line), lengths))
    return float(np.mean(scores))


def _second_highest(counts: list[Counter[Gram]]) -> dict[Gram, int]:
    """For each n-gram, the second highest of its counts in the texts."""
    highest: dict[Gram, int] = {}
    second: dict[Gram, int] = {}
    for count in counts:
        for gram, times in count.items():
            before = highest.get(gram, 0)
            second[gram] = max(second.get(gram, 0), min(times, before))
            highest[gram] = max(before, times)
    return second


def _brevity(length: int, lengths: Counter[int]) -> float:
    """BLEU's penalty for a text that is shorter than the other text closest in length.

    `lengths` counts the lengths of all texts. Of two that are equally close, the shorter one counts.
    """
    others = lengths - Counter([length])
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= closest else math.exp(1 - closest / max(length, 1))


def _grams(words: list[str], n: int) -> Iterator[Gram]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
