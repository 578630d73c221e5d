"""What a model has kept of the facts that it was trained on.

Source: the measures of cfgsafe/measure/memorisation.py, truth.py and membership.py, which name
theirs. Each fact is asked as trained, in other words and, where a value and a person are known,
inverted: from the value to the person. A value counts as recalled where the whole of it stands in
the answer, in any spelling (cfgsafe/pii/matching.py, the rule of `eval.py leak`).
Deviations: everything is under the guidance asked for; intervals are over persons.

Figures, each with those of its splits where the facts have several ("forget.recall"):

    percent     recall, recall_partial, rouge_l; the same of the question _reworded and _inverted;
                exact_memorisation, extraction_strength; cut_off, no_answer
    0 to 1      probability; truth_ratio, as TOFU the mean of the smaller of R and 1 / R, so that 1
                is ignorance; forget_quality; membership_loss and membership_min_k, AUCs;
                model_utility

Recall is over the values, the other figures over the facts. Facts of cfgsafe/pii/facts.py; what a
file does not hold leaves its figures out.

Run it: python eval.py memorised --model M --facts facts.jsonl
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from cfgsafe.errors import InputError
from cfgsafe.fields import Count, check_ranges
from cfgsafe.files import Answer, make_folder, write_jsonl
from cfgsafe.llama import Llama
from cfgsafe.measure import mmlu_pro
from cfgsafe.measure.intervals import Estimate, fault_interval, ratio_interval, share_interval, to_json
from cfgsafe.measure.membership import ATTACKS, membership
from cfgsafe.measure.memorisation import (
    answer_scores,
    exact_memorisation,
    extraction_strength,
    longest_part,
    recall,
    rouge_l,
)
from cfgsafe.measure.scoring import TokenScores
from cfgsafe.measure.truth import Known, Truth, as_facts, forget_quality, model_utility, texts_of, truth_of
from cfgsafe.outputs import File, InputPath
from cfgsafe.pii.facts import Fact, inverted, people, read_facts, reworded
from cfgsafe.pii.matching import stands_in
from cfgsafe.subject import Subject, answers, load
from cfgsafe.tokenizer import Tokenizer

LONGEST = 64  # tokens of an answer
AS_TRAINED, REWORDED, INVERTED = "", "_reworded", "_inverted"  # how a fact is asked; ends a figure's name
NO_SPLIT = "unnamed"  # what facts without a split are called beside others

Figures = dict[str, Estimate | None]


@dataclass
class Options(Subject):
    """Measure what a model has kept of the facts that it was trained on."""

    facts: InputPath = field(kw_only=True)
    """JSONL of the facts: questions and answers, or dialogues with spans."""
    unseen: InputPath | None = None
    """JSONL of facts like them about people never trained on, for membership inference."""
    never: InputPath | None = None
    """Checkpoint folder or hub id of a model never trained on the facts, for forget quality."""
    retain: InputPath | None = None
    """JSONL of facts that should be kept, for model utility."""
    questions: InputPath | None = None
    """Multiple-choice questions in MMLU-Pro's shape, for model utility: a set for each category."""
    out: Annotated[str, File(("{name}.kept",))] | None = None
    """JSONL file for the answers and figures of each fact."""
    limit: Count | None = None
    """Use only the first facts of each file."""
    max_new_tokens: Count = LONGEST
    """Longest answer, in tokens."""


@dataclass(frozen=True)
class Found:
    """What a model makes of a fact."""

    fact: Fact
    asked: dict[str, Fact]  # how it was asked -> that question
    answers: dict[str, Answer]  # how it was asked -> the model's answer
    scores: TokenScores  # of the answer that it was trained on
    truth: Truth
    never: float | None = None  # truth ratio of a model never trained on it

    @property
    def row(self) -> dict:
        """As --out writes it."""
        row: dict = {"place": self.fact.place, "person": self.fact.person, "split": self.fact.split}
        row |= {"question": self.fact.question, "answer": self.fact.answer, "values": list(self.fact.values)}
        for form, answer in self.answers.items():
            values = self.asked[form].values
            recalled = [value for value in values if stands_in(answer.text, value)]
            row |= {f"model_answer{form}": answer.text, f"recalled{form}": recalled, f"cut{form}": answer.cut}
        row |= {"exact_memorisation": exact_memorisation(self.scores.likeliest)}
        row |= {"extraction_strength": extraction_strength(self.scores.likeliest)}
        row |= {"probability": self.truth.answer, "truth_ratio": self.truth.ratio}
        return row | {name: attack(self.scores) for name, attack in ATTACKS.items()}


