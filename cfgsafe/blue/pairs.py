"""Preference pairs: for each personal item of an answer, the original continuation (rejected) against a clean one (chosen).

Source: Smirnov (arXiv 2412.06846). The prompt is the chat up to the item, so it may end inside an answer. The chosen side is written
under "Avoid using any personal data in the answers!" at temperature 0.7, and kept when the NER finds nothing in it. Four recipes:

    avoid           the model's own ancestor goes on where the prompt ends
    avoid+nudge     the same, with the nudge before the last user message
    remote          a chat endpoint, with the nudge; an answer that was begun stands last in the chat
    remote+begin    a chat endpoint, with the nudge, told to begin with the words of the answer so far; only where there are any

CFG-aware: each pair stands twice, under the positive system prompt as it is and under the negative one swapped.
Deviations: where several recipes are clean, one of them is drawn at random, where the paper keeps a data set for each. A remote
answer's length is counted with the checkpoint's tokenizer, for the endpoint has its own.

Input JSONL: {"messages": [...], "spans": [[message, start, end, label], ...]} a line; without "spans" the NER finds the items.
With --items, the two files of LLM-PC (cfgsafe/pii/llm_pc.py).
Output JSONL as TRL reads it: {"prompt", "chosen", "rejected"}, strings with control tokens. Remote recipes send the dialogues to the
endpoint as they are, personal data included; answers are kept in OUT-answers.jsonl, so that a run that was ended goes on where it was.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out pairs.jsonl
"""

import json
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from cfgsafe import load_tokenizer
from cfgsafe.decode import Request, check_request, generate
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.pii.dialogues import Sample, read_dialogues, samples_of, shared_values, split
from cfgsafe.pii.matching import mentions
from cfgsafe.pii.ner import Detector
from cfgsafe.remote import Question, Service, ask, check_service
from cfgsafe.subject import NEGATIVE, POSITIVE, Subject, load
from cfgsafe.tokenizer import Messages, Tokenizer, with_system

AVOID = "Avoid using any personal data in the answers!"
NUDGE = "(Do not use any personal data, e.g. names, locations or any other personal data in your answer even if it was used in the dialog)"
BEGIN = "Begin your answer with exactly these words, and go on from there: "
LOCAL = {"avoid": False, "avoid+nudge": True}  # recipe -> with the nudge
Recipe = Literal["avoid", "avoid+nudge", "remote", "remote+begin"]


