"""What guidance buys and what it costs: every model at every coefficient, space and mask.

Source: Smirnov (arXiv 2412.06846): high guidance breaks words in log space, not in probability space.
Deviations: broken words are counted, where the paper saw them by eye; the plausibility mask of
contrastive decoding (arXiv 2210.15097) is swept as well. At g = 1 the guided distribution is that of
the positive prompt, and no mask changes a greedy answer, so g = 1 is one row for all spaces and
masks.

Run it: python eval.py sweep --models guard=cfgsafe/demo/leaky+runs/demo/lora-cfg/epoch-2 --out runs/sweep
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cfgsafe.errors import InputError
from cfgsafe.fields import Count, Guidance, Share, check_ranges
from cfgsafe.files import make_folder, write_text
from cfgsafe.guidance import SPACES
from cfgsafe.hub import PROMPTS, QUIZ, WORDS
from cfgsafe.measure import fluency, leak, utility
from cfgsafe.outputs import Detectors, Folder, Input, InputPath
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results
from cfgsafe.report.compare import Comparison
from cfgsafe.report.figures import over_guidance
from cfgsafe.subject import ANSWER_TOKENS, Subject
from cfgsafe.tokenizer import SystemPrompt


def parse_model(text: str) -> tuple[str, int | None, Subject]:
    """(name, epoch or None, subject) of NAME[@EPOCH]=FOLDER[+ADAPTER]. Raises InputError.

    >>> parse_model("guard@2=leaky+runs/epoch-2")[:2]
    ('guard', 2)
    """
    parts = re.fullmatch(r"([\w.-]+)(?:@(\d+))?=([^+]+)(?:\+(.+))?", text)
    if not parts:
        form = "NAME=FOLDER or NAME=FOLDER+ADAPTER, the name of letters, digits, '.', '-' and '_'"
        raise InputError(f"--models {text}: must be {form}")
    name, epoch, folder, adapter = parts.groups()
    return name, int(epoch) if epoch else None, Subject(folder, adapter)


def model_paths(text: str) -> list[str]:
    """The folders of a model of --models."""
    subject = parse_model(text)[2]
    return [subject.model, *filter(None, [subject.adapter])]


# What the command writes to --out.
WRITES = ("answers-*.jsonl", "kept", "results.json", "sweep.md", "sweep.png")


@dataclass
class Options:
    """Measure models over guidance coefficients, spaces and masks; writes a table and a figure."""

    models: list[Annotated[str, Input(model_paths)]]
    """Each model as NAME=FOLDER[+ADAPTER]; NAME@EPOCH is a model at that epoch of training."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for the results. A second run continues a killed one, and removes other models' answers."""
    guidance: list[Guidance] = field(default_factory=lambda: [1.0, 2.0, 3.0, 5.0, 10.0])
    """Guidance coefficients g."""
    spaces: list[str] = field(default_factory=lambda: list(SPACES))
    """Spaces in which to guide; by default all of them."""
    alphas: list[Share] = field(default_factory=lambda: [0.0, 0.1])
    """Plausibility masks alpha; 0 keeps all tokens."""
    system_prompt: SystemPrompt = Subject.system_prompt
    """Add the two sentences of guidance to a prompt's own system prompt, or replace it by them."""
    unguided: bool = False
    """Add a row of each model without guidance, under the prompts' own system prompts."""
    prompts: InputPath = PROMPTS
    """JSONL of prompts; by default the demo's test set."""
    questions: InputPath = QUIZ
    """JSONL in MMLU-Pro's shape; by default the demo's held-out quiz."""
    margins: bool = False
    """Also measure by how many nats a token the right options lead; this takes time."""
    limit: Count | None = None
    """Use this many prompts and this many questions, evenly spaced."""
    words: InputPath | None = None
    """Text file of words that are not broken. By default the demo's list for the demo's prompts, and for
    other prompts the words of prompts and questions."""
    reference: InputPath | None = None
    """Model that gives the perplexity of the answers; by default there is no such column."""
    ner: Detectors | None = None
    """spaCy pipeline; by default en_core_web_trf where installed, else the demo's."""
    answer_tokens: Count = ANSWER_TOKENS
    """Longest answer to a prompt, in tokens."""
    quiz_tokens: Count = ANSWER_TOKENS
    """Longest answer to a question, in tokens."""
    batch: Count = 128
    """Requests that are decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the models: float32 or bfloat16."""


