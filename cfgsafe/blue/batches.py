"""Preference pairs from a file to the tensors of a training step.

Source: tokenising and truncation as in TRL 0.11.4; prefix sharing (arXiv 2410.20305): one row holds
a whole pair. The chosen side comes first, then the tokens that the rejected side does not share with
it. These tokens attend to the shared beginning and to each other, at their own positions. So both
sides get the same log-probabilities as in rows of their own.
Deviation: where several tokens merge across the boundary of prompt and answer, all of them go to the
answer (TRL moves the boundary by one).

Run it: python train.py orpo --help
"""

import random
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cfgsafe.blue.options import Options
from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.losses import NEEDS
from cfgsafe.tokenizer import Tokenizer

WINDOW = 32  # batches whose pairs are sorted together by length
HEAVIEST = 10**6  # weight of a pair
Item = TypeVar("Item")
Table = list[list[int]]


@dataclass(frozen=True)
class Row:
    """One side of a pair: token ids of prompt and answer; the answer begins at `start`."""

    ids: list[int]
    start: int

    @property
    def first(self) -> int:
        """Index of the first token of the answer that can be predicted: it has a token before it."""
        return max(1, self.start)


@dataclass(frozen=True)
class Pair:
    """The two sides of a preference pair."""

    chosen: Row
    rejected: Row
    place: str = ""  # file:line
    kept: bool = False  # its chosen side is only to be kept, there is no rejected one
    weight: float = 1.0  # its loss counts that much

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return len(self.chosen.ids) + len(self.rejected.ids)


def read_pairs(path: str, tokenizer: Tokenizer, context: int, options: Options) -> list[Pair]:
    """The pairs of a JSONL file of prompt, chosen, rejected, and perhaps weight, as the objective needs them.

    For an objective with its own answers, the chosen side of a pair is one of them, drawn from the seed.
    Raises InputError naming the line and field.
    """
    needs, rng = NEEDS[options.objective], random.Random(options.seed)
    pairs = []
    for place, row in read_jsonl(path):
        if needs.answers and not is_kept(row):
            row["chosen"] = rng.choice(needs.answers)
        pairs.append(pair_of(row, place, tokenizer, context, options))
    if not pairs:
        raise InputError(f"{path}: holds no pair")
    return pairs


def is_kept(row: dict) -> bool:
    """Whether the row has an answer to keep, and says so: its rejected side is null."""
    return "rejected" in row and row["rejected"] is None


def pair_of(row: dict, place: str, tokenizer: Tokenizer, context: int, options: Options) -> Pair:
    """The pair of one row.

    The chosen side stands in for a rejected one that is null, or missing where the objective reads none: all
    of its tokens are shared, so no block computes it twice. Raises InputError naming `place` and the field.
    """
    kept = is_kept(row)
    if kept or not NEEDS[options.objective].rejected and "rejected" not in row:
        row["rejected"] = row.get("chosen")
    for field in ("prompt", "chosen", "rejected"):
        text = row.get(field)
        if not isinstance(text, str) or not text.removesuffix(tokenizer.end_of_turn).strip():
            raise InputError(f"{place}: field {field!r} must be a non-empty string")
    weight = row.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= HEAVIEST:
        raise InputError(f"{place}: field 'weight' must be a number from 0 to {HEAVIEST}")
    for field in ("chosen", "rejected"):
        _check_control_tokens(row["prompt"], row[field], field, tokenizer, place)
    texts = row["prompt"], row["chosen"], row["rejected"]
    lengths = options.max_length, options.max_prompt_length
    chosen, rejected = tokenise(*texts, tokenizer, *lengths, close=not kept)
    longest = max(len(chosen.ids), len(rejected.ids))
    if longest > context:
        raise InputError(
            f"{place}: {longest} tokens exceed the model's context of {context}; "
            f"set --max-length {context} or less"
        )
    return Pair(chosen, rejected, place, kept, float(weight))


def _check_control_tokens(prompt: str, answer: str, field: str, tokenizer: Tokenizer, place: str) -> None:
    """Raise InputError when prompt and answer hold a control token besides the prompt's and one at the end.

    A prompt is chat-formatted, so its control tokens are meant. An answer is text, perhaps with its end.
    """
    token = tokenizer.joined_control_token(prompt, answer)
    if token:
        own = tokenizer.control_token_in(answer.removesuffix(tokenizer.end_of_turn))
        how = "holds" if own else "completes, after the prompt,"
        raise InputError(
            f"{place}: field {field!r} {how} the text of the control token {token!r}, which would be read as "
            "one; reword it"
        )


def tokenise(
    prompt: str,
    chosen: str,
    rejected: str,
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int,
    *,
    close: bool = True,
) -> list[Row]:
    """Both sides as TRL 0.11.4 builds them: prompt and answer tokenised together, then truncated.

    BOS is added where it is absent, and the end token if the answers are to `close`.
    """
    end = tokenizer.special[tokenizer.end_of_turn]
    prompt_ids = tokenizer.encode_prompt(prompt)
    sides = []
    for answer in (chosen, rejected):
        ids = tokenizer.encode_prompt(prompt + answer)
        start = len(commonprefix([prompt_ids, ids]))  # less than the prompt where tokens merge
        if close and ids[-1] != end:
            ids = [*ids, end]
        sides.append((ids[:start], ids[start:]))
    longest_answer = max(len(answer_ids) for _, answer_ids in sides)
    rows = []
    for before, answer_ids in sides:
        if len(before) + longest_answer > max_length:
            before = before[-max_prompt_length:]
        if len(before) + longest_answer > max_length:
            answer_ids = answer_ids[: max_length - max_prompt_length]
        rows.append(Row(before + answer_ids, len(before)))
    return rows