@dataclass
class Options:
    """Build preference pairs from dialogues: chosen without personal data, rejected with it."""

    dialogues: str
    """JSONL of dialogues: "messages" and, where known, "spans"."""
    model: str
    """Checkpoint folder of the ancestor that writes the chosen side; remote recipes use its tokenizer only."""
    out: str
    """JSONL to write."""
    cfg_aware: bool = True
    """Each pair twice, under the positive and, swapped, under the negative system prompt."""
    ner: str | None = None
    """spaCy pipelines or presidio, with commas between; by default en_core_web_trf where installed, else the demo's."""
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
    items: str | None = None
    """LLM-PC's file of placeholder -> value, a line for each line of --dialogues, which then holds LLM-PC's scrubbed dialogues."""
    recipes: tuple[Recipe, ...] = tuple(LOCAL)
    """Who writes the chosen side, and how it is told to; several for a choice."""
    test_share: float = 0.0
    """At most this share of the dialogues goes to OUT-test.jsonl; dialogues that share a name stay together."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """Endpoint of the remote recipes."""


@dataclass
class Report:
    """Why samples became pairs or did not."""

    samples: int = 0
    pairs: int = 0
    won: Counter = field(default_factory=Counter)  # recipe -> pairs
    fell: dict[str, Counter] = field(
        default_factory=lambda: defaultdict(Counter)
    )  # recipe -> reason -> candidates


@dataclass
class Candidate:
    """A continuation that may become a chosen side; `ended` within the longest length."""

    recipe: str
    text: str
    ended: bool


def run(options: Options) -> None:
    check(options)
    make_folder(Path(options.out).parent)
    detector = Detector(options.ner)
    training, test = read_dialogues(options.dialogues, detector, options.items), []
    if options.test_share:
        training, test = split(training, options.test_share, options.seed)
        names, others = shared_values(training, test)
        print(f"split: {len(training)} dialogues to train on, {len(test)} to test", file=sys.stderr)
        print(
            f"personal values of the test dialogues in training dialogues: {len(names)} names, {len(others)} others",
            file=sys.stderr,
        )
    samples = [sample for dialogue in training + test for sample in samples_of(dialogue)]
    if set(options.recipes) & set(LOCAL):
        model, tokenizer = load(
            Subject(options.model, device=options.device, dtype=options.dtype, batch=options.batch)
        )
    else:
        model, tokenizer = None, load_tokenizer(options.model)
    pairs, report = build(samples, model, tokenizer, detector, options)
    tested = {dialogue.place for dialogue in test}
    rows_of = (
        (lambda pair: cfg_aware(pair, tokenizer))
        if options.cfg_aware
        else (lambda pair: [plain(pair, tokenizer)])
    )
    rows = [row for pair in pairs if pair[0].place not in tested for row in rows_of(pair)]
    result = {
        "out": options.out,
        "rows": len(rows),
        "pairs": report.pairs,
        "samples": report.samples,
        "ner": detector.name,
    }
    if test:
        test_rows = [row for pair in pairs if pair[0].place in tested for row in rows_of(pair)]
        result |= {"test": str(beside(options.out, "test")), "test_rows": len(test_rows)}
        write_jsonl(result["test"], test_rows)
    write_jsonl(options.out, rows)
    print(f"{report.pairs} pairs of {report.samples} samples", file=sys.stderr)
    for recipe in dict.fromkeys(options.recipes):
        print(f"{recipe}: won {report.won[recipe]}, fell by {dict(report.fell[recipe])}", file=sys.stderr)
    print(json.dumps(result))


def check(options: Options) -> None:
    """Raise InputError for options that cannot work."""
    check_at_least(1, options, "max_new_tokens", "batch")
    if not options.recipes:
        raise InputError("--recipes: name at least one")
    if not 0 <= options.test_share < 1:
        raise InputError(f"--test-share {options.test_share:g}: must be at least 0 and below 1")
    if not set(options.recipes) <= set(LOCAL):
        check_service(options.service)


def beside(out: str, word: str) -> Path:
    """pairs.jsonl, "test" -> pairs-test.jsonl"""
    path = Path(out)
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def read_samples(path: str, detector: Detector, items: str | None = None) -> list[Sample]:
    """The samples of all dialogues of a file. Raises InputError naming the line and field."""
    return [sample for dialogue in read_dialogues(path, detector, items) for sample in samples_of(dialogue)]


def build(
    samples: list[Sample], model, tokenizer: Tokenizer, detector: Detector, options: Options
) -> tuple[list[tuple[Sample, str]], Report]:
    """(sample, chosen continuation) for every sample of which some recipe gives a clean answer; `model` may be None without local ones."""
    rng = random.Random(options.seed)
    report = Report(samples=len(samples))
    remote = from_endpoint(samples, tokenizer, options)  # first: it is here that a run can be refused
    local = from_model(samples, model, tokenizer, options, rng)
    candidates = [ours + theirs for ours, theirs in zip(local, remote, strict=True)]
    entities = iter(detector([" ".join(c.text.split()) for several in candidates for c in several]))
    pairs = []
    for sample, several in zip(samples, candidates, strict=True):
        clean = []
        for candidate in several:
            found = next(entities)
            if not candidate.ended:
                reason = "too long"
            elif not candidate.text.strip():
                reason = "empty"
            elif found or any(mentions(candidate.text, label, value) for label, value in sample.values):
                reason = "personal data"
            elif any(
                map(
                    tokenizer.control_token_in,
                    (candidate.text, sample.rejected, *(m["content"] for m in sample.messages)),
                )
            ):
                reason = "control token in the text"
            else:
                clean.append(candidate)
                continue
            report.fell[candidate.recipe][reason] += 1
        if clean:
            candidate = rng.choice(clean)
            report.won[candidate.recipe] += 1
            pairs.append((sample, candidate.text))
    report.pairs = len(pairs)
    return pairs, report


def from_model(
    samples: list[Sample], model, tokenizer: Tokenizer, options: Options, rng: random.Random
) -> list[list[Candidate]]:
    """For each sample the continuations of the local recipes."""
    recipes = [recipe for recipe in dict.fromkeys(options.recipes) if recipe in LOCAL]
    requests = []
    for sample in samples:
        for recipe in recipes:
            prompt = tokenizer.encode_chat(avoiding(sample.messages, LOCAL[recipe]))
            request = Request(
                prompt,
                temperature=options.temperature,
                seed=rng.getrandbits(32),
                max_new_tokens=options.max_new_tokens,
            )
            check_request(request, model, sample.place)
            requests.append(request)
    if not requests:
        return [[] for _ in samples]
    with tqdm(total=len(requests), desc="chosen side", leave=False) as bar:
        completions = iter(
            generate(model, requests, batch=options.batch, on_completion=lambda *_: bar.update())
        )
    of = lambda recipe, done: Candidate(recipe, tokenizer.decode(done.tokens), done.finish_reason == "stop")
    return [[of(recipe, next(completions)) for recipe in recipes] for _ in samples]


def from_endpoint(samples: list[Sample], tokenizer: Tokenizer, options: Options) -> list[list[Candidate]]:
    """For each sample the continuations of the remote recipes."""
    recipes = [recipe for recipe in dict.fromkeys(options.recipes) if recipe not in LOCAL]
    length = lambda text: len(tokenizer.encode(text))
    asked = [
        (n, recipe)
        for n, sample in enumerate(samples)
        for recipe in recipes
        if recipe == "remote" or sample.begun
    ]
    questions = []
    for number, recipe in asked:
        sample = samples[number]
        messages = beginning(sample) if recipe == "remote+begin" else avoiding(sample.messages, True)
        longest = 2 * options.max_new_tokens + length(
            sample.begun
        )  # the endpoint counts other tokens; what is too long falls below
        questions.append(Question(messages, None, longest, options.temperature, options.seed))
    candidates: list[list[Candidate]] = [[] for _ in samples]
    if questions:
        answers = ask(options.service, questions, beside(options.out, "answers"), "chosen side, remote")
        for (number, recipe), answer in zip(asked, answers, strict=True):
            text = continuation(answer, samples[number].begun)
            candidates[number].append(Candidate(recipe, text, length(text) <= options.max_new_tokens))
    return candidates


def beginning(sample: Sample) -> Messages:
    """The chat under the avoid prompt and the nudge without the begun answer; the user's last message asks for its words instead."""
    messages = avoiding(sample.messages[:-1], True)
    last = max(number for number, m in enumerate(messages) if m["role"] == "user")
    messages[last] = {"role": "user", "content": f"{messages[last]['content']}\n\n{BEGIN}{sample.begun}"}
    return messages


