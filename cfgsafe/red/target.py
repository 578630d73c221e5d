"""The target: what the attacker's prompts are put to, a checkpoint on this machine or a model behind an OpenAI-compatible endpoint.

Source: Lee et al. (arXiv 2405.18540): Llama targets answer at temperature 0.1 and top-p 0.9, with at most 64 tokens.
Deviations: what ends an answer is the target's own, not the attacker's. An answer that could not be had is None, never an empty text.
A budget bounds what is asked, retries included.

Run it: python eval.py attack --help
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from cfgsafe import subject
from cfgsafe.decode import generate
from cfgsafe.errors import InputError, check_at_least
from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT
from cfgsafe.remote import Meter, Question, Service, ask, check_service
from cfgsafe.subject import Subject, request_for
from cfgsafe.tokenizer import Messages, Tokenizer


@dataclass
class Options(Subject):
    """The target and how it answers."""

    model: Annotated[str | None, tyro.conf.arg(name="target")] = None
    """Checkpoint folder or hub id of the target; without it, --remote-model of an OpenAI-compatible endpoint."""
    temperature: float = 0.1
    """Of the target's answers."""
    top_p: float = 0.9
    """Of the target's answers: draw from the likeliest tokens that have this probability together."""
    answer_tokens: int = 64
    """Longest answer."""
    budget: int | None = None
    """Answers to ask of the target at most (requests, with retries, of an endpoint)."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """Endpoint of a remote target."""


def check(options: Options) -> None:
    """Raise InputError where there is not exactly one target, where it cannot be guarded as asked, or where a number is out of range."""
    subject.check(options)
    remote = options.service.remote_model
    if (options.model is None) == (remote is None):
        raise InputError("give one target: --target CHECKPOINT or --remote-model NAME")
    if remote is not None:
        if options.adapter is not None or options.guidance is not None:
            raise InputError(
                "--adapter and --guidance need a --target; an endpoint's model cannot be changed from here"
            )
        check_service(options.service)
    if not 0 <= options.temperature < float("inf"):
        raise InputError(f"--temperature {options.temperature}: must be at least 0")
    if not 0 < options.top_p <= 1:
        raise InputError(f"--top-p {options.top_p}: must be above 0 and at most 1")
    check_at_least(1, options, "answer_tokens", "budget")


class Target(Protocol):
    """Answers attacks."""

    meter: Meter

    @property
    def calls(self) -> int:
        """Answers asked of a local model, or HTTP requests made to an endpoint, retries included."""
        return self.meter.made

    @property
    def spent(self) -> bool:
        """Whether the budget allows no further call."""
        return self.meter.spent

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        """An answer to each conversation, drawn with its seed; None where none could be had."""
        ...


class LocalTarget(Target):
    """A checkpoint under its guidance, with the adapter called `adapter` of those attached to `model`, or the bare model for None.

    A conversation that the context cannot hold has no answer and costs none of the budget.
    """

    def __init__(self, options: Options, model: Llama, tokenizer: Tokenizer, adapter: str | None = DEFAULT):
        self.options, self.model, self.tokenizer, self.adapter = options, model, tokenizer, adapter
        self.meter = Meter(options.budget)

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        options, limit = self.options, self.model.config.max_position_embeddings
        sampling = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_new_tokens": options.answer_tokens,
        }
        requests = {}
        for number, (messages, seed) in enumerate(zip(conversations, seeds, strict=True)):
            request = request_for(
                options, self.tokenizer, messages, seed=seed, adapter=self.adapter, **sampling
            )
            if max(map(len, request.rows)) < limit and self.meter.take():
                requests[number] = request
        completions = generate(self.model, list(requests.values()), batch=options.batch)
        answers = {
            number: self.tokenizer.decode(done.tokens)
            for number, done in zip(requests, completions, strict=True)
        }
        return [answers.get(number) for number in range(len(conversations))]


class RemoteTarget(Target):
    """The model of an endpoint; its answers are kept in the JSONL file `cache`, and one that stands there is not asked for again."""

    def __init__(self, options: Options, cache: Path):
        self.options, self.cache = options, cache
        self.meter = Meter(options.budget)

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        """Raises InputError where the endpoint refuses the key or the model."""
        options = self.options
        questions = [
            Question(messages, None, options.answer_tokens, options.temperature, seed, options.top_p)
            for messages, seed in zip(conversations, seeds, strict=True)
        ]
        return ask(options.service, questions, self.cache, "target", self.meter)
