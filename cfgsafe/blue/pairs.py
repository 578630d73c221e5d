"""Preference pairs: for each personal item, a clean continuation (chosen) and the original (rejected).

Source: Smirnov (arXiv 2412.06846). The prompt is the chat up to the item, so it may end inside an
answer. The chosen side is written at temperature 0.7 under "Avoid using any personal data in the
answers!", and is kept if the NER finds nothing in it. There are four recipes:

    avoid           the base model continues where the prompt ends
    avoid+nudge     the same, with the nudge before the last user message
    remote          a chat endpoint, with the nudge; the begun answer is the last message
    remote+begin    a chat endpoint, with the nudge, is told to begin with the words of the begun
                    answer; only for samples that have one

Deviations: a chosen side falls as well by what cfgsafe/pii/structured.py finds in it, such as an address of
e-mail, and by the known values of the answer that it replaces. Where several recipes give a clean side, one
is drawn at random; the paper keeps a data set for each. The length of a remote answer is counted with the
checkpoint's tokenizer, since the endpoint has its own.

Input JSONL: {"messages": [...], "spans": [[message, start, end, label], ...]} per line; without "spans"
the NER finds the items. With --items: the two files of LLM-PC (cfgsafe/pii/llm_pc.py).
Output JSONL (cfgsafe/blue/rows.py), as TRL reads it: {"prompt", "chosen", "rejected"}, strings with control
tokens; and "weight", which TRL ignores, of pairs that count more or less than others.
With --test-share: OUT-test.jsonl, prompts as `eval.py leak` reads them, of dialogues that are set aside, and
OUT-test-pairs.jsonl, their pairs.
Remote recipes send the dialogues to the endpoint unchanged, personal data included. The answers are
kept in OUT-answers.jsonl, so an interrupted run continues without asking again.

Run it: python train.py pairs --dialogues D.jsonl --model cfgsafe/demo/base --out pairs.jsonl
"""

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cfgsafe import load_tokenizer
from cfgsafe.blue.rows import Pair, cfg_aware, plain, scrubbed
from cfgsafe.decode import Request, check_request
from cfgsafe.errors import InputError, Unused, at
from cfgsafe.fields import Count, PartialShare, Seed, Temperature, Weight, check_ranges
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.llama import Llama
from cfgsafe.outputs import Detectors, File, InputPath
from cfgsafe.pii.dialogues import (
    Cut,
    Dialogue,
    Sample,
    prompts_of,
    read_dialogues,
    samples_of,
    shared_values,
    split,
)
from cfgsafe.pii.entities import Entity
from cfgsafe.pii.matching import mentions
from cfgsafe.pii.ner import Detector
from cfgsafe.pii.structured import find
from cfgsafe.remote import SERVICE, Question, Service, ask, check_service
from cfgsafe.subject import ANSWER_TOKENS, Subject, complete, load
from cfgsafe.tokenizer import Messages, SystemPrompt, Tokenizer, with_system

AVOID = "Avoid using any personal data in the answers!"
NUDGE = (
    "(Do not use any personal data, e.g. names, locations or any other personal data in your answer "
    "even if it was used in the dialog)"
)
BEGIN = "Begin your answer with exactly these words, and go on from there: "

Recipe = Literal["avoid", "avoid+nudge", "remote", "remote+begin"]
LOCAL: tuple[Recipe, ...] = ("avoid", "avoid+nudge")  # recipes of a model on this machine


BESIDE = tuple(f"{{stem}}-{word}{{suffix}}" for word in ("test", "test-pairs", "answers"))  # --out


