"""Perplexity of held-out text under the subject: what guarding a model costs on answers it should give.

Source: the usual exp of the mean negative log-probability a token, here of the guided distribution (cfgsafe/measure/scoring.py). Pooled
over the tokens of all dialogues; the interval resamples dialogues.
Deviation: guidance in probability space makes some tokens impossible, and one such token would make the figure infinite. No token counts
as less likely than 1e-9 therefore, and the share of the impossible ones is reported beside it. Leaving them out would flatter guidance.

Texts JSONL: {"messages": [...]} a line; each assistant's turn is scored, end token included, after the turns before it. By default
the demo's held-out chats, in which nobody gives anything away; `train.py dialogues` writes dialogues full of personal data, on which
a guarded model must do worse.

Run it: python eval.py perplexity --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, read_jsonl, write_jsonl
from cfgsafe.hub import CHATS
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Estimate, ratio_interval, to_json
from cfgsafe.measure.scoring import check_fits, continuation_logprobs
from cfgsafe.subject import Subject, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages

LEAST = math.log(1e-9)  # log-probability that a token counts with at least


@dataclass
class Options(Subject):
    """Measure how well a model predicts the assistant's turns of held-out dialogues."""

    texts: str = CHATS
    """JSONL of dialogues; by default the demo's held-out chats."""
    out: str | None = None
    """JSONL for each dialogue's figures."""
    limit: int | None = None
    """Use the first dialogues only."""


def run(options: Options) -> None:
    check_at_least(1, options, "limit")
    dialogues = read_dialogues(options.texts)[: options.limit]
    if options.out:
        make_folder(Path(options.out).parent)
    model, tokenizer = load(options)
    with tqdm(dialogues, desc="perplexity", leave=False) as bar:
        parts = [dialogue_logprobs(options, model, tokenizer, *dialogue) for dialogue in bar]
    if options.out:
        write_jsonl(
            options.out,
            [{"place": place, **figures(part)} for (place, _), part in zip(dialogues, parts, strict=True)],
        )
    estimates = {
        "perplexity": pooled([part.clamp(min=LEAST) for part in parts]),
        "impossible": impossible(parts),
    }
    facts = {"dialogues": len(dialogues), "tokens": sum(map(len, parts)), **options.guarded}
    print(json.dumps({**facts, **to_json(estimates)}))


def read_dialogues(path: str) -> list[tuple[str, Messages]]:
    """(place, messages) of each line of a file. Raises InputError naming line and field."""
    dialogues = [(place, check_messages(row.get("messages"), place)) for place, row in read_jsonl(path)]
    if not dialogues:
        raise InputError(f"{path}: holds no dialogue")
    for place, messages in dialogues:
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise InputError(f"{place}: 'messages' has no assistant's turn to score")
        for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False)):
            if role == "assistant" and before in (None, "assistant"):
                raise InputError(
                    f"{place}: messages[{number}] is an assistant's turn without anyone's before it"
                )
    return dialogues


def dialogue_logprobs(
    subject: Subject, model: Llama, tokenizer: Tokenizer, place: str, messages: Messages
) -> Tensor:
    """Guided log-probabilities of the tokens of all assistant's turns, (tokens,), -inf for impossible ones. Raises ContextError.

    Turns are stripped of blanks around them, as Llama's chat template does.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    requests = [request_for(subject, tokenizer, messages[:number]) for number in turns]
    end = tokenizer.special[tokenizer.end_of_turn]
    texts = [[*tokenizer.encode(messages[number]["content"].strip()), end] for number in turns]
    for number, request, text in zip(turns, requests, texts, strict=True):
        check_fits(model, request, text, f"{place}: messages[{number}]")
    return torch.cat(continuation_logprobs(model, requests, texts))


def pooled(parts: list[Tensor]) -> Estimate:
    """exp of the mean negative log-probability over all tokens of `parts`, one (tokens,) a dialogue; the interval resamples dialogues."""
    estimate = ratio_interval([-part.sum().item() for part in parts], [len(part) for part in parts])
    return Estimate(*(math.exp(min(v, 50.0)) for v in (estimate.value, estimate.low, estimate.high)))


def impossible(parts: list[Tensor]) -> Estimate:
    """Percentage of tokens that guidance has made impossible."""
    return ratio_interval(
        [100 * (part == -math.inf).sum().item() for part in parts], [len(part) for part in parts]
    )


def figures(part: Tensor) -> dict[str, float]:
    """A dialogue's tokens, their negative log-probability in nats, and how many of them guidance has made impossible."""
    nll = -part.clamp(min=LEAST).sum().item()
    return {"tokens": len(part), "nll": round(nll, 4), "impossible": (part == -math.inf).sum().item()}
