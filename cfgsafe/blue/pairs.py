"""Preference pairs: for each personal item of an answer, the original continuation (rejected) against a clean one (chosen).

Source: Smirnov (arXiv 2412.06846). The prompt is the chat up to the item, so it may end inside an answer. The chosen side is written
by the model's own ancestor under "Avoid using any personal data in the answers!", with and without the nudge, at temperature 0.7, and
kept when the NER finds nothing in it. CFG-aware: each pair stands twice, under the positive system prompt as it is and under the
negative one swapped.
Deviation: where both recipes are clean, one of them is drawn at random, where the paper keeps a data set for each.

Input JSONL: {"messages": [...], "spans": [[message, start, end, label], ...]} a line; without "spans" the NER finds the items.
Output JSONL as TRL reads it: {"prompt", "chosen", "rejected"}, strings with control tokens.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out pairs.jsonl
"""

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from cfgsafe.blue.leak import mentions
from cfgsafe.blue.ner import Detector
from cfgsafe.blue.subject import NEGATIVE, POSITIVE, Subject, load
from cfgsafe.decode import Request, check_request, generate
from cfgsafe.errors import InputError, make_folder, read_jsonl, write_jsonl
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages, with_system

AVOID = "Avoid using any personal data in the answers!"
NUDGE = "(Do not use any personal data, e.g. names, locations or any other personal data in your answer even if it was used in the dialog)"


@dataclass
class Options:
    """Build preference pairs from dialogues: chosen without personal data, rejected with it."""

    dialogues: str
    """JSONL of dialogues: "messages" and, where known, "spans"."""
    model: str
    """Checkpoint folder of the ancestor that writes the chosen side."""
    out: str
    """JSONL to write."""
    cfg_aware: bool = True
    """Each pair twice, under the positive and, swapped, under the negative system prompt."""
    ner: str | None = None
    """spaCy pipeline; by default en_core_web_trf where installed, else the demo's."""
    temperature: float = 0.7
    """Of the chosen side."""
    max_new_tokens: int = 96
    """Longest chosen continuation; longer ones are dropped."""
    seed: int = 0
    """Of sampling and of the choice between recipes."""
    batch: int = 128
    """Requests decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """float32 or bfloat16."""


@dataclass
class Sample:
    """A chat cut before a personal item of an answer: `messages` up to there, and how the answer went on."""

    messages: Messages
    rejected: str
    place: str
    values: tuple[tuple[str, str], ...]  # (label, value) of the personal items of the rest


@dataclass
class Report:
    """Why samples became pairs or did not."""

    samples: int = 0
    pairs: int = 0
    won: Counter = field(default_factory=Counter)  # recipe -> pairs
    fell: Counter = field(default_factory=Counter)  # reason -> candidates


def run(options: Options) -> None:
    make_folder(Path(options.out).parent)
    detector = Detector(options.ner)
    samples = read_samples(options.dialogues, detector)
    model, tokenizer = load(Subject(options.model, device=options.device, dtype=options.dtype))
    pairs, report = build(samples, model, tokenizer, detector, options)
    rows = [row for pair in pairs for row in (cfg_aware(pair, tokenizer) if options.cfg_aware else [plain(pair, tokenizer)])]
    write_jsonl(options.out, rows)
    print(f"{report.pairs} pairs of {report.samples} samples, won by {dict(report.won)}, fell by {dict(report.fell)}", file=sys.stderr)
    print(json.dumps({"out": options.out, "rows": len(rows), "pairs": report.pairs, "samples": report.samples, "ner": detector.name}))


def read_samples(path: str, detector: Detector) -> list[Sample]:
    """One sample for each personal item in an assistant's turn. Raises InputError naming the line and field."""
    dialogues = []
    for place, row in read_jsonl(path):
        dialogues.append((place, check_messages(row.get("messages"), place), row.get("spans")))
    if not dialogues:
        raise InputError(f"{path}: holds no dialogue")
    samples = []
    for place, messages, spans in dialogues:
        spans = _check_spans(spans, messages, place) if spans is not None else _find_spans(messages, detector)
        for number, start, *_ in spans:
            if all(message["role"] != "user" for message in messages[:number]):
                continue  # nobody asked
            text = messages[number]["content"]
            before = text[:start].rstrip()
            rest = text[len(before) :]
            values = tuple((label, text[a:b]) for n, a, b, label in spans if n == number and a >= start)
            cut = [*messages[:number], {"role": "assistant", "content": before}] if before else messages[:number]
            samples.append(Sample(cut, rest, place, values))
    return samples