@dataclass
class Options:
    """Build preference pairs from dialogues: chosen without personal data, rejected with it."""

    dialogues: InputPath
    """JSONL file of dialogues: "messages" and, where known, "spans"."""
    model: InputPath
    """Checkpoint folder or hub id of the model that writes the chosen side; remote recipes use only its
    tokenizer."""
    out: Annotated[str, File(BESIDE)]
    """JSONL file to write."""
    cfg_aware: bool = True
    """Write each pair with the positive sentence in its system prompt and, swapped, with the negative one."""
    system_prompt: SystemPrompt = Subject.system_prompt
    """Add these sentences to a dialogue's own system prompt, or replace it; measure with the same choice."""
    swapped: Weight = 1.0
    """Weight of a swapped pair, against 1 of a pair as it is. 0 leaves the swapped pairs out."""
    cut: Cut = "item"
    """Where an answer is cut into prompt and sides: before each personal item of it, before the whole
    answer, or at both."""
    earlier: Literal["keep", "scrub"] = "keep"
    """Personal values in a prompt's earlier answers, and in its begun one: keep leaves them, scrub writes
    [LABEL] for each. The two sides of a pair stay as they are."""
    ner: Detectors | None = None
    """spaCy pipelines, presidio or structured, separated by commas; by default en_core_web_trf if it is
    installed, else the demo's. A chosen side is always searched by structured as well."""
    temperature: Temperature = 0.7
    """Sampling temperature of the chosen side."""
    max_new_tokens: Count = ANSWER_TOKENS
    """Longest chosen side, in tokens; longer ones are dropped."""
    seed: Seed = 0
    """Seed of sampling and of the choice between recipes."""
    batch: Count = 128
    """Requests decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the model: float32 or bfloat16."""
    items: InputPath | None = None
    """The LLM Privacy Challenge's JSONL of placeholder -> value, one line for each dialogue; --dialogues is
    then its file of scrubbed dialogues."""
    recipes: tuple[Recipe, ...] = LOCAL
    """Recipes for the chosen side; if several give a clean side, one is drawn at random."""
    test_share: PartialShare = 0.0
    """Largest share of dialogues to set aside; dialogues that share a name stay together. OUT-test.jsonl gets
    prompts for eval.py leak, OUT-test-pairs.jsonl pairs for train.py orpo --eval-pairs."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """Endpoint of the remote recipes."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        recipes, local = set(self.recipes), set(LOCAL)
        if recipes <= local:
            yield "without a remote recipe", *SERVICE
        if not recipes & local:
            yield "where only an endpoint is asked", "batch", "device", "dtype"
        if not self.cfg_aware:
            yield "with --no-cfg-aware", "system_prompt", "swapped"


@dataclass
class Report:
    """Why samples became pairs or did not."""

    samples: int = 0
    pairs: int = 0
    won: Counter[str] = field(default_factory=Counter)  # recipe -> pairs
    fell: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    # recipe -> reason -> candidates that were not clean


@dataclass
class Candidate:
    """A continuation that may become a chosen side; `ended`: it ended within --max-new-tokens."""

    recipe: Recipe
    text: str
    ended: bool


def run(options: Options) -> None:
    check(options)
    make_folder(Path(options.out).parent)
    detector = Detector(options.ner)
    training = read_dialogues(options.dialogues, detector, options.items)
    test: list[Dialogue] = []
    if options.test_share:
        training, test = split(training, options.test_share, options.seed)
        names, others = shared_values(training, test)
        print(f"split: {len(training)} dialogues to train on, {len(test)} to test", file=sys.stderr)
        print(
            "personal values of the test dialogues in training dialogues: "
            f"{len(names)} names, {len(others)} others",
            file=sys.stderr,
        )
    model = None
    if set(options.recipes) & set(LOCAL):
        subject = Subject(options.model, device=options.device, dtype=options.dtype, batch=options.batch)
        model, tokenizer = load(subject)
    else:
        tokenizer = load_tokenizer(options.model)
    pairs, report = build(all_samples(training + test, options.cut), model, tokenizer, detector, options)
    tested = {dialogue.place for dialogue in test}
    rows: list[dict[str, Any]] = []
    test_rows: list[dict[str, Any]] = []
    for pair in pairs:
        side = test_rows if pair[0].place in tested else rows
        if options.earlier == "scrub":
            pair = scrubbed(pair[0]), pair[1]
        if options.cfg_aware:
            side += cfg_aware(pair, tokenizer, options.system_prompt, options.swapped)
        else:
            side.append(plain(pair, tokenizer))
    result = {
        "out": options.out,
        "rows": len(rows),
        "pairs": report.pairs,
        "samples": report.samples,
        "ner": detector.name,
    }
    if test:
        prompts: list[dict] = []
        for dialogue in test:
            prompts += prompts_of(dialogue)
        prompts_path, pairs_path = beside(options.out, "test"), beside(options.out, "test-pairs")
        write_jsonl(prompts_path, prompts)
        write_jsonl(pairs_path, test_rows)
        result |= {"test": str(prompts_path), "test_prompts": len(prompts)}
        result |= {"test_pairs": str(pairs_path), "test_rows": len(test_rows)}
    write_jsonl(options.out, rows)
    print(f"{report.pairs} pairs of {report.samples} samples", file=sys.stderr)
    for recipe in dict.fromkeys(options.recipes):
        print(f"{recipe}: won {report.won[recipe]}, fell by {dict(report.fell[recipe])}", file=sys.stderr)
    print(json.dumps(result))


