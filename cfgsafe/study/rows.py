"""One row of a study's table: everything that is measured of one model, asked in one way.

Source: the measures name theirs (cfgsafe/measure). The ways of asking are those of the reference
evaluation, and its missing controls: the conversation's own system prompt, the positive sentence alone
(g = 1), and guidance. Every measure of a row is asked in the same way.

    forget.*, other.*   what is kept of the people to forget, and of the others: cfgsafe/measure/memorised.py;
                        forget quality compares with the ancestor, which never saw the facts
    injected            values given to questions that try to undo the guard, in percent
    cloze               questions whose right option is the likeliest, unseen options, in percent
    refused, named      of the same questions without options: answers that refuse, and that name the right
                        option, in percent
    perplexity          of held-out dialogues

Run it: python train.py study --model cfgsafe/demo/base --out runs/study
"""

from dataclasses import dataclass, replace
from pathlib import Path

from cfgsafe.llama import Llama
from cfgsafe.measure import memorised, mmlu_pro, perplexity, utility
from cfgsafe.measure.intervals import Estimate, to_json
from cfgsafe.measure.memorisation import recall
from cfgsafe.measure.scoring import LEAST
from cfgsafe.pii.attempts import attempts
from cfgsafe.pii.facts import Fact
from cfgsafe.study.material import Material
from cfgsafe.study.options import Options
from cfgsafe.subject import Subject, answers, load
from cfgsafe.tokenizer import Tokenizer

Figures = dict[str, Estimate | None]


@dataclass(frozen=True)
class Row:
    """A model and the way it is asked; g is None for the conversation's own system prompt."""

    name: str
    model: str
    adapter: str | None = None
    guidance: float | None = None

    @property
    def title(self) -> str:
        """As the table shows it."""
        return self.name if self.guidance is None else f"{self.name} g={self.guidance:g}"


def subject_of(row: Row, options: Options) -> Subject:
    """The row's model, asked in its way."""
    device, dtype = options.device, options.dtype
    return Subject(row.model, row.adapter, guidance=row.guidance, device=device, dtype=dtype)


def measure(row: Row, material: Material, options: Options, out: Path) -> dict:
    """The figures of a row as JSON. The answers to its facts go to OUT/answers-TITLE.jsonl."""
    subject, forget = subject_of(row, options), material.forget[: options.limit]
    facts = forget + material.other[: options.limit]
    never: list[float | None] = []
    if any(fact.perturbed_answers for fact in facts):
        ancestor = replace(subject, model=options.model, adapter=None)
        never = memorised.truth_ratios(ancestor, *load(ancestor), facts)
    model, tokenizer = load(subject)
    figures: Figures = memorised.memorised(
        subject,
        model,
        tokenizer,
        facts,
        unseen=material.unseen[: options.limit],
        never=never,
        max_new_tokens=options.max_new_tokens,
        out=str(out / f"answers-{row.title.replace(' ', '-')}.jsonl"),
    )
    tried: list[Fact] = []
    for fact in forget[: -(-len(forget) // 3)]:  # a third, as each is asked in several ways
        tried += attempts(fact).values()
    figures["injected"] = recalled(subject, model, tokenizer, tried, options.max_new_tokens)
    harmless = [question for _, question in mmlu_pro.read(options.questions)[: options.limit]]
    found = utility.over_refusal(subject, model, tokenizer, harmless, options.max_new_tokens)
    figures |= {name: found[name] for name in ("refused", "named")}
    figures["perplexity"] = perplexity_of(subject, model, tokenizer, options)
    line = {"model": row.title, **subject.guarded, **to_json(figures)}
    return line | cloze(row, model, tokenizer, options)


def recalled(
    subject: Subject, model: Llama, tokenizer: Tokenizer, facts: list[Fact], longest: int
) -> Estimate | None:
    """Percentage of the facts' values in the greedy answers; the interval is over persons."""
    asked, places = [fact.messages for fact in facts], [fact.place for fact in facts]
    given = answers(subject, model, tokenizer, asked, "facts", longest, places)
    return recall(facts, given)


def cloze(row: Row, model: Llama, tokenizer: Tokenizer, options: Options) -> dict:
    """Right options found without being shown, in percent; "cloze_right" says which questions."""
    subject = subject_of(row, options)
    settings = utility.Options(**vars(subject), protocol="cloze", score="loglik", questions=options.questions)
    placed = mmlu_pro.read(options.questions)[: options.limit]
    asked = utility.conversations(placed, settings)
    figures, columns = utility.by_likelihood(settings, model, tokenizer, placed, asked)
    right = [int(column["correct"]) for column in columns]
    return {"cloze": figures["utility"], "cloze_ci": figures["utility_ci"], "cloze_right": right}


def perplexity_of(subject: Subject, model: Llama, tokenizer: Tokenizer, options: Options) -> Estimate | None:
    """Perplexity of the held-out dialogues, as `eval.py perplexity` gives it."""
    dialogues = perplexity.read_dialogues(options.texts)[: options.limit]
    parts = perplexity.dialogue_logprobs(subject, model, tokenizer, dialogues)
    return perplexity.pooled([part.clamp(min=LEAST) for part in parts])
