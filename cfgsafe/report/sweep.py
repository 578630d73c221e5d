"""What guidance buys and what it costs: every model at every coefficient, space and plausibility mask, with a figure.

Source: Smirnov (arXiv 2412.06846): high guidance breaks words in log space and not in probability space, there seen by eye.
Deviations: broken words are counted; the plausibility mask of contrastive decoding (arXiv 2210.15097) is swept as well. At g = 1 the
guided distribution is the positive prompt's own and greedy answers know no mask, so g = 1 is one row for all spaces and masks.

Run it: python eval.py sweep --models guard=cfgsafe/demo/leaky+runs/demo/lora-cfg/epoch-2 --out runs/sweep
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from cfgsafe.decode import SPACES
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, write_text
from cfgsafe.hub import PROMPTS, QUIZ, WORDS
from cfgsafe.measure import fluency, leak, utility
from cfgsafe.pii.ner import Detector
from cfgsafe.report import results
from cfgsafe.report.compare import Comparison
from cfgsafe.subject import Subject

PANELS = {
    "leaked_per_100": "leaks per 100 answers",
    "utility": "utility, %",
    "broken_words": "broken words, %",
}


@dataclass
class Options:
    """Measure models over guidance coefficients, spaces and masks: results.json, sweep.md and sweep.png."""

    models: list[str]
    """NAME=FOLDER[+ADAPTER] of each; NAME@EPOCH says which epoch of training the adapter is from."""
    out: str
    """Folder for the results; a second run there goes on where a killed one stopped, and replaces the answers of other models."""
    guidance: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 5.0, 10.0])
    """Coefficients g."""
    spaces: list[str] = field(default_factory=lambda: ["prob", "log"])
    """Where to guide: prob, log or both."""
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.1])
    """Plausibility masks; 0 keeps all tokens."""
    unguided: bool = False
    """Also a row of each model with the prompts' own system prompts."""
    prompts: str = PROMPTS
    """JSONL of prompts; by default the demo's test set."""
    questions: str = QUIZ
    """JSONL in MMLU-Pro's shape; by default the demo's held-out quiz."""
    limit: int | None = None
    """Use this many prompts and this many questions, evenly spaced."""
    words: str | None = None
    """Text whose words are not broken ones; by default the demo's corpus for the demo's prompts, else the prompts and questions."""
    reference: str | None = None
    """Model under which the answers' perplexity is taken; without it there is no such column."""
    ner: str | None = None
    """spaCy pipeline; by default en_core_web_trf where installed, else the demo's."""
    answer_tokens: int = 64
    """Longest answer."""
    quiz_tokens: int = 16
    """Longest answer to a question."""
    batch: int = 128
    """Requests decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """float32 or bfloat16."""


def run(options: Options) -> None:
    check_at_least(1, options, "limit", "answer_tokens", "quiz_tokens", "batch")
    started = time.time()
    models = [(*parse_model(text), text) for text in options.models]
    for name, epoch, _, text in models:
        if [(n, e) for n, e, _, _ in models].count((name, epoch)) > 1:
            raise InputError(f"--models {text}: two models called {name}; give each its own name")
    prompts, questions = (
        spaced(leak.read_prompts(options.prompts), options.limit),
        utility.read_questions(options.questions),
    )
    questions = spaced(questions, options.limit)
    settings = list(combinations(options))
    vocabulary = known_words(options)
    out = make_folder(options.out)
    shared = {
        f.name: getattr(options, f.name) for f in fields(Subject) if f.name in ("batch", "device", "dtype")
    }
    reference = Subject(options.reference, **shared) if options.reference else None
    lengths = {"answer_tokens": options.answer_tokens, "quiz_tokens": options.quiz_tokens}
    comparison = Comparison(
        prompts, questions, Detector(options.ner), out, reference=reference, vocabulary=vocabulary, **lengths
    )
    rows = []
    for name, epoch, subject, _ in models:
        rows += [comparison.row(name, replace(subject, **shared, **setting), epoch) for setting in settings]
    write(out, rows, prompts=len(prompts), questions=len(questions), seconds=round(time.time() - started, 1))
    for stale in set(out.glob("answers-*.jsonl")) - {
        out / results.answers_file(row) for row in rows
    }:  # of a sweep before this one
        stale.unlink()


def parse_model(text: str) -> tuple[str, int | None, Subject]:
    """(name, epoch or None, subject) of NAME[@EPOCH]=FOLDER[+ADAPTER]. Raises InputError.

    >>> parse_model("guard@2=leaky+runs/epoch-2")[:2]
    ('guard', 2)
    """
    parts = re.fullmatch(r"([\w.-]+)(?:@(\d+))?=([^+]+)(?:\+(.+))?", text)
    if not parts:
        raise InputError(
            f"--models {text}: must be NAME=FOLDER or NAME=FOLDER+ADAPTER, the name of letters, digits, '.', '-' and '_'"
        )
    name, epoch, folder, adapter = parts.groups()
    return name, int(epoch) if epoch else None, Subject(folder, adapter)


def combinations(options: Options) -> Iterator[dict]:
    """The guidance, space and alpha of each row of a model. Raises InputError."""
    for name in ("guidance", "spaces", "alphas"):
        if not getattr(options, name):
            raise InputError(f"--{name}: give at least one value")
    for g in options.guidance:
        if not math.isfinite(g):
            raise InputError(f"--guidance {g}: must be a finite number")
    for space in options.spaces:
        if space not in SPACES:
            raise InputError(f"--spaces {space}: must be one of {', '.join(SPACES)}")
    for alpha in options.alphas:
        if not 0 <= alpha <= 1:
            raise InputError(f"--alphas {alpha:g}: must lie from 0 to 1")
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
    return (
        rows if limit is None or limit >= len(rows) else [rows[n * len(rows) // limit] for n in range(limit)]
    )


def known_words(options: Options) -> frozenset[str] | None:
    """Of the --words file, or of the demo's corpus for the demo's prompts; None leaves it to the comparison."""
    path = options.words or (WORDS if options.prompts == PROMPTS else None)
    if path is None:
        return None
    try:
        return frozenset(word.lower() for word in fluency.words(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--words {path}: cannot be read as UTF-8 text ({error})") from None
    return None


def write(out: Path, rows: list[dict], **facts) -> None:
    """results.json, sweep.md and sweep.png in `out`; the table on stdout, with a last line of JSON."""
    title = "What guidance buys and what it costs"
    write_text(
        out / "results.json",
        json.dumps({"title": title, "rows": rows, "checks": [], **facts}, indent=1) + "\n",
    )
    lines = [
        f"# {title}",
        "",
        results.table(rows),
        "",
        results.legend(rows),
        "",
        "![leaks, utility and broken words over g](sweep.png)",
        "",
    ]
    write_text(
        out / "sweep.md",
        "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in facts.items()) + ".", ""]),
    )
    figure(out / "sweep.png", rows)
    print("\n" + results.terminal_table(rows) + "\n")
    print(json.dumps({"rows": len(rows), **facts, "out": str(out)}))


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """Label -> rows in the order of g, for each (model, epoch, space, alpha); each begins at its model's row of g = 1."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["guidance"] in (None, 1):
            continue
        model = row["model"] + (f" epoch {row['epoch']}" if row["epoch"] else "")
        label = f"{model}, {row['space']}" + (f", alpha {row['alpha']:g}" if row.get("alpha") else "")
        start = [
            r for r in rows if r["guidance"] == 1 and (r["model"], r["epoch"]) == (row["model"], row["epoch"])
        ]
        found.setdefault(label, start).append(row)
    if not found:
        return {row["model"]: [row] for row in rows if row["guidance"] == 1}
    return {label: sorted(line, key=lambda row: row["guidance"]) for label, line in found.items()}


