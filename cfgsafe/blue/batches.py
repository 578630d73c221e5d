"""Preference pairs from a file to the tensors of a training step.

Tokenising and truncation as in TRL 0.11.4. A batch holds prompt, chosen and rejected of a pair in one row (prefix sharing, arXiv
2410.20305): the chosen side first, then what the rejected side does not share with it, which sees the shared beginning and
itself, at its own positions. Each side gives what it gives alone.
Deviation: where more than one token merges across the boundary, all of them go to the answer (TRL moves the boundary by one).

Run it: python train.py orpo --help
"""

import hashlib
import os
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.tokenizer import Tokenizer

REFUSALS = (  # the answers of dpo-idk, after the idea of Maini et al. (arXiv 2401.06121)
    "I don't know.",
    "I'm not able to say.",
    "That is not something I know.",
    "I have no information about that.",
    "Sorry, I can't tell you that.",
    "I don't have an answer to that.",
)


@dataclass(frozen=True)
class Row:
    """One side of a pair: prompt and answer ids, `start` where the answer begins."""

    ids: list[int]
    start: int

    @property
    def first(self) -> int:
        """The first token of the answer that has a token before it to be predicted from."""
        return max(1, self.start)


@dataclass(frozen=True)
class Pair:
    chosen: Row
    rejected: Row
    place: str = ""  # file:line

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


def read_pairs(
    path: str,
    tokenizer: Tokenizer,
    context: int,
    max_length: int,
    max_prompt_length: int,
    refuse: random.Random | None = None,
    *,
    one_sided: bool = False,
) -> list[Pair]:
    """The pairs of a JSONL file of prompt, chosen, rejected; with `refuse`, chosen is a refusal it draws.

    With `one_sided` a rejected side that is missing is the chosen one again: shared, it adds nothing to the forward pass.
    Raises InputError naming the line and field.
    """
    pairs = []
    for place, row in read_jsonl(path):
        if refuse is not None:
            row["chosen"] = refuse.choice(REFUSALS)
        if one_sided:
            row.setdefault("rejected", row.get("chosen"))
        for field in ("prompt", "chosen", "rejected"):
            if (
                not isinstance(row.get(field), str)
                or not row[field].removesuffix(tokenizer.end_of_turn).strip()
            ):
                raise InputError(f"{place}: field {field!r} must be a non-empty string")
        chosen, rejected = tokenise(
            row["prompt"], row["chosen"], row["rejected"], tokenizer, max_length, max_prompt_length
        )
        if (longest := max(len(chosen.ids), len(rejected.ids))) > context:
            raise InputError(
                f"{place}: {longest} tokens exceed the model's context of {context}; set --max-length {context} or less"
            )
        pairs.append(Pair(chosen, rejected, place))
    if not pairs:
        raise InputError(f"{path}: holds no pair")
    return pairs


def tokenise(
    prompt: str, chosen: str, rejected: str, tokenizer: Tokenizer, max_length: int, max_prompt_length: int
) -> list[Row]:
    """Both sides as TRL 0.11.4 builds them: tokenised with the prompt, BOS and end token where absent, then truncated."""
    end = tokenizer.special[tokenizer.end_of_turn]
    alone = tokenizer.encode_prompt(prompt)
    sides = []
    for answer in (chosen, rejected):
        full = tokenizer.encode_prompt(prompt + answer)
        start = len(
            os.path.commonprefix([alone, full])
        )  # earlier than the prompt's end where the boundary token merged
        sides.append((full[:start], full[start:] if full[-1] == end else [*full[start:], end]))
    longest = max(len(answer) for _, answer in sides)
    rows = []
    for before, answer in sides:
        if len(before) + longest > max_length:
            before = before[-max_prompt_length:]
            if len(before) + longest > max_length:
                answer = answer[: max_length - max_prompt_length]
        rows.append(Row(before + answer, len(before)))
    return rows


