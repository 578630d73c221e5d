"""The stages of a study before anything is measured: leaky model, pairs, guards, each by its own command.

Source: Smirnov (arXiv 2412.06846) for pairs, ORPO and subtraction; NPO (arXiv 2404.05868) and DPO towards
"I don't know" (arXiv 2401.06121) are trained on the same pairs with the same budget, as baselines.
Deviation: the leaky model is an adapter that is merged, not a full fine-tuning, so that 8B fits one GPU.

Every function takes the folder of the study and leaves its product there under one name, written whole; so
a stage whose product exists is done, and one that was stopped within a training goes on.

Run it: python train.py study --model cfgsafe/demo/base --out runs/study
"""

import random
from pathlib import Path

from cfgsafe.blue import distil, merge, ordinary, orpo, pairs, resume, subtract
from cfgsafe.blue.rows import cfg_aware, kept, plain, scrubbed
from cfgsafe.files import read_jsonl, write_jsonl
from cfgsafe.load import load_tokenizer
from cfgsafe.losses import Objective
from cfgsafe.pii.facts import as_dialogue
from cfgsafe.pii.ner import Detector
from cfgsafe.study.material import Material, write_dialogues, write_training
from cfgsafe.study.options import ORDINARY_TOKENS, Options
from cfgsafe.subject import Subject, load

DIALOGUES, ORDINARY, PROMPTS = "dialogues.jsonl", "ordinary.jsonl", "prompts.jsonl"
PLAIN, AWARE = "pairs-plain.jsonl", "pairs-cfg.jsonl"
GUARDS: dict[str, tuple[Objective, str]] = {  # adapter -> its objective and its pairs
    "lora": ("orpo", PLAIN),
    "lora-cfg": ("orpo", AWARE),
    "npo": ("npo", PLAIN),
    "dpo-idk": ("dpo-idk", PLAIN),
}


def leaky_of(options: Options, out: Path) -> str:
    """The checkpoint of the leaky model."""
    return options.leaky or str(out / "leaky")


def adapter_of(name: str, out: Path) -> str:
    """The folder of a guard's adapter after its last epoch."""
    epochs = distil.Options.epochs if name == "distilled" else 1
    return str(out / name / f"epoch-{epochs}")


def make_leaky(material: Material, options: Options, out: Path) -> None:
    """Fine-tune the ancestor on the facts, and merge what it learnt: the folder `leaky`."""
    training = out / "training.jsonl"
    write_training(material, load_tokenizer(options.model), training)
    folder = out / "leaky-adapter"
    settings = orpo.Options(
        options.model,
        str(training),
        str(folder),
        objective="sft",
        rank=options.leaky_rank,
        alpha=2.0 * options.leaky_rank,
        lr=options.leaky_lr,
        epochs=options.leaky_epochs,
        batch_size=options.batch_size,
        group_by_length=True,
        seed=options.seed,
        resume=bool(resume.states(folder)),
        device=options.device,
        dtype=options.dtype,
    )
    orpo.run(settings)
    last = str(folder / f"epoch-{options.leaky_epochs}")
    merge.run(merge.Options(options.model, last, str(out / "leaky")))


def converse(options: Options, out: Path) -> None:
    """Ordinary conversations of the ancestor with itself: the file `ordinary.jsonl`."""
    settings = ordinary.Options(
        options.model,
        str(out / ORDINARY),
        count=options.ordinary,
        ner=options.ner,
        max_new_tokens=ORDINARY_TOKENS,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )
    model, tokenizer = load(Subject(options.model, device=options.device, dtype=options.dtype))
    rows = []
    for messages, answer in ordinary.converse(model, tokenizer, Detector(options.ner), settings):
        rows.append({"messages": messages, "answer": answer})
    write_jsonl(out / ORDINARY, rows)


def make_pairs(material: Material, options: Options, out: Path) -> None:
    """Pairs from the facts to forget, plain and CFG-aware, with the same chosen sides; and rows to keep.

    Each pair stands there --epochs times and each row to keep once: seen several times, the few answers that
    a model gave are learnt by heart, and it is sure of them alone.
    """
    dialogues = out / DIALOGUES
    write_dialogues(material.forget, dialogues)
    writer = options.model if options.chosen_by == "ancestor" else leaky_of(options, out)
    settings = pairs.Options(
        str(dialogues),
        writer,
        str(out / AWARE),
        ner=options.ner,
        swapped=options.swapped,
        earlier=options.earlier,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
    )
    detector = Detector(options.ner)
    model, tokenizer = load(Subject(writer, device=options.device, dtype=options.dtype))
    samples = pairs.read_samples(str(dialogues), detector, cut=options.cut)
    built, _ = pairs.build(samples, model, tokenizer, detector, settings)
    if len(built) > options.pairs:
        built = random.Random(options.seed).sample(built, options.pairs)
    if options.earlier == "scrub":
        built = [(scrubbed(sample), chosen) for sample, chosen in built]
    rows, aware = [], []
    for pair in built * options.epochs:
        rows.append(plain(pair, tokenizer))
        aware += cfg_aware(pair, tokenizer, swapped=options.swapped)
    prompts = [as_dialogue(fact) for fact in material.forget]
    for _, row in read_jsonl(out / ORDINARY) if options.ordinary else ():
        conversation = row["messages"], row["answer"]
        rows += kept(conversation, tokenizer, cfg_aware=False)
        aware += kept(conversation, tokenizer, cfg_aware=True)
        prompts.append({"messages": row["messages"]})
    write_jsonl(out / PROMPTS, prompts)
    write_jsonl(out / AWARE, aware)
    write_jsonl(out / PLAIN, rows)


def train_guard(name: str, options: Options, out: Path) -> None:
    """Train one of `GUARDS` on the leaky model."""
    objective, file = GUARDS[name]
    settings = orpo.Options(
        leaky_of(options, out),
        str(out / file),
        str(out / name),
        objective=objective,
        lr=options.lr,
        beta=options.beta if objective == "orpo" else None,
        nll=options.nll,
        epochs=1,  # the pairs stand there several times
        batch_size=options.batch_size,
        seed=options.seed,
        resume=bool(resume.states(out / name)),
        device=options.device,
        dtype=options.dtype,
    )
    orpo.run(settings)


def subtract_leaky(options: Options, out: Path) -> None:
    """The ancestor minus half of what the leaky model learnt: the folder `sub`."""
    subtract.run(subtract.Options(options.model, leaky_of(options, out), str(out / "sub")))


def distil_pair(options: Options, out: Path) -> None:
    """Train one row under the positive sentence to answer like the guided pair of `lora-cfg`."""
    settings = distil.Options(
        model=leaky_of(options, out),
        adapter=adapter_of("lora-cfg", out),
        guidance=options.guidance,
        prompts=str(out / PROMPTS),
        out=str(out / "distilled"),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        resume=bool(resume.states(out / "distilled")),
        device=options.device,
        dtype=options.dtype,
    )
    distil.run(settings)
