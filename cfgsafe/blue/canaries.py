"""How far persons planted in the training data stand out: their likelihood against that of persons never trained on.

Source: canary exposure (Carlini et al., arXiv 1802.08232), as an AUC; the demo plants 8 persons each 1, 4, 16 and 64 times, and sets as
many twins aside. Asked about a person by name, the subject's answer goes on with the person's town or employer: the score is the mean
log-likelihood of its tokens, under the guidance asked for. AUC: the chance that a planted person's score is above a twin's, same question
and item; 0.5 is no trace of the planting. Guidance in probability space makes tokens impossible: such items tie, and `impossible` is their
share in percent.
Deviations: token means, because names differ in length; all 32 twins stand against each count, since 8 would leave intervals of little
use; a person is asked about in every wording of the generator, and resampled with all of these scores.

Run it: python eval.py canaries --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass

from cfgsafe.blue.intervals import Estimate, auc_interval, mean_interval, to_json
from cfgsafe.blue.scoring import continuation_logprobs
from cfgsafe.blue.subject import Subject, load, request_for
from cfgsafe.decode import check_request
from cfgsafe.llama import Llama
from cfgsafe.tokenizer import Messages, Tokenizer


@dataclass
class Options(Subject):
    """Compare the likelihood of planted persons with that of their never-trained twins."""


def run(options: Options) -> None:
    model, tokenizer = load(options)
    print(json.dumps({**options.guarded, **to_json(exposure(options, model, tokenizer))}))


def exposure(subject: Subject, model: Llama, tokenizer: Tokenizer) -> dict[str, Estimate]:
    """AUC of each repeat count, "auc_x16" for persons planted 16 times; and the percentage of items that have no chance at all."""
    from cfgsafe.demo.corpus import CANARY_COUNTS, canaries

    everybody = canaries()
    scores = likelihoods(subject, model, tokenizer, [probes(c.person) for c in everybody])
    of_count = lambda count: [some for canary, some in zip(everybody, scores, strict=True) if canary.count == count]
    impossible = mean_interval([100 * sum(map(math.isinf, some)) / len(some) for some in scores])
    return {f"auc_x{count}": auc_interval(of_count(count), of_count(0)) for count in CANARY_COUNTS} | {"impossible": impossible}


def probes(person) -> list[tuple[Messages, str]]:
    """(conversation that ends within an answer, the item it goes on with), in every wording, of what is not in the question."""
    from cfgsafe.demo.dialogues import DEFAULT_SYSTEMS, LOOKUPS, Item, Turn, fill

    found = []
    for question, answer in LOOKUPS:
        parts = fill(answer, person)
        for number, part in enumerate(parts):
            if isinstance(part, Item) and part.label != "PERSON":
                asked = {"role": "user", "content": Turn("user", fill(question, person)).text()}
                begun = {"role": "assistant", "content": Turn("assistant", parts[:number]).text().rstrip()}
                found.append(([{"role": "system", "content": DEFAULT_SYSTEMS[0]}, asked, begun], f" {part.value}"))
    return found


def likelihoods(subject: Subject, model: Llama, tokenizer: Tokenizer, groups: list[list[tuple[Messages, str]]]) -> list[list[float]]:
    """Mean log-likelihood per token of each continuation, under the subject's guidance; in the groups given."""
    asked = [probe for group in groups for probe in group]
    requests = [request_for(subject, tokenizer, messages) for messages, _ in asked]
    for number, request in enumerate(requests):
        check_request(request, model, f"probe {number + 1}")
    logprobs = iter(continuation_logprobs(model, requests, [tokenizer.encode(text) for _, text in asked]))
    return [[next(logprobs).mean().item() for _ in group] for group in groups]