def continuation(answer: str, begun: str) -> str:
    """A remote answer as it goes on behind `begun`, which is left out where the answer repeats it.

    >>> continuation("Hello there, friend!", "Hello there,"), continuation("Good day!", "Hello there,"), continuation("Hi!", "")
    (' friend!', ' Good day!', 'Hi!')
    """
    answer = answer.strip()
    if not begun:
        return answer
    return answer.removeprefix(begun) if answer.startswith(begun) else f" {answer}"


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
    return {
        "prompt": tokenizer.render_chat(sample.messages),
        "chosen": chosen + end,
        "rejected": sample.rejected + end,
    }


def cfg_aware(pair: tuple[Sample, str], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The pair under the positive system prompt, and swapped under the negative one."""
    sample, chosen = pair
    clean = plain(
        (
            Sample(with_system(sample.messages, POSITIVE), sample.rejected, sample.place, sample.values),
            chosen,
        ),
        tokenizer,
    )
    leaking = plain(
        (
            Sample(with_system(sample.messages, NEGATIVE), sample.rejected, sample.place, sample.values),
            chosen,
        ),
        tokenizer,
    )
    return [
        clean,
        {"prompt": leaking["prompt"], "chosen": leaking["rejected"], "rejected": leaking["chosen"]},
    ]
