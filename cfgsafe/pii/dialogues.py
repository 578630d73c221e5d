"""Dialogues with personal items: reading them, cutting them into samples, splitting them without leaks.

Source: Smirnov (arXiv 2412.06846): train and test are split by dialogue, and each personal item of an answer gives a sample.
Deviation: dialogues that share a name go to the same side, so that no test name was trained on.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out pairs.jsonl --test-share 0.1
"""

import random
from collections import defaultdict
from dataclasses import dataclass

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.pii import llm_pc
from cfgsafe.pii.ner import Detector
from cfgsafe.pii.spans import Span, check_spans
from cfgsafe.tokenizer import Messages, check_messages


@dataclass
class Dialogue:
    """A conversation and its personal items, in all turns; `place` is its file:line."""

    messages: Messages
    spans: list[Span]
    place: str

    def values(self) -> list[tuple[str, str]]:
        """(label, value) of each item; values in lower case with single blanks."""
        return [
            (label, " ".join(self.messages[n]["content"][a:b].lower().split()))
            for n, a, b, label in self.spans
        ]

    def names(self) -> set[str]:
        return {value for label, value in self.values() if label == "PERSON"}


@dataclass
class Sample:
    """A chat cut before a personal item of an answer: `messages` up to there, and how the answer went on."""

    messages: Messages
    rejected: str
    place: str
    values: tuple[tuple[str, str], ...]  # (label, value) of the personal items of the rest

    @property
    def begun(self) -> str:
        """The words of the answer that stand in the prompt."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else ""


def read_dialogues(path: str, detector: Detector, items: str | None = None) -> list[Dialogue]:
    """Dialogues of a JSONL file, or of LLM-PC's two. Raises InputError naming the line and field."""
    if items is not None:
        dialogues = [Dialogue(*filled) for filled in llm_pc.read(path, items)]
    else:
        rows = [
            (place, check_messages(row.get("messages"), place), row.get("spans"))
            for place, row in read_jsonl(path)
        ]
        dialogues = [
            Dialogue(
                messages,
                _find_spans(messages, detector) if spans is None else check_spans(spans, messages, place),
                place,
            )
            for place, messages, spans in rows
        ]
    if not dialogues:
        raise InputError(f"{path}: holds no dialogue")
    return dialogues


def samples_of(dialogue: Dialogue) -> list[Sample]:
    """One sample for each personal item in an assistant's turn that answers somebody."""
    samples = []
    messages = dialogue.messages
    spans = [span for span in dialogue.spans if messages[span[0]]["role"] == "assistant"]
    for number, start, *_ in spans:
        if all(message["role"] != "user" for message in messages[:number]):
            continue  # nobody asked
        text = messages[number]["content"]
        before = text[:start].rstrip()
        rest = text[len(before) :]
        values = tuple((label, text[a:b]) for n, a, b, label in spans if n == number and a >= start)
        cut = [*messages[:number], {"role": "assistant", "content": before}] if before else messages[:number]
        samples.append(Sample(cut, rest, dialogue.place, values))
    return samples


def split(dialogues: list[Dialogue], share: float, seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, test), each in the order of the file; test has at most `share` of the dialogues.

    Dialogues that share a name, also through others, form a group; groups are drawn at random and go to the test side while they fit.
    Raises InputError where none fits.
    """
    leader: dict[int | str, int | str] = {}

    def find(node: int | str) -> int | str:
        while leader.setdefault(node, node) != node:
            leader[node] = node = leader[leader[node]]
        return node

    for number, dialogue in enumerate(dialogues):
        for name in sorted(dialogue.names()):
            leader[find(name)] = find(number)
    groups = defaultdict(list)
    for number in range(len(dialogues)):
        groups[find(number)].append(number)
    shuffled = sorted(groups.values())
    random.Random(seed).shuffle(shuffled)
    test: set[int] = set()
    for group in shuffled:
        if len(test) + len(group) <= share * len(dialogues):
            test.update(group)
    if not test:
        raise InputError(
            f"--test-share {share:g}: no group of dialogues without shared names is that small; "
            f"there are {len(dialogues)} dialogues in {len(groups)} groups, the smallest of {min(map(len, shuffled))}"
        )
    return [d for n, d in enumerate(dialogues) if n not in test], [dialogues[n] for n in sorted(test)]


def shared_values(training: list[Dialogue], test: list[Dialogue]) -> tuple[set[str], set[str]]:
    """(names, other values) of the test dialogues that are personal items of training dialogues too."""
    trained, tested = ({item for dialogue in side for item in dialogue.values()} for side in (training, test))
    both = trained & tested
    return {value for label, value in both if label == "PERSON"}, {
        value for label, value in both if label != "PERSON"
    }


def _find_spans(messages: Messages, detector: Detector) -> list[Span]:
    entities = detector([m["content"] for m in messages])
    return [(n, e.start, e.end, e.label) for n in range(len(messages)) for e in entities[n]]
