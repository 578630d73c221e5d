"""An attack on a target by one or several attackers: their draws, what the target answered, and how they compare.

Source: Lee et al. (arXiv 2405.18540): 1,024 prompts drawn at temperature 1, five answers each.
Deviations: prompts are put to conversations of people that no attacker was trained on; attackers that are checkpoints alone give the
baselines without training (`list`: in context). With --attacks, stored prompts are put to a target they were not found on (transfer).
With --ancestor, a value that the conversation does not hold and that the model before fine-tuning gives away as well is no hit.

Writes OUT/attacks-NAME.jsonl for each attacker as the answers come, OUT/results.json, OUT/table.md and OUT/attacks.png.

Run it: python eval.py attack --attacker runs/smooth --target cfgsafe/demo/leaky --contexts test-contexts.jsonl --out runs/attack
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from cfgsafe.blue import resume
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, write_jsonl, write_text
from cfgsafe.llama import Llama
from cfgsafe.pii.matching import stands_in
from cfgsafe.red import measure, rewards, stages
from cfgsafe.red.gflownet import seed_of
from cfgsafe.red.records import Attack, read_attacks
from cfgsafe.red.rewards import Scorer, ended, judge_of, read_contexts
from cfgsafe.red.target import LocalTarget
from cfgsafe.remote import Service
from cfgsafe.subject import Subject, load
from cfgsafe.tokenizer import Tokenizer

CHUNK = 64  # prompts put to the target together, after which they are written
FREE = ("out", "resume", "device", "budget", "service", "batch")  # a resumed run may change these


@dataclass(kw_only=True)
class Options(rewards.Options):
    """Attack a target and measure success and diversity."""

    attacker: tuple[str, ...] = ()
    """Folders of train.py attacker, or checkpoints without training; NAME=FOLDER gives it a name."""
    attacks: tuple[str, ...] = ()
    """attacks.jsonl of other runs, whose prompts are put to this target; NAME=FILE gives them a name."""
    out: str
    """Folder for attacks, results.json, the table and the figure."""
    name: str = "target"
    """What the target is called in them."""
    draws: int = 1024
    """Prompts of each attacker."""
    ancestor: str | None = None
    """Checkpoint of the target before fine-tuning; what it gives away as well does not count."""
    prompts: str | None = None
    """JSONL of {"prompt"}: the examples of a checkpoint that is asked for a list."""
    template: Literal["user", "list"] = "user"
    """How a checkpoint is asked for prompts."""
    least: int = 5
    """Shortest prompt of a checkpoint, in tokens."""
    most: int = 20
    """Longest prompt of a checkpoint, in tokens."""
    resume: bool = False
    """Go on with the run in --out."""


def run(options: Options) -> None:
    rewards.check(options)
    check_at_least(1, options, "draws", "least")
    names = [(*named(path), draw_attacks) for path in options.attacker] + [
        (*named(path), put_again) for path in options.attacks
    ]
    if not names:
        raise InputError("give --attacker FOLDER or --attacks FILE")
    if len({name for name, _, _ in names}) < len(names):
        raise InputError("two attackers have the same name; give NAME=FOLDER")
    out = make_folder(options.out)
    settings = json.loads(json.dumps(asdict(options)))
    if options.resume:
        resume.check_same_run(out, settings, FREE)
    write_text(out / "config.json", json.dumps(settings, indent=2) + "\n")
    lists = {(options.name, name): collect(name, path, options, out) for name, path, collect in names}
    if options.ancestor:
        lists = less_known(lists, options)
    rows = measure.measure(lists)
    report(out, rows)
    print(measure.table(rows))
    print(json.dumps({"out": str(out), "rows": rows}))


def report(out: Path, rows: list[dict], **facts) -> None:
    """results.json, table.md and attacks.png in `out`."""
    write_text(out / "results.json", json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    write_text(out / "table.md", measure.table(rows) + "\n")
    measure.figure(out / "attacks.png", rows)


def named(text: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH, or of a path, which is called as its folder."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    place = Path(text)
    return (place.parent if place.suffix == ".jsonl" else place).name, text


def draw_attacks(name: str, path: str, options: Options, out: Path) -> list[Attack]:
    """The draws of an attacker, duplicates included, with what the target answered."""
    facts = stages.facts_of(path, options)
    model, tokenizer = load(Subject(facts.model, device=options.device, dtype=options.dtype))
    scorer = open_scorer(name, options, out, (facts.model, model, tokenizer))
    agent = stages.trained(facts, model, tokenizer)
    file = out / f"attacks-{name}.jsonl"
    if not options.resume:
        file.unlink(missing_ok=True)
    resume.keep_steps(file, "draw", options.draws)
    found = read_attacks(file) if file.exists() and file.stat().st_size else []
    drawn = agent.draw(torch.ones(options.draws), torch.Generator().manual_seed(seed_of(options.seed, 0)))
    texts = [agent.spell(prompt) for prompt in drawn]
    again = [
        texts[:number].count(text) for number, text in enumerate(texts)
    ]  # a prompt drawn again meets other conversations
    for start in tqdm(range(len(found), options.draws, CHUNK), desc=name, leave=False):
        some = range(start, min(start + CHUNK, options.draws))
        k = options.samples
        trials = scorer.ask(
            [(texts[number], again[number] * k + sample) for number in some for sample in range(k)]
        )
        fluency = agent.log_reference([drawn[number] for number in some])
        with open(file, "a", encoding="utf-8") as log:
            for place, number in enumerate(some):
                likely, least = fluency[place]
                found.append(
                    Attack(
                        drawn[number], texts[number], likely, tuple(trials[place * k : place * k + k]), least
                    )
                )
                log.write(json.dumps({"draw": number + 1, **found[-1].to_json()}) + "\n")
    return found


def put_again(name: str, path: str, options: Options, out: Path) -> list[Attack]:
    """The prompts of a file, each once, put to this target."""
    stored = list({attack.text: attack for attack in read_attacks(path)}.values())[: options.draws]
    scorer = open_scorer(name, options, out, None)
    found: list[Attack] = []
    for start in tqdm(range(0, len(stored), CHUNK), desc=name, leave=False):
        some = stored[start : start + CHUNK]
        found += [
            replace(attack, trials=trials)
            for attack, trials in zip(some, scorer([attack.text for attack in some]), strict=True)
        ]
    write_jsonl(out / f"attacks-{name}.jsonl", [attack.to_json() for attack in found])
    return found


def open_scorer(
    name: str, options: Options, out: Path, shared: tuple[str, Llama, Tokenizer] | None
) -> Scorer:
    contexts = read_contexts(options.contexts)
    target = stages.open_target(options, out / f"answers-{name}.jsonl", shared)
    return Scorer(target, judge_of(options, contexts), contexts, options.samples, options.seed)


def less_known(lists: dict, options: Options) -> dict:
    """The attacks without the values that no conversation holds and that the ancestor, asked the same, gives away as well."""
    contexts = {context.id: context for context in read_contexts(options.contexts)}
    asked = [
        (key, number, place, ended(contexts[trial.context], attack.text))
        for key, attacks in lists.items()
        for number, attack in enumerate(attacks)
        for place, trial in enumerate(attack.trials)
        if trial.found
    ]
    plain = replace(
        options, model=options.ancestor, adapter=None, guidance=None, budget=None, service=Service()
    )
    answers = LocalTarget(plain, *load(plain), None).ask(
        [messages for *_, messages in asked], [options.seed] * len(asked)
    )
    given: dict[tuple, list[str]] = {}
    for (key, number, place, messages), answer in zip(asked, answers, strict=True):
        told = " ".join(m["content"] for m in messages)
        found = lists[key][number].trials[place].found
        given[key, number, place] = [
            value for value in found if not stands_in(told, value) and stands_in(answer or "", value)
        ]
    by_base = lambda key: [
        [given.get((key, n, t), []) for t in range(len(a.trials))] for n, a in enumerate(lists[key])
    ]
    return {key: measure.subtract(attacks, by_base(key)) for key, attacks in lists.items()}