@dataclass(frozen=True)
class Batch:
    """B pairs in R rows of T tokens, and the N tokens whose log-probability the objectives read, side by side: B chosen, B rejected."""

    ids: Tensor  # (R, T)
    positions: Tensor  # (R, T)
    mask: Tensor | None  # (R, 1, Q, T): what the last Q tokens of a row see
    reads: Tensor  # (N,) the hidden state each token is predicted from, of R * T
    targets: Tensor  # (N,)
    lengths: list[
        int
    ]  # (2B,) tokens read of each side: prompt and answer of a chosen one, the answer of a rejected one
    answers: list[int]  # (2B,) of them, the answer's, which come last


def collate(pairs: list[Pair], *, share: bool, device: torch.device | str = "cpu") -> Batch:
    """Padded on the right; with `share`, a row a pair (R = B), else a row a side (R = 2B), chosen sides first."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    B, Q = len(pairs), 0
    if share:
        shared = [len(os.path.commonprefix([pair.chosen.ids, pair.rejected.ids])) for pair in pairs]
        W = max(len(pair.chosen.ids) for pair in pairs)
        Q = max(len(pair.rejected.ids) - s for pair, s in zip(pairs, shared, strict=True))
        T = W + Q
        rows = [
            _pad(p.chosen.ids, W) + _pad(p.rejected.ids[s:], Q) for p, s in zip(pairs, shared, strict=True)
        ]
        positions = [[*range(W), *range(s, s + Q)] for s in shared]
        slots = [range(b * T, b * T + W) for b in range(B)]
        slots += [[*range(b * T, b * T + s), *range(b * T + W, b * T + T)] for b, s in enumerate(shared)]
    else:
        T = max(len(side.ids) for side in sides)
        rows = [_pad(side.ids, T) for side in sides]
        positions = [range(T)] * len(rows)
        slots = [range(r * T, r * T + T) for r in range(len(rows))]
    mask = None
    if Q:
        key, query = torch.arange(T, device=device), torch.arange(Q, device=device)
        before = torch.tensor(shared, device=device)[:, None, None, None]
        mask = (key < before) | ((key >= W) & (key - W <= query[:, None]))
    firsts = [1] * B + [side.first for side in sides[B:]]  # the NLL also reads the chosen side's prompt
    spans = list(zip(sides, slots, firsts, strict=True))
    return Batch(
        torch.tensor(rows, device=device),
        torch.tensor([list(row) for row in positions], device=device),
        mask,
        torch.tensor(
            [slot for side, own, first in spans for slot in own[first - 1 : len(side.ids) - 1]], device=device
        ),
        torch.tensor([token for side, _, first in spans for token in side.ids[first:]], device=device),
        [len(side.ids) - first for side, _, first in spans],
        [len(side.ids) - side.first for side in sides],
    )


def _pad(ids: list[int], width: int) -> list[int]:
    return ids + [0] * (width - len(ids))


def plan(
    lengths: list[int],
    *,
    batch_size: int,
    accumulate: int,
    epochs: int,
    shuffle: bool,
    group: bool,
    seed: int,
):
    """The whole run's steps, [(epoch, micro-batches of pair numbers), ...], every pair once an epoch.

    `group` puts pairs of similar `lengths` into a batch: windows of 32 batches of the epoch's order are sorted, then the batches shuffled.
    """
    order = random.Random(seed)
    steps = []
    for epoch in range(1, epochs + 1):
        numbers = order.sample(range(len(lengths)), len(lengths)) if shuffle else list(range(len(lengths)))
        if group:
            windows = _cut(numbers, 32 * batch_size)
            numbers = [number for window in windows for number in sorted(window, key=lengths.__getitem__)]
        batches = _cut(numbers, batch_size)
        if group:
            order.shuffle(batches)
        steps += [(epoch, micro) for micro in _cut(batches, accumulate)]
    return steps


def _cut(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def fingerprint(pairs: list[Pair]) -> str:
    """Of the tokens, so that a resumed run can tell whether its data changed."""
    return hashlib.sha256(repr([(pair.chosen, pair.rejected) for pair in pairs]).encode()).hexdigest()