def figure(path: Path, rows: list[dict]) -> None:
    """Leaks, utility and broken words over g, one line a curve, with 95 % intervals. Nothing is drawn without a guided row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = curves(rows)
    if not lines:
        return
    fig, axes = plt.subplots(len(PANELS), 1, figsize=(7.5, 9), sharex=True)
    for panel, (key, title) in zip(axes, PANELS.items(), strict=True):
        for number, (label, line) in enumerate(lines.items()):
            shift = 1 + 0.012 * (number - (len(lines) - 1) / 2)  # or intervals at one g would hide each other
            spreads = [[edge[0] for edge in results.spread(row, key)] for row in line]
            style = {
                "fmt": "osDv^<>PX*"[number % 10],
                "color": f"C{number % 10}",
                "capsize": 3,
                "markersize": 5,
                "linewidth": 1.2,
            }
            style |= {"linestyle": "--" if "alpha" in label else "-", "label": label}
            panel.errorbar(
                [row["guidance"] * shift for row in line],
                [row[key] for row in line],
                yerr=list(zip(*spreads, strict=True)),
                **style,
            )
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        panel.set_ylim(bottom=-0.05 * panel.get_ylim()[1])  # room for markers at 0
    results.limit_utility(axes[1], [row for line in lines.values() for row in line])
    ticks = sorted({row["guidance"] for line in lines.values() for row in line})
    if min(ticks) > 0:
        axes[-1].set_xscale("log")
    axes[-1].set_xticks(ticks, [f"{g:g}" for g in ticks])
    axes[-1].set_xticks([], minor=True)
    axes[-1].set_xlabel("guidance coefficient g")
    axes[0].legend(fontsize=8, loc="upper right")
    results.save_figure(fig, path)
