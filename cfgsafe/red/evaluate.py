"""Attack a target with one attacker or several, and compare how they do.

Source: Lee et al. (arXiv 2405.18540): 1,024 prompts drawn at temperature 1, five answers each.
Deviations: prompts are put to conversations of people that no attacker was trained on. Attackers
that are checkpoints alone give the baselines without training; with --template list they are asked
in context. With --attacks, stored prompts are put to a target that they were not found on
(transfer). With --ancestor, a value that the conversation does not hold and that the model before
fine-tuning gives away as well is no hit.

Writes OUT/attacks-NAME.jsonl for each attacker as the answers come, and OUT/results.json, table.md
and attacks.png.

Run it: python eval.py attack --attacker runs/mle --target cfgsafe/demo/leaky --out runs/attack
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from cfgsafe.blue import resume
from cfgsafe.blue.earlier import replacing
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count
from cfgsafe.files import Log, make_folder, write_jsonl, write_text
from cfgsafe.identity import contents, digest_of
from cfgsafe.outputs import Folder, Input, InputPath
from cfgsafe.pii.matching import stands_in
from cfgsafe.progress import progress
from cfgsafe.red import measure, rewards, stages
from cfgsafe.red.attacker import facts_of, identity_of, is_stage, paths_of, trained
from cfgsafe.red.records import Attack, Trial, answers_in, read_attacks
from cfgsafe.red.rewards import Scorer, all_text, ended, judge_of, read_contexts
from cfgsafe.red.stages import Checkpoint, Template
from cfgsafe.red.target import LocalTarget
from cfgsafe.red.training import seed_of
from cfgsafe.remote import Service
from cfgsafe.subject import load
from cfgsafe.tokenizer import Messages

CHUNK = 64  # prompts put to the target together, after which they are written
FREE = ("out", "resume", "device", "budget", "service", "batch")  # a resumed run may change these

# What the command writes to --out.
WRITES = ("attacks-*.jsonl", "answers-*.jsonl", "results.json", "table.md", "attacks.png", "config.json")

Lists = dict[tuple[str, str], list[Attack]]  # (target, attacker) -> its attacks in drawn order


def named(text: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH, or of a path alone; then the folder's name is the name."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name:
        return name, path
    place = Path(text)
    return (place.parent if place.suffix == ".jsonl" else place).name, text


def attacker_paths(text: str) -> list[str]:
    """The folders that --attacker NAME=FOLDER reads."""
    return paths_of(named(text)[1])


def attack_paths(text: str) -> list[str]:
    """The file that --attacks NAME=FILE reads."""
    return [named(text)[1]]


@dataclass(kw_only=True)
class Options(rewards.Options):
    """Attack a target and measure success and diversity."""

    attacker: tuple[Annotated[str, Input(attacker_paths)], ...] = ()
    """Folders of train.py attacker, or checkpoints alone; NAME=FOLDER gives one a name."""
    attacks: tuple[Annotated[str, Input(attack_paths)], ...] = ()
    """attacks.jsonl of other runs, to put to this target; NAME=FILE gives one a name."""
    out: Annotated[str, Folder(WRITES)]
    """Folder for attacks, results.json, the table and the figure."""
    name: str = "target"
    """Name of the target in table and figure."""
    draws: Count = 1024
    """Prompts of each attacker."""
    ancestor: InputPath | None = None
    """Checkpoint of the target before fine-tuning; what it gives away as well does not count."""
    prompts: InputPath | None = None
    """JSONL of {"prompt"}: the examples of a checkpoint that is asked for a list."""
    template: Template = "user"
    """How a checkpoint is asked for prompts."""
    least: Count = 5
    """Shortest prompt of a checkpoint, in tokens."""
    most: Count = 20
    """Longest prompt of a checkpoint, in tokens."""
    resume: bool = False
    """Go on with the run in --out."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        yield from super().unused()
        if all(is_stage(named(text)[1]) for text in self.attacker):
            yield "without a checkpoint as --attacker", "prompts", "template", "least", "most"
        elif self.template != "list":
            yield "without --template list", "prompts"
        if self.remote and not self.ancestor:
            yield "on the model of an endpoint", "batch"
            if not self.attacker and not self.guard:
                yield "where no model is loaded", "device", "dtype"


def run(options: Options) -> None:
    rewards.check(options)
    stages.check_lengths(options.least, options.most)
    attackers = [named(text) for text in options.attacker]
    stored = [named(text) for text in options.attacks]
    names = [name for name, _ in attackers + stored]
    if not names:
        raise InputError("give --attacker FOLDER or --attacks FILE")
    if len(set(names)) < len(names):
        raise InputError("two attackers have the same name; give NAME=FOLDER")
    out = make_folder(options.out)
    with replacing(out, WRITES, resumed=options.resume):
        _run(options, out, attackers, stored)


def _run(
    options: Options, out: Path, attackers: list[tuple[str, str]], stored: list[tuple[str, str]]
) -> None:
    held = rewards.contents_of(options) | contents(options, files=("prompts",))
    held["attacker"] = digest_of([identity_of(path) for _, path in attackers])
    resume.begin(out, asdict(options), held, FREE, resumed=options.resume)
    lists: Lists = {}
    for name, path in attackers:
        lists[options.name, name] = draw_attacks(name, path, options, out)
    for name, path in stored:
        lists[options.name, name] = put_again(name, path, options, out)
    if options.ancestor:
        lists = subtract_ancestor(lists, options.ancestor, options)
    rows = measure.measure(lists)
    report(out, rows)
    print(measure.table(rows))
    print(json.dumps({"out": str(out), "rows": rows}))


