"""The replay buffer: the best prompts found so far, no two of them alike.

Source: Lee et al. (arXiv 2405.18540): near-duplicates compete for one place, the worst leaves when the buffer is full, prompts are drawn in
proportion to their score.
Deviations from their code: the tolerance is used; an item is told from another by its tokens, not by its reward; saving keeps all of
it, the generator included.

Run it: python -m pytest tests/test_buffer.py
"""

from itertools import zip_longest
from pathlib import Path

import numpy as np

from cfgsafe.errors import InputError, read_jsonl, write_jsonl
from cfgsafe.red.attacks import Attack


class ReplayBuffer:
    """At most `capacity` attacks that have a score; of two whose edit distance is below `tolerance` times their summed length the better stays."""

    def __init__(self, capacity: int = 1000, tolerance: float = 0.25, seed: int = 0):
        self.capacity, self.tolerance = capacity, tolerance
        self.items: list[Attack] = []
        self.random = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: Attack) -> bool:
        """Whether `item` was taken in: it must be better than every item like it, and than the worst where the buffer is full."""
        lengths = np.array([len(other.tokens) for other in self.items])
        bounds = self.tolerance * (lengths + len(item.tokens))
        distances = edit_distances(item.tokens, [other.tokens for other in self.items])
        alike = [
            number for number, (distance, bound) in enumerate(zip(distances, bounds, strict=True)) if distance == 0 or distance < bound
        ]
        if any(self.items[number].score >= item.score for number in alike):
            return False
        kept = [other for number, other in enumerate(self.items) if number not in alike]
        if len(kept) >= self.capacity:
            worst = min(range(len(kept)), key=lambda number: kept[number].score)  # of equal ones the oldest
            if kept[worst].score >= item.score:
                return False
            del kept[worst]
        self.items = [*kept, item]
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
        head = {"capacity": self.capacity, "tolerance": self.tolerance, "random": self.random.bit_generator.state}
        write_jsonl(path, [head, *(item.to_json() for item in self.items)])

    @staticmethod
    def load(path: str | Path) -> "ReplayBuffer":
        """The buffer that `save` wrote; it draws what the saved one would have drawn. Raises InputError naming the line."""
        (_, head), *rows = list(read_jsonl(path)) or [("", {})]
        try:
            buffer = ReplayBuffer(head["capacity"], head["tolerance"])
            buffer.random.bit_generator.state = head["random"]
            buffer.items = [Attack.from_json(row, place) for place, row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a saved replay buffer ({error}); delete it to begin with an empty one") from None
        return buffer


def edit_distances(one: tuple[int, ...], others: list[tuple[int, ...]]) -> np.ndarray:
    """Levenshtein distance from `one` to each of `others`, (len(others),), all of them at once."""
    if not others:
        return np.zeros(0, int)
    tokens = np.array(list(zip_longest(*others, fillvalue=-1)), int).reshape(-1, len(others))  # (longest, N)
    places = np.arange(len(tokens) + 1)[:, None]
    row = np.zeros((len(tokens) + 1, len(others)), int)  # distances from a beginning of `one`, less `places`: an insertion changes nothing
    for count, token in enumerate(one, start=1):
        above, row = row, np.empty_like(row)
        row[0] = count
        np.minimum(above[:-1] - (tokens == token), above[1:] + 1, out=row[1:])
        np.minimum.accumulate(row, axis=0, out=row)
    lengths = [len(other) for other in others]
    return (row + places)[lengths, np.arange(len(others))]
