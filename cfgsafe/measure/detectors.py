"""How well a detector finds personal data: precision and recall on texts with known gold spans.

Source: Smirnov (arXiv 2412.06846) relies on the NER without measuring it. This command shows what a
detector misses, for everyone who counts with it. Two spans match *exactly* if they cover the same
characters, and by *overlap* if they share a character. Labels are not compared, because each
detector has its own.

Gold JSONL: {"messages": [...], "spans": [[message, start, end, label], ...]} per line, with every
personal value marked; `train.py dialogues --split gold` writes more of them. Or facts, as
cfgsafe/pii/facts.py describes them: the gold spans are then where "subject" and the values of "subject_pii"
stand in question and answer, and what such a file does not list counts against precision.

Run it: python eval.py detectors --ner cfgsafe/demo/ner
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cfgsafe.errors import InputError, Unused
from cfgsafe.files import read_jsonl
from cfgsafe.hub import GOLD
from cfgsafe.measure.intervals import Clusters, Estimate, share_interval, to_json
from cfgsafe.pii.entities import Entity, merge
from cfgsafe.pii.facts import LABEL, of_row
from cfgsafe.pii.matching import places
from cfgsafe.pii.ner import Detector, is_single
from cfgsafe.pii.spans import check_spans
from cfgsafe.tokenizer import check_messages

Gold = list[tuple[int, int, str]]  # start, end, label
Extent = tuple[int, int]  # start, end
Match = Callable[[Extent, Extent], bool]


@dataclass
class Options:
    """Measure precision and recall of a detector on texts with gold spans."""

    ner: str | None = None
    """Detectors, separated by commas: spaCy pipelines, presidio or structured. By default en_core_web_trf, or
    the demo's."""
    combine: Literal["union", "vote"] = "union"
    """With several detectors: union keeps what any of them finds, vote what more than half find."""
    gold: str = GOLD
    """JSONL of dialogues with spans for every personal value, or of facts; default: the demo's test set."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if is_single(self.ner):
            yield "with one detector", "combine"


def run(options: Options) -> None:
    texts = read_gold(options.gold)
    detector = Detector(options.ner, options.combine)
    found = detector([text for text, _, _ in texts])
    figures = score(found, [gold for _, gold, _ in texts], [place for _, _, place in texts])
    line = {"texts": len(texts), "ner": detector.name, "combine": options.combine}
    print(json.dumps({**line, **to_json(figures)}))


def read_gold(path: str) -> list[tuple[str, Gold, str]]:
    """(text, gold spans, place of its dialogue) of every message, or question and answer of a fact; the
    facts of a person are one dialogue. Raises InputError naming line and field.
    """
    texts = []
    for place, row in read_jsonl(path):
        if "question" in row:
            texts += _gold_of_fact(row, place)
            continue
        messages = check_messages(row.get("messages"), place)
        spans = check_spans(row.get("spans"), messages, place)
        gold: list[Gold] = [[] for _ in messages]
        for number, start, end, label in spans:
            gold[number].append((start, end, label))
        for message, marked in zip(messages, gold, strict=True):
            texts.append((message["content"], marked, place))
    if not texts:
        raise InputError(f"{path}: holds no dialogue")
    return texts


def _gold_of_fact(row: dict, place: str) -> list[tuple[str, Gold, str]]:
    """Question and answer, with the places of the person's name, also in part, and of the listed values."""
    (fact,) = of_row(row, place)
    listed = row.get("subject_pii") or []
    values = [("PERSON", fact.name)] if fact.name else []
    values += [(LABEL, value) for value in ([listed] if isinstance(listed, str) else listed)]
    texts = []
    for text in (fact.question, fact.answer):
        finds = []
        for label, value in values:
            finds += [Entity(start, end, label, value) for start, end in places(text, label, value)]
        gold = [(entity.start, entity.end, entity.label) for entity in merge(text, [finds])]
        texts.append((text, gold, fact.person))
    return texts


def score(
    found: list[list[Entity]], gold: list[Gold], dialogues: Clusters = None
) -> dict[str, Estimate | None]:
    """Precision and recall in percent, exact and by overlap; and recall by overlap of each label.

    found[i] and gold[i] belong to text i; texts of one dialogue are a cluster. Precision is None where
    nothing was found.
    """
    finds: list[list[Extent]] = []
    spans: list[list[Extent]] = []
    labels: set[str] = set()
    for entities, marked in zip(found, gold, strict=True):
        finds.append([(entity.start, entity.end) for entity in entities])
        spans.append([(start, end) for start, end, _ in marked])
        labels.update(label for _, _, label in marked)
    figures: dict[str, Estimate | None] = {}
    for name, match in (("exact", _same), ("overlap", _overlap)):
        figures[f"precision_{name}"] = matched(finds, spans, match, dialogues)
        figures[f"recall_{name}"] = matched(spans, finds, match, dialogues)
    for label in sorted(labels):
        of_label: list[list[Extent]] = []
        for marked in gold:
            of_label.append([(start, end) for start, end, kind in marked if kind == label])
        figures[f"recall_{label}"] = matched(of_label, finds, _overlap, dialogues)
    return figures


def matched(
    spans: list[list[Extent]], others: list[list[Extent]], match: Match, dialogues: Clusters = None
) -> Estimate | None:
    """Percentage of `spans` that match one of `others` in the same text; None without spans."""
    hits, totals = [], []
    for ours, theirs in zip(spans, others, strict=True):
        hit = 0
        for span in ours:
            hit += any(match(span, other) for other in theirs)
        hits.append(hit)
        totals.append(len(ours))
    return share_interval(hits, totals, dialogues)


def _same(one: Extent, other: Extent) -> bool:
    return one == other


def _overlap(one: Extent, other: Extent) -> bool:
    return one[0] < other[1] and other[0] < one[1]