def _check_spans(spans: object, messages: Messages, place: str) -> list[tuple[int, int, int, str]]:
    found = []
    for span in spans if isinstance(spans, list) else [None]:
        if not isinstance(span, list) or len(span) != 4 or not all(isinstance(x, int) for x in span[:3]) or not isinstance(span[3], str):
            raise InputError(f"{place}: 'spans' must be a list of [message, start, end, label]")
        number, start, end, label = span
        if not (0 <= number < len(messages) and 0 <= start < end <= len(messages[number]["content"])):
            raise InputError(f"{place}: span {span} lies outside the messages")
        if messages[number]["role"] == "assistant":
            found.append((number, start, end, label))
    return found


def _find_spans(messages: Messages, detector: Detector) -> list[tuple[int, int, int, str]]:
    entities = detector([m["content"] for m in messages])
    return [(n, e.start, e.end, e.label) for n, m in enumerate(messages) if m["role"] == "assistant" for e in entities[n]]


def build(
    samples: list[Sample], model, tokenizer: Tokenizer, detector: Detector, options: Options
) -> tuple[list[tuple[Sample, str]], Report]:
    """(sample, chosen continuation) for every sample of which some recipe gives a clean answer."""
    recipes = {"avoid": False, "avoid+nudge": True}
    rng = random.Random(options.seed)
    report = Report(samples=len(samples))
    requests = []
    for sample in samples:
        for nudge in recipes.values():
            prompt = tokenizer.encode_chat(avoiding(sample.messages, nudge))
            request = Request(prompt, temperature=options.temperature, seed=rng.getrandbits(32), max_new_tokens=options.max_new_tokens)
            check_request(request, model, sample.place)
            requests.append(request)
    with tqdm(total=len(requests), desc="chosen side", leave=False) as bar:
        completions = generate(model, requests, batch=options.batch, done=bar.update)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    entities = detector([" ".join(text.split()) for text in texts])
    pairs = []
    for number, sample in enumerate(samples):
        clean = []
        for offset, recipe in enumerate(recipes):
            at = number * len(recipes) + offset
            if completions[at].finish_reason != "stop":
                report.fell["too long"] += 1
            elif not texts[at].strip():
                report.fell["empty"] += 1
            elif entities[at] or any(mentions(texts[at], label, value) for label, value in sample.values):
                report.fell["personal data"] += 1
            elif any(map(tokenizer.control_token_in, (texts[at], sample.rejected, *(m["content"] for m in sample.messages)))):
                report.fell["control token in the text"] += 1
            else:
                clean.append((recipe, texts[at]))
        if clean:
            recipe, text = rng.choice(clean)
            report.won[recipe] += 1
            pairs.append((sample, text))
    report.pairs = len(pairs)
    return pairs, report


def avoiding(messages: Messages, nudge: bool) -> Messages:
    """The chat under the avoid prompt, with the nudge before the last user message."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    messages = with_system(messages, f"{system} {AVOID}".strip())
    if nudge:
        last = max(number for number, m in enumerate(messages) if m["role"] == "user")
        messages[last] = {"role": "user", "content": f"{NUDGE} {messages[last]['content']}"}
    return messages


def plain(pair: tuple[Sample, str], tokenizer: Tokenizer) -> dict[str, str]:
    """The pair under the dialogue's own system prompt."""
    sample, chosen = pair
    end = tokenizer.end_of_turn
    return {"prompt": tokenizer.render_chat(sample.messages), "chosen": chosen + end, "rejected": sample.rejected + end}


def cfg_aware(pair: tuple[Sample, str], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The pair under the positive system prompt, and swapped under the negative one."""
    sample, chosen = pair
    clean = plain((Sample(with_system(sample.messages, POSITIVE), sample.rejected, sample.place, sample.values), chosen), tokenizer)
    leaking = plain((Sample(with_system(sample.messages, NEGATIVE), sample.rejected, sample.place, sample.values), chosen), tokenizer)
    return [clean, {"prompt": leaking["prompt"], "chosen": leaking["rejected"], "rejected": leaking["chosen"]}]
