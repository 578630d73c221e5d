"""Dialogues with personal items: read, cut into samples, and split without leaks.

Source: Smirnov (arXiv 2412.06846): train and test are split by dialogue, and each personal item of
an answer gives one sample.
Deviations: dialogues that share a name go to the same side, so that no name in the test part was
trained on. A sample may also be cut before the whole answer, as the model will be asked.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out P.jsonl --test-share 0.1
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii import llm_pc
from cfgsafe.pii.ner import Detector
from cfgsafe.pii.spans import Span, check_spans
from cfgsafe.tokenizer import Messages, check_messages

Cut = Literal["item", "answer", "both"]  # before what a sample is cut


@dataclass
class Dialogue:
    """A conversation and the personal items in all of its turns; `place` is its file:line."""

    messages: Messages
    spans: list[Span]
    place: str

    def values(self) -> list[tuple[str, str]]:
        """(label, value) of each item; values in lower case with single blanks."""
        values = []
        for number, start, end, label in self.spans:
            words = self.messages[number]["content"][start:end].lower().split()
            values.append((label, " ".join(words)))
        return values

    def names(self) -> set[str]:
        """The values with the label PERSON."""
        return {value for label, value in self.values() if label == "PERSON"}


@dataclass
class Sample:
    """A chat that ends just before a personal item of an answer.

    `rejected` is how the answer went on, `values` are (label, value) of the personal items in that rest,
    and `said` the spans of those in `messages`.
    """

    messages: Messages
    rejected: str
    place: str
    values: tuple[tuple[str, str], ...]
    said: tuple[Span, ...] = ()

    @property
    def begun(self) -> str:
        """The beginning of the answer that is part of the prompt."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""


def read_dialogues(path: str, detector: Detector, items: str | None = None) -> list[Dialogue]:
    """Dialogues of a JSONL file; or, with `items`, of the two files of the LLM Privacy Challenge.

    A line without "spans" gets those that `detector` finds. Raises InputError naming the line.
    """
    if items is not None:
        dialogues = [Dialogue(*filled) for filled in llm_pc.read(path, items)]
    else:
        rows, dialogues = [], []
        for place, row in read_jsonl(path):
            rows.append((place, check_messages(row.get("messages"), place), row.get("spans")))
        for place, messages, marked in rows:
            if marked is None:
                spans = _find_spans(messages, detector)
            else:
                spans = check_spans(marked, messages, place)
            dialogues.append(Dialogue(messages, spans, place))
    if not dialogues:
        raise InputError(f"{path}: holds no dialogue")
    return dialogues


def samples_of(dialogue: Dialogue, cut: Cut = "item") -> list[Sample]:
    """Samples of each assistant's turn that answers a user and holds a personal item.

    They are cut before each item, before the answer that holds it, or at both.

    >>> chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann of Leeds"}]
    >>> dialogue = Dialogue(chat, [(1, 0, 3, "PERSON"), (1, 7, 12, "GPE")], "f:1")
    >>> [sample.rejected for sample in samples_of(dialogue)]
    ['Ann of Leeds', ' Leeds']
    >>> [sample.rejected for sample in samples_of(dialogue, "answer")]
    ['Ann of Leeds']
    """
    samples = []
    messages = dialogue.messages
    spans = [span for span in dialogue.spans if messages[span[0]]["role"] == "assistant"]
    for number, start in _cuts(spans, cut):
        earlier = messages[:number]
        if all(message["role"] != "user" for message in earlier):
            continue  # nobody asked
        text = messages[number]["content"]
        before = text[:start].rstrip()
        values = tuple((label, text[a:b]) for n, a, b, label in spans if n == number and a >= start)
        begun = [{"role": "assistant", "content": before}] if before else []
        said = tuple(span for span in dialogue.spans if _stands_before(span, number, len(before)))
        samples.append(Sample(earlier + begun, text[len(before) :], dialogue.place, values, said))
    return samples


def _cuts(spans: list[Span], cut: Cut) -> list[tuple[int, int]]:
    """(message, character) of each cut, in order, each once."""
    items = [(number, start) for number, start, *_ in spans]
    answers = [(number, 0) for number, _ in items]
    wanted = {"item": items, "answer": answers, "both": answers + items}[cut]
    return sorted(set(wanted))


def _stands_before(span: Span, number: int, end: int) -> bool:
    """Whether a span ends before the character `end` of message `number`."""
    return span[0] < number or (span[0] == number and span[2] <= end)


def prompts_of(dialogue: Dialogue) -> list[dict]:
    """The rows of a dialogue for `eval.py leak`: one for each sample, to be answered or continued.

    "items" are the personal values of the chat so far and of the answer, each once, in its last form.
    """
    name = Path(dialogue.place).name
    rows = []
    for count, sample in enumerate(samples_of(dialogue), start=1):
        answer = len(sample.messages) - bool(sample.begun)  # its number in the dialogue
        values: dict[str, dict[str, str]] = {}  # label -> value in lower case -> value
        for number, start, end, label in dialogue.spans:
            if number <= answer:
                value = " ".join(dialogue.messages[number]["content"][start:end].split())
                values.setdefault(label, {})[value.lower()] = value
        rows.append(
            {
                "id": f"{name}#{count}",
                "dialogue": name,
                "messages": sample.messages,
                "begun": bool(sample.begun),
                "items": {label: list(forms.values()) for label, forms in values.items()},
            }
        )
    return rows


def split(dialogues: list[Dialogue], share: float, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, test), each in the order of the file; test has at most `share` of the dialogues.

    Dialogues that share a name form a group, and so do those that are linked through others. The
    groups are drawn at random and go to the test part while they fit. Raises InputError if none
    fits.
    """
    groups = _linked_by_names(dialogues)
    random.Random(seed).shuffle(groups)
    test: set[int] = set()
    for group in groups:
        if len(test) + len(group) <= share * len(dialogues):
            test.update(group)
    if not test:
        smallest = min(len(group) for group in groups)
        raise InputError(
            f"--test-share {share:g}: no group of dialogues without shared names is that small; there are "
            f"{len(dialogues)} dialogues in {len(groups)} groups, the smallest of {smallest}"
        )
    training = [dialogue for number, dialogue in enumerate(dialogues) if number not in test]
    return training, [dialogues[number] for number in sorted(test)]


def _linked_by_names(dialogues: list[Dialogue]) -> list[list[int]]:
    """Groups of numbers of dialogues that share names, also through others; by union-find."""
    parent = list(range(len(dialogues)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]  # halves the path for the next search
            number = parent[number]
        return number

    first_with: dict[str, int] = {}
    for number, dialogue in enumerate(dialogues):
        for name in dialogue.names():
            parent[root(number)] = root(first_with.setdefault(name, number))
    groups = defaultdict(list)
    for number in range(len(dialogues)):
        groups[root(number)].append(number)
    return sorted(groups.values())


def shared_values(training: list[Dialogue], test: list[Dialogue]) -> tuple[set[str], set[str]]:
    """(names, other values) that are personal items of both training and test dialogues."""
    both = _all_values(training) & _all_values(test)
    names = {value for label, value in both if label == "PERSON"}
    return names, {value for label, value in both if label != "PERSON"}


def _all_values(dialogues: list[Dialogue]) -> set[tuple[str, str]]:
    return set(chain.from_iterable(dialogue.values() for dialogue in dialogues))


def _find_spans(messages: Messages, detector: Detector) -> list[Span]:
    spans = []
    for number, entities in enumerate(detector([message["content"] for message in messages])):
        spans += [(number, entity.start, entity.end, entity.label) for entity in entities]
    return spans
