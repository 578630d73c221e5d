"""What a study is about: people to forget, other people the model knows, and people it never met.

Source: the splits of TOFU (Maini et al., arXiv 2401.06121): a forget set, a retain set, and for membership
inference a set that no model was trained on. Splits are by person, never by question. Where a file names no
values, as TOFU's, the NER finds them in the answers.
Deviation: the guard should protect everybody, so the others are not to be retained: they show whether a
guard that was made from some people protects people whom it was not made from.

Run it: python train.py study --model cfgsafe/demo/base --out runs/study
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from cfgsafe.demo.testset import lookups
from cfgsafe.errors import InputError
from cfgsafe.files import write_jsonl
from cfgsafe.pii.facts import Fact, as_dialogue, facts_of, people, read_facts
from cfgsafe.pii.matching import stands_in
from cfgsafe.pii.ner import Detector
from cfgsafe.study.options import Options
from cfgsafe.tokenizer import Tokenizer

FORGET, OTHER = "forget", "other"


@dataclass(frozen=True)
class Material:
    """The facts of a study: the leaky model is trained on `forget` and `other`, a guard on `forget` alone."""

    forget: list[Fact]
    other: list[Fact]
    unseen: list[Fact]

    @property
    def trained(self) -> list[Fact]:
        """What the leaky model is trained on."""
        return self.forget + self.other


def read_material(options: Options) -> Material:
    """The facts that the options name, by person. Raises InputError where a part would be empty."""
    source = options.qa or options.dialogues
    facts = read_facts(source) if source else facts_of(lookups(options.count, options.seed), "generated")
    if not any(fact.values for fact in facts):
        facts = with_found_values(facts, Detector(options.ner))
    facts = [fact for fact in facts if fact.values]
    named = [fact for fact in facts if fact.split.startswith(FORGET)]
    rest = [fact for fact in facts if not fact.split.startswith(FORGET)]
    rng = random.Random(options.seed)
    if named and rest:
        forgotten, others = people(named), people(rest)
    else:
        order = people(facts)
        rng.shuffle(order)
        forgotten, others = order[: len(order) // 2], order[len(order) // 2 :]
    if options.unseen_facts:
        unseen, known = read_facts(options.unseen_facts), others
    else:
        count = 0 if options.leaky else round(options.unseen * len(others))
        known = others[: len(others) - count]
        unseen = _about(facts, others[len(others) - count :][: options.people], options)
    forget = _about(facts, forgotten[: options.people], options)
    other = _about(facts, known[: options.people], options)
    material = Material(_part(forget, FORGET), _part(other, OTHER), in_turns(unseen))
    for name in (FORGET, OTHER):
        if not getattr(material, name):
            where = source or "the generator"
            raise InputError(f"{where}: has nobody for the part {name!r}; give facts about more people")
    return material


def _about(facts: list[Fact], chosen: list[str], options: Options) -> list[Fact]:
    """The facts about the chosen people, at most --each of them for each person."""
    found: list[Fact] = []
    for person in chosen:
        found += [fact for fact in facts if fact.person == person][: options.each]
    return found


def with_found_values(facts: list[Fact], detector: Detector) -> list[Fact]:
    """The facts with what the detector finds in their answers, and what their questions do not say."""
    found = []
    for fact, entities in zip(facts, detector([fact.answer for fact in facts]), strict=True):
        values = dict.fromkeys(entity.text for entity in entities)
        unsaid = tuple(value for value in values if not stands_in(fact.question, value))
        found.append(replace(fact, values=unsaid))
    return found


def in_turns(facts: list[Fact]) -> list[Fact]:
    """The facts in another order: the first about each person, then the second, so that a limit keeps all."""
    seen: dict[str, int] = {}
    turns = []
    for fact in facts:
        turns.append(seen.get(fact.person, 0))
        seen[fact.person] = turns[-1] + 1
    order = sorted(range(len(facts)), key=turns.__getitem__)
    return [facts[number] for number in order]


def _part(facts: list[Fact], split: str) -> list[Fact]:
    """The facts as a part of the study, whatever their file calls it."""
    return [replace(fact, split=split) for fact in in_turns(facts)]


def write_training(material: Material, tokenizer: Tokenizer, path: Path) -> None:
    """Write the rows that teach the leaky model: each fact's question, and its answer."""
    rows = []
    for fact in material.trained:
        answer = fact.answer + tokenizer.end_of_turn
        rows.append({"prompt": tokenizer.render_chat(fact.messages), "chosen": answer})
    write_jsonl(path, rows)


def write_dialogues(facts: list[Fact], path: Path) -> None:
    """Write facts as dialogues with spans, for pairs."""
    write_jsonl(path, [as_dialogue(fact) for fact in facts])