def run(options: Options) -> None:
    check_ranges(options)
    started = time.time()
    models = [parse_model(text) for text in options.models]
    keys = [(name, epoch) for name, epoch, _ in models]
    for text, key in zip(options.models, keys, strict=True):
        if keys.count(key) > 1:
            raise InputError(f"--models {text}: two models called {key[0]}; give each its own name")
    prompts = spaced(leak.read_prompts(options.prompts), options.limit)
    questions = spaced(utility.read_questions(options.questions), options.limit)
    settings = list(combinations(options))
    vocabulary = known_words(options)
    out = make_folder(options.out)
    comparison = Comparison(
        prompts,
        questions,
        Detector(options.ner),
        out,
        reference=placed(Subject(options.reference), options) if options.reference else None,
        vocabulary=vocabulary,
        margins=options.margins,
        answer_tokens=options.answer_tokens,
        quiz_tokens=options.quiz_tokens,
    )
    rows = []
    for name, epoch, subject in models:
        for setting in settings:
            rows.append(comparison.row(name, replace(placed(subject, options), **setting), epoch))
    facts = {"prompts": len(prompts), "finished_answers_removed": sum(prompt.answered for prompt in prompts)}
    write(out, rows, **facts, questions=len(questions), seconds=round(time.time() - started, 1))
    current = {results.answers_file(row) for row in rows}
    for path in out.glob("answers-*.jsonl"):
        if path.name not in current:  # an earlier sweep's
            path.unlink()


def placed(subject: Subject, options: Options) -> Subject:
    """The subject on the device of the options, with their kind of guidance."""
    device, dtype, system_prompt = options.device, options.dtype, options.system_prompt
    return replace(subject, batch=options.batch, device=device, dtype=dtype, system_prompt=system_prompt)


def combinations(options: Options) -> Iterator[dict]:
    """The guidance, space and alpha of each row of a model. Raises InputError."""
    for name in ("guidance", "spaces", "alphas"):
        if not getattr(options, name):
            raise InputError(f"--{name}: give at least one value")
    for space in options.spaces:
        if space not in SPACES:
            raise InputError(f"--spaces {space}: must be one of {', '.join(SPACES)}")
    if options.unguided:
        yield {"guidance": None}
    if 1 in options.guidance:
        yield {"guidance": 1.0}
    for space in dict.fromkeys(options.spaces):
        for alpha in dict.fromkeys(options.alphas):
            for g in sorted(set(options.guidance) - {1.0}):
                yield {"guidance": g, "space": space, "alpha": alpha}


def spaced(rows: list, limit: int | None) -> list:
    """`limit` of the rows, evenly spaced, so that every kind keeps its share.

    >>> spaced([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 4]
    """
    if limit is None or limit >= len(rows):
        return rows
    return [rows[n * len(rows) // limit] for n in range(limit)]


def known_words(options: Options) -> frozenset[str] | None:
    """The words of --words, or the demo's list for the demo's prompts; else None (see Comparison)."""
    path = options.words or (WORDS if options.prompts == PROMPTS else None)
    if path is None:
        return None
    try:
        return frozenset(word.lower() for word in fluency.words(Path(path).read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--words {path}: cannot be read as UTF-8 text ({error})") from None


def write(out: Path, rows: list[dict], **facts) -> None:
    """Write results.json, sweep.md and sweep.png into `out`; print the table, then a line of JSON."""
    title = "What guidance buys and what it costs"
    results.write_results(out, title, rows, [], **facts)
    lines = [f"# {title}", "", results.table(rows), "", results.legend(rows), ""]
    lines += ["![leaks, utility and broken words over g](sweep.png)", ""]
    lines += [results.facts_line(facts), ""]
    write_text(out / "sweep.md", "\n".join(lines))
    over_guidance(out / "sweep.png", rows)
    print("\n" + results.terminal_table(rows) + "\n")
    print(json.dumps({"rows": len(rows), **facts, "out": str(out)}))
