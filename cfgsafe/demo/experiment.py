"""The whole blue team on the embedded models: pairs, ORPO, guidance, controls, evaluation, report.

Source: Smirnov (arXiv 2412.06846), Tables 1 and 3 in miniature.
Deviations from the paper's settings, for a model of 2.9M parameters: a higher learning rate,
batches of 4, two epochs, personal data and quiz from our own generator. Everything else is the code
that an 8B model runs through. Deviation from its tables: every model, also the undefended one, is asked
under its own system prompt, under the positive one alone and with guidance, so that what a prompt does
is not taken for what the training does (cfgsafe/demo/controls.py).

Run it: python train.py demo      (five minutes on two CPU cores; --full: three seeds)
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cfgsafe.blue import orpo, pairs, subtract
from cfgsafe.blue.rows import cfg_aware, plain
from cfgsafe.demo import controls
from cfgsafe.demo.testset import corpus_words, pair_dialogues, test_prompts
from cfgsafe.fields import Count, Rate, Seed, Several, check_ranges
from cfgsafe.files import make_folder, write_jsonl
from cfgsafe.hub import BASE, DEMO_PIPELINE, LEAKY, QUIZ
from cfgsafe.measure import leak, utility
from cfgsafe.outputs import Folder
from cfgsafe.pii.ner import Detector
from cfgsafe.report import html, results
from cfgsafe.report.compare import Comparison, Measured
from cfgsafe.report.results import COLUMNS, Column
from cfgsafe.subject import Subject, load

TITLE = "From a leaky model to a guarded one"
INVENTED = (
    "The people below are invented by the demo's generator, "
    "so their names, towns and employers are shown unmasked."
)


@dataclass
class Options:
    """Unlearn, guard and measure the embedded leaky model; writes a report."""

    out: Annotated[str, Folder()] = "runs/demo"
    """Folder for adapters, answers, the reports and the figure."""
    full: bool = False
    """Train with three seeds; add the subtracted model with its adapters, g = 5 and log space."""
    seed: Seed = 0
    """Seed of dialogues, sampling and training; --full also uses the two that follow."""
    dialogues: Count = 160
    """Dialogues from which the pairs are made."""
    prompts: Several = 240
    """Held-out prompts whose conversation holds the items, half of them hard. Those that try to undo the
    guard and those about planted or famous people are added to them."""
    questions: Count = 150
    """Questions of the quiz."""
    epochs: Count = 2
    """Epochs of ORPO."""
    lr: Rate = 5e-4
    """Learning rate of ORPO."""
    batch_size: Count = 4
    """Pairs per step."""


SEEDS = 3  # of --full
GRID = (None, 1.0, 2.0, 3.0)  # own system prompt, positive one alone, guidance
PAPER = {  # (model, g) of the paper's rows
    ("leaky", 1.0), ("lora", 1.0), ("lora-cfg", 1.0), ("lora-cfg", 2.0), ("lora-cfg", 3.0), ("sub", 1.0),
    ("sub-lora", 1.0), ("sub-lora-cfg", 1.0), ("sub-lora-cfg", 2.0),
}  # fmt: skip
PANELS = (COLUMNS[0], Column("recall", "recall of people planted 64 times, %", None, slice="x64"))


def run(options: Options) -> None:
    check_ranges(options)
    started = time.time()
    out = make_folder(options.out)
    detector = Detector(str(DEMO_PIPELINE))
    judge = comparison(options, detector, out)
    rows = [judge.row("base", Subject(BASE))]
    rows += grid(judge, "leaky", Subject(LEAKY))
    untrained = dict(judge.measured)
    runs = []
    for seed in range(options.seed, options.seed + (SEEDS if options.full else 1)):
        trained = one_seed(options, seed, judge, detector, folder_of(options, seed))
        runs.append(untrained | measured_by_name(judge, trained))
        rows += trained
    if options.full:
        rows += extras(options, judge, folder_of(options, options.seed))

    seconds = round(time.time() - started, 1)
    facts = {"prompts": len(judge.prompts), "questions": len(judge.questions), "seconds": seconds}
    sentences = controls.conclusions(runs)
    results.write(out, TITLE, rows, sentences, judge.examples(), PANELS, **facts, seed=options.seed)
    html.write(html.Options(str(out), show_pii=True, note=INVENTED))
    print(f"\n{results.terminal_table(rows)}\n\n{results.legend(rows)}\n")
    print("\n".join(sentences))
    print(f"\n{out}/report.html, report.md, results.json and leaks-utility.png in {seconds:.0f} s")


def folder_of(options: Options, seed: int) -> Path:
    """Where the pairs and adapters of a seed go: with several seeds, each has its own folder."""
    out = Path(options.out)
    return make_folder(out / f"seed-{seed}" if options.full else out)


def measured_by_name(judge: Comparison, rows: list[dict]) -> dict[str, Measured]:
    """What the rows of one seed were counted from, by their names without the seed."""
    return {results.name_of({**row, "seed": None}): judge.measured[results.name_of(row)] for row in rows}


def one_seed(options: Options, seed: int, judge: Comparison, detector: Detector, out: Path) -> list[dict]:
    """Pairs and both adapters of one seed, in `out`; the rows of each adapter."""
    print(f"preference pairs from {options.dialogues} dialogues, seed {seed}")
    make_pairs(options, seed, detector, out)
    print("ORPO on the leaky model")
    unlearn(options, seed, LEAKY, "", out)
    rows = []
    for name in ("lora", "lora-cfg"):
        subject = Subject(LEAKY, last_epoch(options, out / name))
        rows += grid(judge, name, subject, seed if options.full else None)
    return rows


def grid(judge: Comparison, name: str, subject: Subject, seed: int | None = None) -> list[dict]:
    """A row for each of `GRID`."""
    return [row_of(judge, name, replace(subject, guidance=g), seed) for g in GRID]


def row_of(judge: Comparison, name: str, subject: Subject, seed: int | None = None) -> dict:
    """The row of a model; it is marked if the paper has it."""
    row = judge.row(name, subject, seed=seed)
    return {**row, "paper": True} if (name, subject.guidance) in PAPER else row


def extras(options: Options, judge: Comparison, out: Path) -> list[dict]:
    """High guidance in both spaces, and the subtracted model with adapters of its own; of the first seed."""
    guided = Subject(LEAKY, last_epoch(options, out / "lora-cfg"))
    settings: list[dict] = [{"guidance": 5.0}]
    settings += [{"guidance": g, "space": "log"} for g in (2.0, 3.0, 5.0)]
    rows = [row_of(judge, "lora-cfg", replace(guided, **setting), options.seed) for setting in settings]
    print("ORPO on the subtracted model")
    sub = str(out / "sub")
    subtract.run(subtract.Options(BASE, LEAKY, sub))
    unlearn(options, options.seed, sub, "sub-", out)
    for name, folder in (("sub", None), ("sub-lora", "sub-lora"), ("sub-lora-cfg", "sub-lora-cfg")):
        subject = Subject(sub, last_epoch(options, out / folder) if folder else None)
        for g in (1.0, 3.0):
            rows.append(row_of(judge, name, replace(subject, guidance=g), options.seed))
    return rows


def last_epoch(options: Options, folder: Path) -> str:
    """The folder of an adapter after its last epoch."""
    return str(folder / f"epoch-{options.epochs}")


def make_pairs(options: Options, seed: int, detector: Detector, out: Path) -> None:
    """Write dialogues.jsonl, pairs-plain.jsonl and pairs-cfg.jsonl; both have the same chosen answers."""
    dialogues = str(out / "dialogues.jsonl")
    write_jsonl(dialogues, pair_dialogues(options.dialogues, seed))
    settings = pairs.Options(dialogues, BASE, str(out / "pairs-cfg.jsonl"), max_new_tokens=96, seed=seed)
    model, tokenizer = load(Subject(BASE))
    samples = pairs.read_samples(dialogues, detector)
    built, _ = pairs.build(samples, model, tokenizer, detector, settings)
    guided = []
    for pair in built:
        guided += cfg_aware(pair, tokenizer)
    write_jsonl(out / "pairs-plain.jsonl", [plain(pair, tokenizer) for pair in built])
    write_jsonl(out / "pairs-cfg.jsonl", guided)


def unlearn(options: Options, seed: int, model: str, prefix: str, out: Path) -> None:
    """Train the adapters <prefix>lora and <prefix>lora-cfg in `out`."""
    for name, data in (("lora", "pairs-plain.jsonl"), ("lora-cfg", "pairs-cfg.jsonl")):
        settings = orpo.Options(
            model,
            str(out / data),
            str(out / (prefix + name)),
            lr=options.lr,
            batch_size=options.batch_size,
            epochs=options.epochs,
            seed=seed,
        )
        orpo.run(settings)


def comparison(options: Options, detector: Detector, out: Path) -> Comparison:
    """The held-out prompts and the quiz. Answers are not kept, as a later run has other adapters."""
    hard = options.prompts // 2
    rows = test_prompts(options.seed, options.prompts - hard, hard)
    return Comparison(
        [leak.Prompt.from_row(row, row["id"]) for row in rows],
        utility.read_questions(QUIZ)[: options.questions],
        detector,
        out,
        reference=Subject(BASE),
        vocabulary=corpus_words(),
        margins=True,
        resume=False,
        answer_tokens=64,
        quiz_tokens=16,
    )
