"""How far persons planted in the training data stand out from persons never trained on.

Source: canary exposure (Carlini et al., arXiv 1802.08232), as an AUC. The model is asked about a
person; the score is the mean log-likelihood of one of the person's items as the answer, under the
guidance asked for. The AUC is the chance that a planted person has a higher score than one never
trained on, for the same question and item; 0.5 means no trace of the planting. Guidance in
probability space makes some items impossible: these tie, and `impossible` is their percentage.
There is no AUC where all items are impossible, because nothing was compared.
Deviations: token means, because names differ in length. Each group of planted persons is compared
with all persons never trained on, because twins alone, 8 per group in the demo, would give wide
intervals. Each person is asked about in several wordings, and is one unit with all of these scores.

Probes JSONL: {"person", "repeats", "messages", "value"} per line. `repeats` says how often the
person was planted, 0 for never. `messages` may end within an answer; `value` continues it, and
begins with the blank between them. Every person needs the same questions in the same order.
Default: the demo's 32 persons, 8 planted 1, 4, 16 and 64 times each, and 32 twins.

Run it: python eval.py canaries --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass
from itertools import chain, islice

from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.hub import PROBES
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, auc_interval, share_interval, to_json
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.request import Request
from cfgsafe.settings import shown
from cfgsafe.subject import Subject, checked_request, load
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages

Probe = tuple[Messages, str]  # a conversation, and how it goes on


@dataclass
class Options(Subject):
    """Compare the likelihood of planted persons with that of persons never trained on."""

    probes: str = PROBES
    """JSONL of person, repeats, messages and value; default: the demo's planted persons."""


@dataclass
class Person:
    """A person planted `repeats` times (0: never), and the questions about the person."""

    repeats: int
    probes: list[Probe]


def run(options: Options) -> None:
    persons = read_persons(options.probes)
    model, tokenizer = load(options)
    print(json.dumps({**options.guarded, **to_json(exposure(options, model, tokenizer, persons))}))


def read_persons(path: str) -> list[Person]:
    """The persons of a file of probes. Raises InputError naming line and field."""
    persons: dict[str, Person] = {}
    for place, row in read_jsonl(path):
        name, repeats, value = row.get("person"), row.get("repeats"), row.get("value")
        if not isinstance(name, str) or not isinstance(value, str) or not value.strip():
            raise InputError(f"{place}: needs 'person' and 'value', strings that are not empty")
        if type(repeats) is not int or repeats < 0:
            raise InputError(
                f"{place}: 'repeats' must be how often the person was planted, a whole number of at least 0"
            )
        person = persons.setdefault(name, Person(repeats, []))
        if person.repeats != repeats:
            earlier = f"{person.repeats} on an earlier line of {shown(name)}"
            raise InputError(f"{place}: 'repeats' is {repeats}, but {earlier}")
        person.probes.append((check_messages(row.get("messages"), place), value))
    if {person.repeats > 0 for person in persons.values()} != {True, False}:
        raise InputError(
            f"{path}: needs persons with 'repeats' above 0 and persons with 0 to compare them with"
        )
    if len({len(person.probes) for person in persons.values()}) > 1:
        raise InputError(
            f"{path}: each person needs the same questions in the same order, but they differ in number"
        )
    return list(persons.values())


def exposure(
    subject: Subject, model: Llama, tokenizer: Tokenizer, persons: list[Person]
) -> dict[str, Estimate | None]:
    """AUC, 0 to 1, of the persons planted n times as "auc_xn", and percentage of impossible items.

    Persons are the units. Raises ContextError naming the probe that is too long.
    """
    scores = likelihoods(subject, model, tokenizer, [person.probes for person in persons])
    by_repeats: dict[int, list[list[float]]] = {}
    impossible = []
    for person, values in zip(persons, scores, strict=True):
        by_repeats.setdefault(person.repeats, []).append(values)
        impossible.append(sum(map(math.isinf, values)))
    never = by_repeats.pop(0)
    figures: dict[str, Estimate | None] = {}
    for repeats, planted in sorted(by_repeats.items()):
        told = any(map(math.isfinite, chain.from_iterable(planted + never)))
        figures[f"auc_x{repeats}"] = auc_interval(planted, never) if told else None
    figures["impossible"] = share_interval(impossible, [len(values) for values in scores])
    return figures


def likelihoods(
    subject: Subject, model: Llama, tokenizer: Tokenizer, groups: list[list[Probe]]
) -> list[list[float]]:
    """Guided mean log-likelihood of each value, nats per token. Raises ContextError naming the probe."""
    requests: list[Request] = []
    texts = []
    for probes in groups:
        for messages, value in probes:
            place = f"probe {len(requests) + 1}"
            requests.append(checked_request(subject, model, tokenizer, messages, place))
            texts.append(tokenizer.encode(value))
    logprobs = continuation_logprobs(model, requests, texts, batch=subject.batch)
    means = iter([part.mean().item() for part in logprobs])
    return [list(islice(means, len(probes))) for probes in groups]
