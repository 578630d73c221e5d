"""From a chat model to a table of what each guard forgets, how deep, and at what price.

Source: Smirnov (arXiv 2412.06846) for the method; its controls, NPO and dpo-idk as baselines, and the
measures of forgetting that reviews ask for since TOFU (arXiv 2401.06121).
Deviation: the paper's leaky model saw dialogues of a challenge; this one learns given facts about people by
heart, so that recall can be told from echo.

The conductor only says what comes next: stages are the commands of train.py and eval.py. What a stage made
stays in --out, and a study that was stopped goes on there. Before the first stage it says what all will
cost; after each, how long it took and how much is left.

Run it: python train.py study --model cfgsafe/demo/base --out runs/study
"""

import ctypes
import gc
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from cfgsafe.blue import resume
from cfgsafe.blue.loop import peak_memory
from cfgsafe.config import read_config
from cfgsafe.files import Log, make_folder, read_json, read_log
from cfgsafe.hub import resolve
from cfgsafe.identity import contents
from cfgsafe.load import load_tokenizer
from cfgsafe.pii.ner import Detector
from cfgsafe.report.results import markdown
from cfgsafe.study import table
from cfgsafe.study.cost import Cost, Rates, calibrate, predicted, training_memory
from cfgsafe.study.material import Material, read_material
from cfgsafe.study.options import Options, check
from cfgsafe.study.plan import Stage, stages_of
from cfgsafe.subject import Subject, load

FREE = ("out", "plan", "teraflops", "device")  # what a study that goes on may change
PRODUCTS = "64"  # sizes of matrix products whose compiled code a processor keeps


def run(options: Options) -> None:
    check(options)
    # oneDNN compiles a product for each new size, a megabyte of code in bfloat16, and keeps 1,024 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS)
    material = read_material(options)
    tokenizer, out = load_tokenizer(options.model), Path(options.out)
    stages = stages_of(options, material, tokenizer, out)
    rates = rates_of(options)
    print(describe(options, material, stages, rates), flush=True)
    if options.plan:
        return
    make_folder(out / "rows")
    begin(options, out)
    conduct(stages, rates, options.device, out)
    facts: dict = {
        "facts to forget": len(material.forget),
        "others": len(material.other),
        "seed": options.seed,
    }
    facts |= {"filter of the pairs": Detector(options.ner).name, "minutes": minutes_of(out)}
    print(table.write(read_rows(out, stages), facts, out))
    print(f"\n{out}/report.md, results.json and study.png")


def rates_of(options: Options) -> Rates:
    """Seconds for a token: by --teraflops, or measured here on the ancestor."""
    if options.teraflops:
        config = read_config(resolve(options.model, weights=False))
        return predicted(config, options.leaky_rank, options.teraflops)
    model, _ = load(Subject(options.model, device=options.device, dtype=options.dtype))
    return calibrate(model, options.leaky_rank)


def describe(options: Options, material: Material, stages: list[Stage], rates: Rates) -> str:
    """What the study is about, and what each stage will cost."""
    lines = []
    for stage in stages:
        cost, minutes = stage.cost, rates.seconds(stage.cost) / 60
        done = "done" if stage.done else f"{minutes:.1f}"
        lines.append([stage.name, str(cost.trained), str(cost.read), str(cost.written), done])
    left = sum((stage.cost for stage in stages if not stage.done), Cost())
    config = read_config(resolve(options.model, weights=False))
    memory = training_memory(config, material, options) / 2**30
    how = "predicted from operations" if options.teraflops else "predicted from a calibration on this machine"
    people = f"{len(material.forget)} facts to forget, {len(material.other)} about others, "
    people += f"{len(material.unseen)} never seen"
    table_of_costs = markdown(["stage", "tokens trained", "read", "written", "minutes"], lines)
    total = f"{rates.seconds(left) / 60:.0f} minutes and at least {memory:.1f} GiB, {how}."
    return "\n".join([people, table_of_costs, total])


def begin(options: Options, out: Path) -> None:
    """Note what this study is, or check that the one in `out` is the same. Raises InputError."""
    folders, files = ("model", "leaky"), ("qa", "dialogues", "unseen_facts", "questions", "texts")
    held, settings = contents(options, folders, files), asdict(options)
    resume.check_same_run(out / resume.CONFIG, settings, held, FREE, "choose another --out")
    resume.write_config(out / resume.CONFIG, settings, held)


def conduct(stages: list[Stage], rates: Rates, device: str, out: Path) -> None:
    """Run the stages that are not done; stages.jsonl gets the time and the peak memory of each."""
    took = expected = 0.0
    for number, stage in enumerate(stages, start=1):
        if stage.done:
            continue
        started = time.perf_counter()
        stage.run()
        give_memory_back()
        seconds = time.perf_counter() - started
        took, expected = took + seconds, expected + rates.seconds(stage.cost)
        row = {"stage": stage.name, "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(device)}
        with Log(out / "stages.jsonl") as log:
            log.add(row)
        rest = sum(rates.seconds(later.cost) for later in stages[number:] if not later.done)
        left = rest * took / max(expected, 1.0) / 60
        done = f"[{number}/{len(stages)}] {stage.name}: {seconds / 60:.1f} min"
        print(f"{done}, about {left:.0f} min left", file=sys.stderr, flush=True)


def give_memory_back() -> None:
    """Return what a stage has freed to the system.

    glibc keeps it, in pieces, and a long study would hold what its largest stages once needed.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries have none
        if trim:
            trim(0)


def minutes_of(out: Path) -> float:
    """What all stages took together, in minutes."""
    return round(sum(row["seconds"] for _, row in read_log(out / "stages.jsonl", "stage")) / 60, 1)


def read_rows(out: Path, stages: list[Stage]) -> list[dict]:
    """The figures of the measured rows, in the order of the table."""
    return [read_json(stage.product) for stage in stages if stage.product.parent.name == "rows"]
