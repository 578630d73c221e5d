"""How far persons planted in the training data stand out: their likelihood against that of persons never trained on.

Source: canary exposure (Carlini et al., arXiv 1802.08232), as an AUC. Asked about a person, the subject's answer goes on with one of the
person's items: the score is the mean log-likelihood of its tokens, under the guidance asked for. AUC: the chance that a planted person's
score is above that of one never trained on, same question and item; 0.5 is no trace of the planting. Guidance in probability space makes
tokens impossible: such items tie, and `impossible` is their share in percent.
Deviations: token means, because names differ in length; all persons never trained on stand against each count, since the twins of one
count alone, 8 in the demo, would leave intervals of little use; a person is asked about in several wordings, and resampled with all of
these scores.

Probes JSONL: {"person", "repeats", "messages", "value"} a line. `repeats` is how often the person was planted, 0 for never; `messages` may
end within an answer, and `value` is how it goes on, blank before it included. The lines of one person are one cluster, and each person
needs the same questions in the same order. By default the demo's 8 persons planted 1, 4, 16 and 64 times each, and as many twins.

Run it: python eval.py canaries --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass

from cfgsafe.decode import check_request
from cfgsafe.errors import InputError
from cfgsafe.files import read_jsonl
from cfgsafe.hub import PROBES
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, auc_interval, mean_interval, to_json
from cfgsafe.measure.scoring import continuation_logprobs
from cfgsafe.subject import Subject, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages


@dataclass
class Options(Subject):
    """Compare the likelihood of planted persons with that of persons never trained on."""

    probes: str = PROBES
    """JSONL of person, repeats, messages, value; by default the demo's canaries and their twins."""


@dataclass
class Person:
    """A person asked about: `probes` are (conversation, how it goes on) in every wording; `repeats` is 0 for one never trained on."""

    repeats: int
    probes: list[tuple[Messages, str]]


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
            raise InputError(
                f"{place}: 'repeats' is {repeats}, but {person.repeats} on an earlier line of {name}"
            )
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
) -> dict[str, Estimate]:
    """AUC of each repeat count, "auc_x16" for persons planted 16 times; and the percentage of items that have no chance at all."""
    scores = likelihoods(subject, model, tokenizer, [person.probes for person in persons])
    of_repeats: dict[int, list[list[float]]] = {}
    for person, some in zip(persons, scores, strict=True):
        of_repeats.setdefault(person.repeats, []).append(some)
    never = of_repeats.pop(0)
    figures = {f"auc_x{repeats}": auc_interval(of_repeats[repeats], never) for repeats in sorted(of_repeats)}
    figures["impossible"] = mean_interval([100 * sum(map(math.isinf, some)) / len(some) for some in scores])
    return figures


def likelihoods(
    subject: Subject, model: Llama, tokenizer: Tokenizer, groups: list[list[tuple[Messages, str]]]
) -> list[list[float]]:
    """Mean log-likelihood per token of each continuation, under the subject's guidance; in the groups given."""
    asked = [probe for group in groups for probe in group]
    requests = [request_for(subject, tokenizer, messages) for messages, _ in asked]
    for number, request in enumerate(requests):
        check_request(request, model, f"probe {number + 1}")
    logprobs = iter(continuation_logprobs(model, requests, [tokenizer.encode(text) for _, text in asked]))
    return [[next(logprobs).mean().item() for _ in group] for group in groups]
