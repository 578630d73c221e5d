"""How well a detector finds personal data: precision and recall on texts whose gold spans are known.

Source: Smirnov (arXiv 2412.06846) trusts the NER unmeasured; here whoever counts with a detector can know what it misses.
A find is right *exactly* when it covers a gold span character by character, and by *overlap* when it shares a character with one; labels
are not compared, since each detector has its own.

Gold JSONL: {"messages": [...], "spans": [[message, start, end, label], ...]} a line, every personal value marked;
`train.py dialogues --split gold` writes more of them.

Run it: python eval.py detectors --ner cfgsafe/demo/ner
"""

import json
from dataclasses import dataclass
from typing import Literal

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.hub import GOLD
from cfgsafe.measure.intervals import Estimate, ratio_interval, to_json
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.ner import Detector
from cfgsafe.pii.spans import check_spans
from cfgsafe.tokenizer import check_messages

Gold = list[tuple[int, int, str]]  # start, end, label


@dataclass
class Options:
    """Measure precision and recall of a detector on texts with gold spans."""

    ner: str | None = None
    """spaCy pipelines or presidio, with commas between; by default en_core_web_trf where installed, else the demo's."""
    combine: Literal["union", "vote"] = "union"
    """Of several detectors: what any of them finds, or what more than half of them do."""
    gold: str = GOLD
    """JSONL of dialogues with spans, every personal value marked; by default the demo's, about people its NER was not trained on."""


def run(options: Options) -> None:
    texts = read_gold(options.gold)
    detector = Detector(options.ner, options.combine)
    figures = score(detector([text for text, _ in texts]), [gold for _, gold in texts])
    print(
        json.dumps(
            {"texts": len(texts), "ner": detector.name, "combine": options.combine, **to_json(figures)}
        )
    )


def read_gold(path: str) -> list[tuple[str, Gold]]:
    """(text, gold spans) of every message. Raises InputError naming line and field."""
    texts = []
    for place, row in read_jsonl(path):
        messages = check_messages(row.get("messages"), place)
        spans = check_spans(row.get("spans"), messages, place)
        texts += [
            (m["content"], [span[1:] for span in spans if span[0] == number])
            for number, m in enumerate(messages)
        ]
    if not texts:
        raise InputError(f"{path}: holds no dialogue")
    return texts


def score(found: list[list[Entity]], gold: list[Gold]) -> dict[str, Estimate]:
    """Percent, over all texts: precision and recall, exact and by overlap; recall by overlap of each gold label."""
    same = lambda find, span: (find.start, find.end) == span[:2]
    meets = lambda find, span: find.start < span[1] and span[0] < find.end
    texts = list(zip(found, gold, strict=True))
    figures = {}
    for name, fits in (("exact", same), ("overlap", meets)):
        right = [
            100 * sum(any(fits(find, span) for span in spans) for find in finds) for finds, spans in texts
        ]
        hit = [100 * sum(any(fits(find, span) for find in finds) for span in spans) for finds, spans in texts]
        figures[f"precision_{name}"] = ratio_interval(right, [len(finds) for finds, _ in texts])
        figures[f"recall_{name}"] = ratio_interval(hit, [len(spans) for _, spans in texts])
    for label in sorted({span[2] for spans in gold for span in spans}):
        hit = [
            100 * sum(s[2] == label and any(meets(find, s) for find in finds) for s in spans)
            for finds, spans in texts
        ]
        figures[f"recall_{label}"] = ratio_interval(
            hit, [sum(s[2] == label for s in spans) for _, spans in texts]
        )
    return figures
