"""How different the successful attacks are: one number hides collapse, so there are several.

Source: Lee et al. (arXiv 2405.18540): mean pairwise cosine distance of all-MiniLM-L6-v2 embeddings; Stable-GFN (arXiv 2605.00553): unique
attacks; distinct-n, Li et al. (arXiv 1510.03055); self-BLEU, Zhu et al. (arXiv 1802.01886).
Deviation: where sentence-transformers is not installed, the embedding is the TF-IDF vector of a text's character 3- to 5-grams; reports
name which one it was.

Run it: python -m pytest tests/test_diversity.py
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
THRESHOLDS = (0.3, 0.5, 0.7)


def embed(texts: list[str]) -> tuple[np.ndarray, str]:
    """Unit vectors (N, D) of `texts`, and the name of the embedding."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return character_ngrams(texts), "TF-IDF of character 3- to 5-grams"
    model = SentenceTransformer(SENTENCE_MODEL)
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False), SENTENCE_MODEL


def character_ngrams(texts: list[str]) -> np.ndarray:
    """TF-IDF vectors of length 1 (N, D); a text without any 3-gram is the zero vector."""
    counts = [Counter(text.lower()[i : i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1)) for text in texts]
    seen = Counter(gram for count in counts for gram in count)
    place = {gram: number for number, gram in enumerate(seen)}
    vectors = np.zeros((len(texts), len(place)))
    for row, count in enumerate(counts):
        for gram, times in count.items():
            vectors[row, place[gram]] = times * (1 + math.log((1 + len(texts)) / (1 + seen[gram])))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def mean_cosine_distance(vectors: np.ndarray) -> float:
    """Of all pairs of unit `vectors` (N, D); 0 for fewer than two."""
    n = len(vectors)
    if n < 2:
        return 0.0
    total = vectors.sum(0)
    return float(1 - (total @ total - (vectors * vectors).sum()) / (n * (n - 1)))


def clusters(vectors: np.ndarray, threshold: float) -> int:
    """Unique attacks: taken in order, a vector is new when its cosine distance to every new one before it is at least `threshold`."""
    new: list[np.ndarray] = []
    for vector in vectors:
        if not new or (1 - np.stack(new) @ vector).min() >= threshold - 1e-9:
            new.append(vector)
    return len(new)


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams of words, as a share of all of them; 0 where there is none."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others, in [0, 1]: 1 where they are all the same. Add-one smoothing above unigrams."""
    if len(texts) < 2:
        return 0.0
    words = [text.split() for text in texts]
    grams = [[Counter(_grams(line, size)) for size in range(1, n + 1)] for line in words]
    return float(np.mean([_bleu(number, words, grams) for number in range(len(texts))]))


def _bleu(number: int, words: list[list[str]], grams: list[list[Counter]]) -> float:
    mine, length = grams[number], len(words[number])
    others = [other for other in range(len(words)) if other != number]
    logs = 0.0
    for size, count in enumerate(mine):
        best = Counter()
        for other in others:
            best |= grams[other][size]
        hits, all_ = sum((count & best).values()), sum(count.values())
        smooth = 1 if size else 0
        if hits + smooth == 0 or all_ + smooth == 0:
            return 0.0
        logs += math.log((hits + smooth) / (all_ + smooth)) / len(mine)
    closest = min((len(words[other]) for other in others), key=lambda other: (abs(other - length), other))
    return math.exp(logs) * (1.0 if length >= closest else math.exp(1 - closest / max(length, 1)))


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