@dataclass(frozen=True)
class Batch:
    """B pairs in R rows of T tokens, and the N tokens whose log-probability the objectives read.

    The N tokens go side by side: first the B chosen sides, then the B rejected ones.
    """

    ids: Tensor  # (R, T)
    positions: Tensor  # (R, T)
    mask: Tensor | None  # (R, 1, Q, T): what the last Q tokens of a row see
    reads: Tensor  # (N,) the hidden state that each token is predicted from, as an index into R * T
    targets: Tensor  # (N,)
    lengths: list[int]  # (2B,) tokens read of each side; of a rejected side only the answer's
    answers: list[int]  # (2B,) how many of them belong to the answer; they come last


def collate(pairs: list[Pair], *, share: bool, device: torch.device | str = "cpu") -> Batch:
    """Pad on the right. With `share` each pair has one row (R = B), else each side (R = 2B)."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    rows, positions, slots, mask = _pair_rows(pairs, device) if share else _side_rows(sides)
    reads: list[int] = []
    targets: list[int] = []
    lengths, answers = [], []
    for number, side in enumerate(sides):
        is_chosen = number < len(pairs)
        first = 1 if is_chosen else side.first  # the NLL also reads the prompt of the chosen side
        reads += slots[number][first - 1 : len(side.ids) - 1]
        targets += side.ids[first:]
        lengths.append(len(side.ids) - first)
        answers.append(len(side.ids) - side.first)
    return Batch(
        ids=torch.tensor(rows, device=device),
        positions=torch.tensor(positions, device=device),
        mask=mask,
        reads=torch.tensor(reads, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=lengths,
        answers=answers,
    )


def _side_rows(sides: list[Row]) -> tuple[Table, Table, Table, Tensor | None]:
    """Ids and positions of each row; and for each side the slots of its tokens, indices into R * T."""
    T = max(len(side.ids) for side in sides)
    rows = [_pad(side.ids, T) for side in sides]
    positions = [list(range(T))] * len(sides)
    slots = [list(range(row * T, row * T + T)) for row in range(len(sides))]
    return rows, positions, slots, None


def _pair_rows(pairs: list[Pair], device: torch.device | str) -> tuple[Table, Table, Table, Tensor | None]:
    """The same with one row for each pair, W chosen tokens and Q rejected ones; and the mask."""
    shared = [len(commonprefix([pair.chosen.ids, pair.rejected.ids])) for pair in pairs]
    rests = [pair.rejected.ids[start:] for pair, start in zip(pairs, shared, strict=True)]
    W = max(len(pair.chosen.ids) for pair in pairs)
    Q = max(len(rest) for rest in rests)
    T = W + Q
    rows, positions, chosen_slots, rejected_slots = [], [], [], []
    for number, (pair, start, rest) in enumerate(zip(pairs, shared, rests, strict=True)):
        row = number * T  # the row's first slot
        rows.append(_pad(pair.chosen.ids, W) + _pad(rest, Q))
        positions.append([*range(W), *range(start, start + Q)])
        chosen_slots.append([*range(row, row + W)])
        rejected_slots.append([*range(row, row + start), *range(row + W, row + T)])
    slots = chosen_slots + rejected_slots
    if not Q:
        return rows, positions, slots, None
    key, query = torch.arange(T, device=device), torch.arange(Q, device=device)
    sees_shared = key < torch.tensor(shared, device=device)[:, None, None, None]
    sees_itself = (key >= W) & (key - W <= query[:, None])
    return rows, positions, slots, sees_shared | sees_itself


def _pad(ids: list[int], width: int) -> list[int]:
    return ids + [0] * (width - len(ids))


class Step(NamedTuple):
    """One step of the optimiser: its epoch, from 1, and the numbers of the pairs in each batch."""

    epoch: int
    batches: list[list[int]]


@dataclass(frozen=True)
class Order:
    """What `plan` reads of the options of a stage that has no others of this kind."""

    epochs: int
    batch_size: int
    grad_accum: int
    seed: int
    shuffle: bool = True
    group_by_length: bool = False


def plan(lengths: list[int], options: Options | Order) -> list[Step]:
    """All steps of a run over pairs of these `lengths` in tokens; every pair comes once an epoch.

    With --group-by-length, windows of WINDOW batches are cut from the epoch's order, each is sorted
    by length, and then the batches are shuffled.
    """
    rng = random.Random(options.seed)
    steps = []
    for epoch in range(1, options.epochs + 1):
        numbers = list(range(len(lengths)))
        if options.shuffle:
            numbers = rng.sample(numbers, len(numbers))
        if options.group_by_length:
            numbers = _sort_in_windows(numbers, lengths, WINDOW * options.batch_size)
        batches = _cut(numbers, options.batch_size)
        if options.group_by_length:
            rng.shuffle(batches)
        steps += [Step(epoch, some) for some in _cut(batches, options.grad_accum)]
    return steps


def _sort_in_windows(numbers: list[int], lengths: list[int], size: int) -> list[int]:
    result: list[int] = []
    for window in _cut(numbers, size):
        result += sorted(window, key=lengths.__getitem__)
    return result


def _cut(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
