"""The target of attacks: a checkpoint on this machine, or a model behind an endpoint.

Source: Lee et al. (arXiv 2405.18540): Llama targets answer at temperature 0.1 and top-p 0.9, with
at most 64 tokens.
Deviations: an answer ends at the target's own end token, not at the attacker's. An answer that did not
come is None, never an empty text; so is one that ended because the model's numbers were not finite. A
budget limits what is asked, retries included.

Run it: python eval.py attack --help
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import tyro

from cfgsafe import subject
from cfgsafe.decode import Request, generate
from cfgsafe.errors import InputError, Unused
from cfgsafe.fields import Count, Range, Temperature
from cfgsafe.files import Answer
from cfgsafe.identity import contents, digest_of
from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT
from cfgsafe.outputs import Input
from cfgsafe.remote import SERVICE, Meter, Question, Service, ask, check_service, endpoint_of
from cfgsafe.subject import Subject, request_for
from cfgsafe.tokenizer import Messages, Tokenizer


@dataclass
class Options(Subject):
    """The target and how it answers."""

    model: Annotated[str, tyro.conf.arg(name="target"), Input()] = ""
    """Checkpoint folder or hub id of the target; without it, give --remote-model."""
    temperature: Temperature = 0.1
    """Temperature of the target's answers."""
    top_p: Annotated[float, Range(above=0, most=1)] = 0.9
    """Answers are drawn from the most likely tokens that together have this probability."""
    answer_tokens: Count = 64
    """Longest answer, in tokens."""
    budget: Count | None = None
    """Maximum number of answers to ask for; for an endpoint, of requests, retries included."""
    service: tyro.conf.OmitArgPrefixes[Service] = field(default_factory=Service)
    """Endpoint of a remote target."""

    @property
    def remote(self) -> bool:
        """Whether the target is the model of an endpoint."""
        return self.service.remote_model is not None

    def unused(self) -> Unused:
        """See `errors.Unused`. `check` refuses --adapter and --guidance, which change the target."""
        if self.remote:
            guiding = "space", "alpha", "positive", "negative", "system_prompt"
            yield "on the model of an endpoint", *guiding
            return
        yield from super().unused()
        yield "without --remote-model", *SERVICE
        if self.temperature == 0:
            yield "on greedy answers", "top_p"
            yield from self.unused_if_greedy()


def check(options: Options) -> None:
    """Raise InputError unless there is exactly one target and all options are valid for it."""
    subject.check(options)
    if bool(options.model) == options.remote:
        raise InputError("give one target: --target CHECKPOINT or --remote-model NAME")
    if options.remote:
        if options.adapter is not None or options.guidance is not None:
            raise InputError(
                "--adapter and --guidance need a --target; an endpoint's model cannot be changed from here"
            )
        check_service(options.service)


def contents_of(options: Options) -> dict[str, str]:
    """Option -> digest of what it names, as `identity.contents`: those of the target."""
    held = contents(options, folders=("model", "adapter"))
    if options.service.remote_model:
        held["remote_model"] = digest_of(endpoint_of(options.service))  # the URL itself is never written
    return held


class Target(Protocol):
    """A model that answers attacks."""

    meter: Meter

    @property
    def calls(self) -> int:
        """Answers asked of a local model, or requests made to an endpoint, retries included."""
        return self.meter.made

    @property
    def spent(self) -> bool:
        """Whether the budget allows no further call."""
        return self.meter.spent

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        """An answer to each conversation, drawn with its seed; None where no answer came."""
        ...


class LocalTarget(Target):
    """A checkpoint on this machine, guided as the options say.

    `adapter` names one of the adapters attached to `model`; None is the bare model. A conversation
    that the context cannot hold gets no answer and costs no budget.
    """

    def __init__(self, options: Options, model: Llama, tokenizer: Tokenizer, adapter: str | None = DEFAULT):
        self.options, self.model, self.tokenizer, self.adapter = options, model, tokenizer, adapter
        self.meter = Meter(options.budget)

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        """As Target.ask. Raises InputError where the adapter is not attached."""
        limit = self.model.config.max_position_embeddings
        requests: dict[int, Request] = {}  # number of the conversation -> its request
        for number, (messages, seed) in enumerate(zip(conversations, seeds, strict=True)):
            request = self._request(messages, seed)
            if max(map(len, request.rows)) < limit and self.meter.take():
                requests[number] = request
        completions = generate(self.model, list(requests.values()), batch=self.options.batch)
        answers: list[str | None] = [None] * len(conversations)
        for number, completion in zip(requests, completions, strict=True):
            answer = Answer(self.tokenizer.decode(completion.tokens), completion.finish_reason)
            answers[number] = None if answer.broken else answer.text
        return answers

    def _request(self, messages: Messages, seed: int) -> Request:
        return request_for(
            self.options,
            self.tokenizer,
            messages,
            seed=seed,
            adapter=self.adapter,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            max_new_tokens=self.options.answer_tokens,
        )


class RemoteTarget(Target):
    """The model of an endpoint. Answers are kept in the JSONL file `cache` and not asked for again."""

    def __init__(self, options: Options, cache: Path):
        self.options, self.cache = options, cache
        self.meter = Meter(options.budget)

    def ask(self, conversations: list[Messages], seeds: list[int]) -> list[str | None]:
        """As Target.ask. Raises InputError where the endpoint refuses the key or the model."""
        options = self.options
        questions = []
        for messages, seed in zip(conversations, seeds, strict=True):
            questions.append(
                Question(messages, None, options.answer_tokens, options.temperature, seed, options.top_p)
            )
        return ask(options.service, questions, self.cache, "target", self.meter)
