"""The replay buffer: the best prompts found so far, no two of them alike.

Source: Lee et al. (arXiv 2405.18540). Near-duplicates compete for one place; the worst leaves when
the buffer is full; prompts are drawn in proportion to their score. They keep 1,000 prompts told
apart by edit distance, or 5,000 by the cosine distance of embeddings.
Deviations from their code: the tolerance is used; items are told apart by their tokens, not by
their reward; a saved buffer is complete, random generator included. The embedding is that of hashed
character n-grams in diversity.py, where theirs is a sentence model.

Run it: python -m pytest tests/test_buffer.py
"""

from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl, write_jsonl
from cfgsafe.red.diversity import character_ngrams
from cfgsafe.red.records import Attack

Likeness = Literal["edit", "cosine"]
LEAST_WEIGHT = 1e-8  # of an item with score 0, so that a buffer of failures can be drawn from


class ReplayBuffer:
    """At most `capacity` attacks that have a score; of two that are alike, the better one stays.

    Two are alike when they have the same tokens, or when their distance is below `tolerance`. With
    likeness "edit" the distance is the edit distance of the tokens divided by the sum of their
    lengths; with "cosine" it is 1 - cosine similarity of the embeddings of the texts.
    """

    def __init__(
        self, capacity: int = 1000, tolerance: float = 0.25, seed: int = 0, likeness: Likeness = "edit"
    ):
        if likeness not in get_args(Likeness):
            raise InputError(f"likeness {likeness!r}: must be one of {', '.join(get_args(Likeness))}")
        self.capacity, self.tolerance, self.likeness = capacity, tolerance, likeness
        self.items: list[Attack] = []
        self.random = np.random.default_rng(seed)
        self._vectors: list[np.ndarray] = []  # embedding of each item; empty vectors for "edit"

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Attack) -> bool:
        """Add `item` if it has a score that is higher than that of every item like it.

        A full buffer drops its worst item if `item` is better. Returns whether `item` was added.
        """
        if item.score is None:
            return False
        score, vector = item.score, self._embed(item)
        alike = self._alike(item, vector)
        if any(self.items[number].known_score >= score for number in alike):
            return False
        kept = [number for number in range(len(self)) if number not in alike]
        if len(kept) >= self.capacity:
            worst = min(kept, key=lambda number: self.items[number].known_score)  # of several, the oldest
            if self.items[worst].known_score >= score:
                return False
            kept.remove(worst)
        self.items = [self.items[number] for number in kept] + [item]
        self._vectors = [self._vectors[number] for number in kept] + [vector]
        return True

    def sample(self, count: int) -> list[Attack]:
        """Draw `count` items in proportion to their score, with replacement.

        Raises ValueError for an empty buffer.
        """
        if not self.items:
            raise ValueError("the buffer is empty")
        weights = np.array([max(item.known_score, LEAST_WEIGHT) for item in self.items])
        picked = self.random.choice(len(self.items), size=count, p=weights / weights.sum())
        return [self.items[number] for number in picked]

    def save(self, path: str | Path) -> None:
        """Write settings, random generator and items."""
        head = {
            "capacity": self.capacity,
            "tolerance": self.tolerance,
            "likeness": self.likeness,
            "random": self.random.bit_generator.state,
        }
        write_jsonl(path, [head] + [item.to_json() for item in self.items])

    @staticmethod
    def load(path: str | Path) -> "ReplayBuffer":
        """The saved buffer, which goes on to draw the same. Raises InputError naming the line."""
        rows = list(read_jsonl(path))
        head = rows[0][1] if rows else {}
        try:
            buffer = ReplayBuffer(head["capacity"], head["tolerance"], likeness=head["likeness"])
            buffer.random.bit_generator.state = head["random"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a saved replay buffer ({error}); delete it to begin with an empty one"
            ) from None
        buffer.items = [Attack.from_json(row, place) for place, row in rows[1:]]
        buffer._vectors = [buffer._embed(item) for item in buffer.items]
        return buffer

    def _embed(self, item: Attack) -> np.ndarray:
        if self.likeness == "edit":
            return np.zeros(0, np.float32)
        return character_ngrams([item.text])[0].astype(np.float32)

    def _alike(self, item: Attack, vector: np.ndarray) -> set[int]:
        """Numbers of the items like `item`, whose embedding is `vector`."""
        near = self._distances(item, vector) < self.tolerance
        same = [other.tokens == item.tokens for other in self.items]
        return set(np.flatnonzero(near | np.array(same, bool)).tolist())

    def _distances(self, item: Attack, vector: np.ndarray) -> np.ndarray:
        """Distance from `item` to each of the N items, (N,)."""
        if self.likeness == "cosine":
            return np.array([1 - vector @ other for other in self._vectors])
        tokens = [other.tokens for other in self.items]
        lengths = [max(len(other) + len(item.tokens), 1) for other in tokens]
        return edit_distances(item.tokens, tokens) / np.array(lengths)


def edit_distances(one: tuple[int, ...], others: list[tuple[int, ...]]) -> np.ndarray:
    """Levenshtein distance from `one` to each of N `others`, (N,) integers.

    Computes the usual table row by row, for all others at once. Row i holds D[i, j], the distance
    from the first i tokens of `one` to the first j of another, minus j. Without the j, an insertion
    costs nothing, and the minimum over insertions is a running minimum.
    """
    if not others:
        return np.zeros(0, int)
    columns = np.array(list(zip_longest(*others, fillvalue=-1)), np.int32)
    tokens = columns.reshape(-1, len(others))  # (longest, N)
    places = np.arange(len(tokens) + 1)[:, None]
    row = np.zeros((len(tokens) + 1, len(others)), np.int32)
    for count, token in enumerate(one, start=1):
        above, row = row, np.empty_like(row)
        row[0] = count
        np.minimum(above[:-1] - (tokens == token), above[1:] + 1, out=row[1:])
        np.minimum.accumulate(row, axis=0, out=row)
    lengths = [len(other) for other in others]
    return (row + places)[lengths, np.arange(len(others))]