def run(options: Options) -> None:
    check_ranges(options)
    facts = read_facts(options.facts)[: options.limit]
    unseen = read_facts(options.unseen)[: options.limit] if options.unseen else []
    known = read_facts(options.retain)[: options.limit] if options.retain else []
    if options.questions:
        known += as_facts(mmlu_pro.read(options.questions)[: options.limit])
    if options.never and not any(fact.perturbed_answers for fact in facts):
        raise InputError(
            f"--never {options.never}: no fact of {options.facts} has a 'perturbed_answer'; leave it out"
        )
    if options.out:
        make_folder(Path(options.out).parent)
    never: list[float | None] = []
    if options.never:
        other = replace(options, model=options.never, adapter=None)
        never = truth_ratios(other, *load(other), facts)
    figures = memorised(
        options,
        *load(options),
        facts,
        unseen=unseen,
        never=never,
        known=known,
        max_new_tokens=options.max_new_tokens,
        out=options.out,
    )
    counts = {"facts": len(facts), "persons": len(people(facts)), **options.guarded}
    print(json.dumps({**counts, **to_json(figures)}))


def memorised(
    subject: Subject,
    model: Llama,
    tokenizer: Tokenizer,
    facts: list[Fact],
    *,
    unseen: Sequence[Fact] = (),
    never: Sequence[float | None] = (),
    known: Sequence[Fact] = (),
    max_new_tokens: int = LONGEST,
    out: str | None = None,
) -> Figures:
    """The figures above, by name; those that the facts do not allow are None or left out.

    `unseen` are facts about people never trained on (membership), `never` the `truth_ratios` of a
    model never trained on the facts (forget quality), `known` what should be kept (model utility):
    retained facts, and questions by `truth.as_facts`; each of their splits is a set. The file `out`
    gets a row for each fact, and `out`.kept beside it keeps answers as `subject.answers` does.
    Raises InputError and ContextError naming the fact that cannot be asked.
    """
    kept = Path(f"{out}.kept") if out else None
    found = ask(subject, model, tokenizer, facts, max_new_tokens, kept, never)
    others = answer_scores(subject, model, tokenizer, unseen, [fact.answer for fact in unseen])
    figures = _figures(found, unseen, others)
    splits = list(dict.fromkeys(each.fact.split for each in found))
    for split in splits if len(splits) > 1 else []:
        part = [each for each in found if each.fact.split == split]
        for name, figure in _figures(part, unseen, others).items():
            figures[f"{split or NO_SPLIT}.{name}"] = figure
    figures["model_utility"] = utility(subject, model, tokenizer, known, max_new_tokens, kept)
    if out:
        write_jsonl(out, [each.row for each in found])
    return figures


def ask(
    subject: Subject,
    model: Llama,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    max_new_tokens: int = LONGEST,
    kept: Path | None = None,
    never: Sequence[float | None] = (),
    forms: Sequence[str] = (AS_TRAINED, REWORDED, INVERTED),
) -> list[Found]:
    """Ask each fact in its forms, and score the answers that it gives; `never`: see `memorised`."""
    asked = [{form: each for form, each in in_forms(fact).items() if form in forms} for fact in facts]
    every = list(chain.from_iterable(each.values() for each in asked))
    conversations, places = [each.messages for each in every], [each.place for each in every]
    given = iter(answers(subject, model, tokenizer, conversations, "facts", max_new_tokens, places, kept))
    scored = score(subject, model, tokenizer, facts)
    found = []
    for number, fact in enumerate(facts):
        of_forms = {form: next(given) for form in asked[number]}
        of_never = never[number] if never else None
        found.append(Found(fact, asked[number], of_forms, *scored[number], of_never))
    return found


def in_forms(fact: Fact) -> dict[str, Fact]:
    """The fact as trained, in other words and inverted.

    It is not inverted where the conversation before it holds the name, which would be an echo.
    """
    forms = {AS_TRAINED: fact, REWORDED: reworded(fact)}
    back = inverted(fact)
    said = " ".join(message["content"] for message in back.messages) if back else ""
    if back and not stands_in(said, back.answer):
        forms[INVERTED] = back
    return forms