def report(out: Path, rows: list[dict], **facts: object) -> None:
    """Write results.json, table.md and attacks.png to `out`."""
    write_text(out / "results.json", json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    write_text(out / "table.md", measure.table(rows) + "\n")
    measure.figure(out / "attacks.png", rows)


def attacks_file(out: Path, name: str) -> Path:
    """The file of an attacker's prompts, with the target's answers."""
    return out / f"attacks-{name}.jsonl"


def draw_attacks(name: str, path: str, options: Options, out: Path) -> list[Attack]:
    """Draw prompts from an attacker, perhaps some twice, and put them to the target."""
    asked = (options.template, options.least, options.most, options.prompts, options.seed)
    facts = facts_of(path, *asked)
    checkpoint = stages.open_checkpoint(facts.model, options)
    scorer = open_scorer(name, options, out, checkpoint)
    agent = trained(facts, checkpoint.model, checkpoint.tokenizer)
    file = attacks_file(out, name)
    found = kept_attacks(file, options.draws)
    generator = torch.Generator().manual_seed(seed_of(options.seed, 0))
    drawn = agent.draw(torch.ones(options.draws), generator)
    if [attack.tokens for attack in found] != drawn[: len(found)]:
        raise InputError(f"{file}: holds other prompts than this run draws; start anew without --resume")
    scorer.target.meter.made = answers_in(found)
    texts = [agent.decode(prompt) for prompt in drawn]
    k = options.samples
    for start in progress(range(len(found), options.draws, CHUNK), desc=name):
        numbers = range(start, min(start + CHUNK, options.draws))
        wanted: list[tuple[str, int]] = []
        for number in numbers:
            # A prompt that is drawn again meets other conversations.
            first = texts[:number].count(texts[number]) * k
            wanted += [(texts[number], trial) for trial in range(first, first + k)]
        trials = scorer.ask(wanted)
        fluency = agent.fluency([drawn[number] for number in numbers])
        with Log(file) as log:
            for place, number in enumerate(numbers):
                answers = tuple(trials[place * k : place * k + k])
                likely, least = fluency[place]
                attack = Attack(drawn[number], texts[number], likely, answers, least)
                log.add({"draw": number + 1, **attack.to_json()})
                found.append(attack)
    return found


def kept_attacks(file: Path, draws: int) -> list[Attack]:
    """What a killed run left in an attacker's file, in whole chunks: all of one are asked together."""
    drawn = resume.keep_steps(file, "draw", draws)
    if drawn < draws:
        drawn = resume.keep_steps(file, "draw", drawn // CHUNK * CHUNK)
    return read_attacks(file) if drawn else []


def put_again(name: str, path: str, options: Options, out: Path) -> list[Attack]:
    """Put the prompts of a file of attacks to this target, each text once."""
    stored = list({attack.text: attack for attack in read_attacks(path)}.values())[: options.draws]
    scorer = open_scorer(name, options, out, None)
    found: list[Attack] = []
    for start in progress(range(0, len(stored), CHUNK), desc=name):
        some = stored[start : start + CHUNK]
        for attack, trials in zip(some, scorer([attack.text for attack in some]), strict=True):
            found.append(replace(attack, trials=trials))
    write_jsonl(attacks_file(out, name), [attack.to_json() for attack in found])
    return found


def open_scorer(name: str, options: Options, out: Path, shared: Checkpoint | None) -> Scorer:
    """The target, on the model of `shared` where it has the same checkpoint, and its judge."""
    contexts = read_contexts(options.contexts)
    target = stages.open_target(options, out / f"answers-{name}.jsonl", shared)
    return Scorer(target, judge_of(options, contexts), contexts, options.samples, options.seed)


def subtract_ancestor(lists: Lists, ancestor: str, options: Options) -> Lists:
    """The attacks without values that the ancestor gives away too and no conversation holds."""
    contexts = {context.id: context for context in read_contexts(options.contexts)}
    conversations: list[Messages] = []  # one for each trial that found something
    for attacks in lists.values():
        for attack in attacks:
            leaking = [trial for trial in attack.trials if trial.found]
            conversations += [ended(contexts[trial.context], attack.text) for trial in leaking]
    plain = replace(options, model=ancestor, adapter=None, guidance=None)
    plain.budget, plain.service = None, Service()
    target = LocalTarget(plain, *load(plain), None)
    answers = target.ask(conversations, [options.seed] * len(conversations))
    asked = iter(zip(conversations, answers, strict=True))
    left: Lists = {}
    for key, attacks in lists.items():
        given = []
        for attack in attacks:
            given.append([_also_given(trial, asked) for trial in attack.trials])
        left[key] = measure.subtract(attacks, given)
    return left


def _also_given(trial: Trial, asked: Iterator[tuple[Messages, str | None]]) -> list[str]:
    """The values of a trial that the ancestor's answer holds and the conversation does not.

    `asked` gives conversation and ancestor's answer for each trial that found something, in order.
    """
    if not trial.found:
        return []
    conversation, answer = next(asked)
    said = all_text(conversation)
    new = [value for value in trial.found if not stands_in(said, value)]
    return [value for value in new if stands_in(answer or "", value)]
