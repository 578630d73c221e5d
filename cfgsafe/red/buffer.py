"""The replay buffer: the best prompts found so far, no two of them alike.

Source: Lee et al. (arXiv 2405.18540): near-duplicates compete for one place, the worst leaves when the buffer is full, prompts are drawn in
proportion to their score; 1,000 prompts told apart by edit distance, or 5,000 by the cosine of their embeddings.
Deviations from their code: the tolerance is used; an item is told from another by its tokens, not by its reward; saving keeps all of
it, the generator included. The embedding is diversity.py's of hashed character n-grams, where theirs is a sentence model.

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


class ReplayBuffer:
    """At most `capacity` attacks that have a score; of two that are alike the better stays.

    Two are alike when they have the same tokens or their distance is below `tolerance`. The distance is, as `likeness` says, the edit
    distance of the tokens divided by their summed length, or the cosine distance (1 - similarity) of the texts' embeddings.
    """

    def __init__(
        self, capacity: int = 1000, tolerance: float = 0.25, seed: int = 0, likeness: Likeness = "edit"
    ):
        if likeness not in get_args(Likeness):
            raise InputError(f"likeness {likeness!r}: must be one of {', '.join(get_args(Likeness))}")
        self.capacity, self.tolerance, self.likeness = capacity, tolerance, likeness
        self.items: list[Attack] = []
        self._vectors: list[np.ndarray] = []  # of each item, where likeness needs it
        self.random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Attack) -> bool:
        """Whether `item` was taken in: it must be better than every item like it, and than the worst where the buffer is full."""
        vector = self._embed(item)
        near = np.flatnonzero(self._distances(item, vector) < self.tolerance).tolist()
        alike = {*near, *(number for number, other in enumerate(self.items) if other.tokens == item.tokens)}
        if item.score is None or any(self.items[number].score >= item.score for number in alike):
            return False
        kept = [number for number in range(len(self)) if number not in alike]
        if len(kept) >= self.capacity:
            worst = min(kept, key=lambda number: self.items[number].score)  # of equal ones the oldest
            if self.items[worst].score >= item.score:
                return False
            kept.remove(worst)
        self.items = [*(self.items[number] for number in kept), item]
        self._vectors = [*(self._vectors[number] for number in kept), vector]
        return True

    def sample(self, count: int) -> list[Attack]:
        """`count` prompts, each drawn in proportion to its score, with replacement. Raises ValueError when there is none."""
        if not self.items:
            raise ValueError("the buffer is empty")
        weights = np.array([max(item.score, 1e-8) for item in self.items])
        picked = self.random.choice(len(self.items), size=count, p=weights / weights.sum())
        return [self.items[number] for number in picked]

    def save(self, path: str | Path) -> None:
        """Write items, settings and generator; any text survives."""
        head = {name: getattr(self, name) for name in ("capacity", "tolerance", "likeness")}
        write_jsonl(
            path,
            [head | {"random": self.random.bit_generator.state}, *(item.to_json() for item in self.items)],
        )

    @staticmethod
    def load(path: str | Path) -> "ReplayBuffer":
        """The buffer that `save` wrote; it draws what the saved one would have drawn. Raises InputError naming the line."""
        (_, head), *rows = list(read_jsonl(path)) or [("", {})]
        try:
            buffer = ReplayBuffer(head["capacity"], head["tolerance"], likeness=head["likeness"])
            buffer.random.bit_generator.state = head["random"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a saved replay buffer ({error}); delete it to begin with an empty one"
            ) from None
        buffer.items = [Attack.from_json(row, place) for place, row in rows]
        buffer._vectors = [buffer._embed(item) for item in buffer.items]
        return buffer

    def _embed(self, item: Attack) -> np.ndarray | None:
        return character_ngrams([item.text])[0].astype(np.float32) if self.likeness == "cosine" else None

    def _distances(self, item: Attack, vector: np.ndarray | None) -> np.ndarray:
        """(N,), from `item`, whose embedding is `vector`, to each of the items."""
        if self.likeness == "cosine":
            return np.array([1 - vector @ other for other in self._vectors])
        tokens = [other.tokens for other in self.items]
        return edit_distances(item.tokens, tokens) / np.array(
            [max(len(other) + len(item.tokens), 1) for other in tokens]
        )


def edit_distances(one: tuple[int, ...], others: list[tuple[int, ...]]) -> np.ndarray:
    """Levenshtein distance from `one` to each of `others`, (len(others),), all of them at once."""
    if not others:
        return np.zeros(0, int)
    tokens = np.array(list(zip_longest(*others, fillvalue=-1)), np.int32).reshape(
        -1, len(others)
    )  # (longest, N)
    places = np.arange(len(tokens) + 1)[:, None]
    row = np.zeros((len(tokens) + 1, len(others)), np.int32)  # distances less `places`: an insertion is free
    for count, token in enumerate(one, start=1):
        above, row = row, np.empty_like(row)
        row[0] = count
        np.minimum(above[:-1] - (tokens == token), above[1:] + 1, out=row[1:])
        np.minimum.accumulate(row, axis=0, out=row)
    lengths = [len(other) for other in others]
    return (row + places)[lengths, np.arange(len(others))]