def score(
    subject: Subject, model: Llama, tokenizer: Tokenizer, facts: Sequence[Fact]
) -> list[tuple[TokenScores, Truth]]:
    """The scores of each fact's answer, and how likely it is beside its other answers."""
    asked: list[Fact] = []
    texts: list[str] = []
    for fact in facts:
        asked += [fact] * len(texts_of(fact))
        texts += texts_of(fact)
    scores = iter(answer_scores(subject, model, tokenizer, asked, texts))
    found = []
    for fact in facts:
        own = list(islice(scores, len(texts_of(fact))))
        found.append((own[0], truth_of(fact, [each.logprobs for each in own])))
    return found


def truth_ratios(
    subject: Subject, model: Llama, tokenizer: Tokenizer, facts: Sequence[Fact]
) -> list[float | None]:
    """The truth ratio of each fact; None where it has no perturbed answers."""
    return [truth.ratio for _, truth in score(subject, model, tokenizer, facts)]


def utility(
    subject: Subject,
    model: Llama,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    max_new_tokens: int = LONGEST,
    kept: Path | None = None,
) -> Estimate | None:
    """TOFU's model utility, 0 to 1, over the splits of the facts; None without facts.

    An answer that did not come counts as an empty one. Where a fact has wrong answers and no
    paraphrase, as a multiple-choice question, its probability is that of the right answer among all.
    """
    sets: dict[str, list[Known]] = {}
    for each in ask(subject, model, tokenizer, facts, max_new_tokens, kept, forms=(AS_TRAINED,)):
        fact, truth = each.fact, each.truth
        is_choice = bool(fact.perturbed_answers) and not fact.paraphrased_answer
        probability = truth.chosen if is_choice else truth.answer
        true = None if truth.ratio is None else max(0.0, 1 - truth.ratio)
        rouge = rouge_l(each.answers[AS_TRAINED].text, fact.answer)
        sets.setdefault(fact.split, []).append(Known(probability, rouge, true, fact.person))
    return model_utility(list(sets.values()))


def _figures(found: list[Found], unseen: Sequence[Fact], others: list[TokenScores]) -> Figures:
    """The figures of some facts; `others` are the scores of the unseen ones."""
    figures: Figures = {}
    for form in (AS_TRAINED, REWORDED, INVERTED):
        figures |= _recall([each for each in found if form in each.answers], form)
    persons = [each.fact.person for each in found]
    given = list(chain.from_iterable(each.answers.values() for each in found))
    owners = list(chain.from_iterable([each.fact.person] * len(each.answers) for each in found))
    figures["cut_off"] = share_interval([answer.cut for answer in given], clusters=owners)
    figures["no_answer"] = fault_interval([answer.broken for answer in given], owners)
    hits = [each.scores.likeliest for each in found]
    figures["exact_memorisation"] = share_interval(list(map(exact_memorisation, hits)), clusters=persons)
    figures["extraction_strength"] = share_interval(list(map(extraction_strength, hits)), clusters=persons)
    figures["probability"] = ratio_interval([each.truth.answer for each in found], clusters=persons)
    ratios, of_ratios = [], []
    for each in found:
        if each.truth.ratio is not None:
            ratios.append(min(each.truth.ratio, 1 / each.truth.ratio))
            of_ratios.append(each.fact.person)
    figures["truth_ratio"] = ratio_interval(ratios, clusters=of_ratios)
    figures |= forget_quality([each.truth.ratio for each in found], [each.never for each in found])
    scores = [each.scores for each in found]
    return figures | membership([each.fact for each in found], scores, unseen, others)


def _recall(found: list[Found], form: str) -> Figures:
    """Recall, exact and partial, and ROUGE-L of the facts asked in one form, in percent.

    An answer that did not come is in none of them.
    """
    parts, totals, rouge, persons = [], [], [], []
    for each in found:
        fact, answer = each.asked[form], each.answers[form]
        if not answer.broken:
            parts.append(sum(longest_part(answer.text, value) for value in fact.values))
            totals.append(len(fact.values))
            rouge.append(rouge_l(answer.text, fact.answer))
            persons.append(fact.person)
    asked, given = [each.asked[form] for each in found], [each.answers[form] for each in found]
    return {
        f"recall{form}": recall(asked, given),
        f"recall_partial{form}": share_interval(parts, totals, persons),
        f"rouge_l{form}": share_interval(rouge, clusters=persons),
    }
