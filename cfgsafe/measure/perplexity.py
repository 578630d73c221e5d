"""Perplexity of held-out text under a model: what guarding it costs on answers that it should give.

Source: the usual exp of the mean negative log-probability per token, here of the guided
distribution (cfgsafe/measure/scoring.py), over the tokens of all dialogues together; intervals are
over dialogues.
Deviation: guidance in probability space makes some tokens impossible, and one of them would make
the result infinite. So no token counts as less likely than 1e-9, and the share of impossible
tokens is reported as well. Leaving them out would make guidance look better than it is.

Texts JSONL: {"messages": [...]} per line. Each assistant's turn is scored, with its end token, after
the turns before it. Default: the demo's held-out chats, which hold no personal data. `train.py
dialogues` writes dialogues full of personal data, on which a guarded model must do worse.

Run it: python eval.py perplexity --model cfgsafe/demo/leaky
"""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cfgsafe.errors import InputError, at
from cfgsafe.fields import Count, check_ranges
from cfgsafe.files import make_folder, read_jsonl, write_jsonl
from cfgsafe.hub import CHATS
from cfgsafe.llama import Llama
from cfgsafe.measure.intervals import Clusters, Estimate, ratio_interval, to_json
from cfgsafe.measure.scoring import LEAST, check_fits, continuation_logprobs, impossible
from cfgsafe.outputs import InputPath, OutputFile
from cfgsafe.subject import Subject, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages


@dataclass
class Options(Subject):
    """Measure how well a model predicts the assistant's turns of held-out dialogues."""

    texts: InputPath = CHATS
    """JSONL of dialogues; default: the demo's held-out chats."""
    out: OutputFile | None = None
    """JSONL file for the figures of each dialogue."""
    limit: Count | None = None
    """Use only the first dialogues."""


def run(options: Options) -> None:
    check_ranges(options)
    dialogues = read_dialogues(options.texts)[: options.limit]
    if options.out:
        make_folder(Path(options.out).parent)
    model, tokenizer = load(options)
    parts = dialogue_logprobs(options, model, tokenizer, dialogues)
    if options.out:
        places = [place for place, _ in dialogues]
        rows = [{"place": place, **figures(part)} for place, part in zip(places, parts, strict=True)]
        write_jsonl(options.out, rows)
    likely = [part.clamp(min=LEAST) for part in parts]
    estimates = {"perplexity": pooled(likely), "impossible": impossible(parts)}
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
    subject: Subject, model: Llama, tokenizer: Tokenizer, dialogues: list[tuple[str, Messages]]
) -> list[Tensor]:
    """For each dialogue the guided log-probabilities (tokens,) of all its assistant's turns.

    They are -inf for impossible tokens. Blanks around a turn are stripped, as by Llama's chat
    template. Raises ContextError naming the turn.
    """
    requests, texts, counts = [], [], []
    end = tokenizer.special[tokenizer.end_of_turn]
    for place, messages in dialogues:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        counts.append(len(turns))
        for number in turns:
            with at(place):
                request = request_for(subject, tokenizer, messages[:number])
            text = [*tokenizer.encode(messages[number]["content"].strip()), end]
            check_fits(model, request, text, f"{place}: messages[{number}]")
            requests.append(request)
            texts.append(text)
    of_all = iter(continuation_logprobs(model, requests, texts, batch=subject.batch, desc="perplexity"))
    return [torch.cat(list(islice(of_all, count))) for count in counts]


def pooled(parts: list[Tensor], clusters: Clusters = None) -> Estimate | None:
    """exp of the mean NLL over all tokens; parts are (tokens,), one a dialogue. None without tokens."""
    nll = ratio_interval([-part.sum().item() for part in parts], [len(part) for part in parts], clusters)
    if nll is None:
        return None
    return Estimate(*[math.exp(min(bound, 50.0)) for bound in (nll.value, nll.low, nll.high)])


def figures(part: Tensor) -> dict[str, float]:
    """Tokens of a dialogue, their negative log-probability in nats, and how many are impossible."""
    nll = -part.clamp(min=LEAST).sum().item()
    never = (part == -math.inf).sum().item()
    return {"tokens": len(part), "nll": round(nll, 4), "impossible": never}