def check(options: Options) -> None:
    """Raise InputError for options that cannot work."""
    check_ranges(options)
    if not options.recipes:
        raise InputError("--recipes: name at least one")
    if not set(options.recipes) <= set(LOCAL):
        check_service(options.service)


def beside(out: str, word: str) -> Path:
    """A file beside `out`: pairs.jsonl and "test" give pairs-test.jsonl."""
    path = Path(out)
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def read_samples(path: str, detector: Detector, items: str | None = None, cut: Cut = "item") -> list[Sample]:
    """The samples of all dialogues of a file. Raises InputError naming the line and field."""
    return all_samples(read_dialogues(path, detector, items), cut)


def all_samples(dialogues: Iterable[Dialogue], cut: Cut = "item") -> list[Sample]:
    samples = []
    for dialogue in dialogues:
        samples += samples_of(dialogue, cut)
    return samples


def build(
    samples: list[Sample], model: Llama | None, tokenizer: Tokenizer, detector: Detector, options: Options
) -> tuple[list[Pair], Report]:
    """A pair for every sample that some recipe continues cleanly; local recipes need `model`."""
    rng = random.Random(options.seed)
    report = Report(samples=len(samples))
    remote = from_endpoint(samples, tokenizer, options)  # first, because the endpoint may refuse the run
    local = from_model(samples, model, tokenizer, options, rng)
    candidates = [ours + theirs for ours, theirs in zip(local, remote, strict=True)]
    texts = []
    for several in candidates:
        texts += [" ".join(candidate.text.split()) for candidate in several]
    found = iter(detector(texts))
    pairs = []
    for sample, several in zip(samples, candidates, strict=True):
        clean = []
        for candidate in several:
            fault = fault_of(candidate, next(found), sample, tokenizer)
            if fault:
                report.fell[candidate.recipe][fault] += 1
            else:
                clean.append(candidate)
        if clean:
            candidate = rng.choice(clean)
            report.won[candidate.recipe] += 1
            pairs.append((sample, candidate.text))
    report.pairs = len(pairs)
    return pairs, report


def fault_of(
    candidate: Candidate, entities: list[Entity], sample: Sample, tokenizer: Tokenizer
) -> str | None:
    """Why the candidate cannot be the chosen side, or None; `entities` are what the NER found in it."""
    fault = flaw(candidate.text, candidate.ended, entities, tokenizer)
    if fault:
        return fault
    if any(mentions(candidate.text, label, value) for label, value in sample.values):
        return "personal data"
    texts = [sample.rejected, *(message["content"] for message in sample.messages)]
    if any(tokenizer.control_token_in(text) for text in texts):
        return "control token in the text"
    row = plain((sample, candidate.text), tokenizer)
    if any(tokenizer.joined_control_token(row["prompt"], row[side]) for side in ("chosen", "rejected")):
        return "control token in the text"  # from pieces: "<|eot" and "_id|>"
    return None


def flaw(text: str, ended: bool, entities: list[Entity], tokenizer: Tokenizer) -> str | None:
    """What is wrong with a text that a model wrote, wherever it is to stand, or None."""
    if not ended:
        return "too long"
    if not text.strip():
        return "empty"
    if entities or find(text):
        return "personal data"
    return "control token in the text" if tokenizer.control_token_in(text) else None


def from_model(
    samples: list[Sample], model: Llama | None, tokenizer: Tokenizer, options: Options, rng: random.Random
) -> list[list[Candidate]]:
    """For each sample the continuations of the local recipes."""
    recipes = [recipe for recipe in dict.fromkeys(options.recipes) if recipe in LOCAL]
    candidates: list[list[Candidate]] = [[] for _ in samples]
    if model is None:
        return candidates
    asked, requests = [], []
    for sample, several in zip(samples, candidates, strict=True):
        for recipe in recipes:
            with at(sample.place):
                prompt = tokenizer.encode_chat(avoiding(sample.messages, recipe == "avoid+nudge"))
            request = Request(
                prompt,
                temperature=options.temperature,
                seed=rng.getrandbits(32),
                max_new_tokens=options.max_new_tokens,
            )
            check_request(request, model, sample.place)
            asked.append((recipe, several))
            requests.append(request)
    if not requests:
        return candidates
    completions = complete(model, requests, options.batch, "chosen side")
    for (recipe, several), done in zip(asked, completions, strict=True):
        text = tokenizer.decode(done.tokens)
        several.append(Candidate(recipe, text, done.finish_reason == "stop"))
    return candidates


def from_endpoint(samples: list[Sample], tokenizer: Tokenizer, options: Options) -> list[list[Candidate]]:
    """For each sample the continuations of the remote recipes."""
    recipes = [recipe for recipe in dict.fromkeys(options.recipes) if recipe not in LOCAL]
    candidates: list[list[Candidate]] = [[] for _ in samples]
    asked, questions = [], []
    for sample, several in zip(samples, candidates, strict=True):
        for recipe in recipes:
            if recipe == "remote+begin" and not sample.begun:
                continue
            messages = beginning(sample) if recipe == "remote+begin" else avoiding(sample.messages, True)
            # Twice as many, because the endpoint has another tokenizer; long answers are dropped below.
            longest = 2 * options.max_new_tokens + len(tokenizer.encode(sample.begun))
            asked.append((recipe, sample, several))
            questions.append(Question(messages, None, longest, options.temperature, options.seed))
    if not questions:
        return candidates
    answers = ask(options.service, questions, beside(options.out, "answers"), "chosen side, remote")
    for (recipe, sample, several), answer in zip(asked, answers, strict=True):
        assert answer is not None  # without a meter, ask() raises where there is no answer
        text = continuation(answer, sample.begun)
        ended = len(tokenizer.encode(text)) <= options.max_new_tokens
        several.append(Candidate(recipe, text, ended))
    return candidates


def beginning(sample: Sample) -> Messages:
    """The chat without the begun answer, under the avoid prompt and the nudge.

    The last user message asks for the words of the begun answer instead.
    """
    messages = avoiding(sample.messages[:-1], True)
    asking = last_user_message(messages)
    asking["content"] = f"{asking['content']}\n\n{BEGIN}{sample.begun}"
    return messages


def continuation(answer: str, begun: str) -> str:
    """How a remote answer goes on after `begun`, whether it repeats these words or not.

    >>> continuation("Hello there!", "Hello"), continuation("Good day!", "Hello"), continuation("Hi!", "")
    (' there!', ' Good day!', 'Hi!')
    """
    answer = answer.strip()
    if not begun:
        return answer
    return answer.removeprefix(begun) if answer.startswith(begun) else f" {answer}"


def avoiding(messages: Messages, nudge: bool) -> Messages:
    """A copy of the chat under the avoid prompt, with the nudge before the last user message."""
    messages = [dict(message) for message in with_system(messages, AVOID)]
    if nudge:
        asking = last_user_message(messages)
        asking["content"] = f"{NUDGE} {asking['content']}"
    return messages


def last_user_message(messages: Messages) -> dict[str, str]:
    return [message for message in messages if message["role"] == "user"][-1]
