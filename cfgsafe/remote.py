"""Questions to an OpenAI-compatible endpoint: answers are kept, failed requests are repeated.

Source: OpenAI's HTTP API, chat and completions; one request is cfgsafe/endpoint.py. An answer costs
money, so it is kept as soon as it comes. Where it cannot be written (a full disk), nothing more is
asked, and `AnswerLog` tries once more at the end.

Run it: OPENAI_API_KEY=... python train.py pairs --recipes remote --remote-model gpt-4o-mini \\
            --dialogues D.jsonl --model M --out pairs.jsonl
"""

import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cfgsafe.endpoint import Endpoint, Failed, Refused, open_client
from cfgsafe.errors import InputError
from cfgsafe.fields import Count, Range, Seconds, Weight, check_ranges
from cfgsafe.files import Answer, AnswerLog, make_folder
from cfgsafe.progress import Bar, progress
from cfgsafe.tokenizer import Messages

FIRST_WAIT = 0.5  # seconds before the second attempt; each further wait is twice as long
LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says
OUTAGE = 8  # failed questions in a row that mean that the endpoint is down


@dataclass
class Service:
    """An OpenAI-compatible endpoint, given by OPENAI_BASE_URL and OPENAI_API_KEY in the environment."""

    remote_model: str | None = None
    """Name of the model at the endpoint."""
    concurrency: Annotated[int, Range(least=1, most=1000)] = 8
    """Number of questions asked at the same time."""
    timeout: Seconds = 60.0
    """Seconds to wait for a whole answer of the endpoint."""
    attempts: Count = 6
    """Number of attempts before a question counts as failed."""
    price_in: Weight | None = None
    """Price in USD of a million input tokens, for the cost estimate."""
    price_out: Weight | None = None
    """Price in USD of a million output tokens, for the cost estimate."""


SERVICE = tuple(field.name for field in fields(Service))  # names of its options


@dataclass(frozen=True)
class Question:
    """A question: `messages` for the chat endpoint, or `prompt` for the completions endpoint."""

    messages: Messages | None
    prompt: str | None
    max_tokens: int
    temperature: float
    seed: int | None = None
    top_p: float | None = None


class Meter:
    """Counts requests, including retries, and allows `limit` of them. Threads may share one."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.made = 0
        self._lock = threading.Lock()

    @property
    def spent(self) -> bool:
        """Whether no further request is allowed."""
        return self.limit is not None and self.made >= self.limit

    def take(self) -> bool:
        """Count one more request; returns False, and counts nothing, when the limit is reached."""
        with self._lock:
            if self.spent:
                return False
            self.made += 1
            return True


def check_service(service: Service) -> None:
    """Raise InputError when nothing could be asked: no model, key or client, or a number out of range."""
    check_ranges(service)
    if (service.price_in is None) != (service.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not service.remote_model:
        raise InputError("a remote endpoint needs --remote-model NAME")
    open_client(None)


def ask(
    service: Service, questions: list[Question], cache: Path, what: str, meter: Meter | None = None
) -> list[str | None]:
    """The answer to each question, in order. `what` names the questions in messages.

    Answers are kept in the file `cache` (`AnswerLog`) as they come. A question that a model of this name
    at this URL has answered there is not asked again, and equal questions are asked once. Raises
    InputError when the endpoint refuses a question, or does not answer it in `attempts` attempts. With a
    `meter`, only a refused key or model raises. The answer is then None for a question that the endpoint
    refuses or does not answer, or for which the meter allows no request.
    """
    check_service(service)
    make_folder(cache.parent)
    keys = [key_of(service, question) for question in questions]
    log = AnswerLog(cache)
    todo = {key: question for key, question in zip(keys, questions, strict=True) if key not in log.known}
    if todo:
        if meter is None:
            kept = len(set(keys)) - len(todo)
            print(f"{what}: {_estimate(service, list(todo.values()), kept)}", file=sys.stderr)
        _ask_all(service, todo, log, what, meter)
    return [log.known[key].text if key in log.known else None for key in keys]


def key_of(service: Service, question: Question) -> str:
    """The key of an answer in `AnswerLog`: the same for the same endpoint and question."""
    asked = asdict(question)
    if question.top_p is None:
        del asked["top_p"]  # so that answers that were kept before there was a top_p are found
    return hashlib.sha256(json.dumps([*endpoint_of(service), asked], sort_keys=True).encode()).hexdigest()[
        :32
    ]


def endpoint_of(service: Service) -> list[str | None]:
    """All that is known of who answers: the model's name, and the URL unless it is OpenAI's own."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/")
    return [service.remote_model, url] if url else [service.remote_model]


def _estimate(service: Service, questions: list[Question], kept: int) -> str:
    characters = tokens_out = 0
    for question in questions:
        tokens_out += question.max_tokens
        characters += len(question.prompt or "")
        for message in question.messages or []:
            characters += len(message["content"])
    tokens_in = characters // 4
    line = (
        f"{len(questions)} questions to ask ({kept} answered before), "
        f"about {tokens_in} tokens in (characters / 4), at most {tokens_out} out"
    )
    if service.price_in is None or service.price_out is None:
        return line
    price = (tokens_in * service.price_in + tokens_out * service.price_out) / 1e6
    return f"{line}, at most about {price:.2f} USD"


class _Run:
    """One run over many questions: what its threads share, under `lock`."""

    def __init__(self, service: Service, log: AnswerLog, meter: Meter | None):
        self.service, self.log, self.meter = service, log, meter
        self.endpoint = Endpoint(str(service.remote_model), service.timeout)
        self.lock = threading.Lock()
        self.stop = threading.Event()  # set when no further request may be made
        self.errors: list[InputError | Failed] = []
        self.failed_in_a_row = 0

    def answer(self, key: str, question: Question, bar: Bar) -> None:
        """Ask a question unless the run has stopped; keep its answer or its error."""
        if self.stop.is_set():
            return
        try:
            text = _patiently(partial(self.attempt, question), self.service.attempts, self.stop)
        except (InputError, Failed) as error:
            with self.lock:
                self.note(error)
            return
        if text is not None:
            with self.lock:
                self.failed_in_a_row = 0
                try:
                    self.log.keep(key, Answer(text))
                except InputError as error:  # a full disk: nothing more is asked
                    self.note(error)
                bar.update()

    def attempt(self, question: Question) -> str | None:
        """Ask once, and count it; None when the meter does not allow it."""
        if self.meter is not None and not self.meter.take():
            self.stop.set()
            return None
        return self.endpoint.ask(_settings(question))

    def note(self, error: InputError | Failed) -> None:
        """Remember an error; the run stops when it is fatal, or when the endpoint is down."""
        self.errors.append(error)
        self.failed_in_a_row = 0 if isinstance(error, Refused) else self.failed_in_a_row + 1
        if self.is_fatal(error) or self.failed_in_a_row >= OUTAGE:
            self.stop.set()

    def is_fatal(self, error: InputError | Failed) -> bool:
        """Whether an error ends the run: a refusal does, but with a meter not that of a single question."""
        refused_one = self.meter is not None and isinstance(error, Refused)
        return isinstance(error, InputError) and not refused_one


def _ask_all(
    service: Service, todo: dict[str, Question], log: AnswerLog, what: str, meter: Meter | None
) -> None:
    """Ask the questions of `todo` in parallel, and put the answers into `log`. Raises as `ask` does."""
    run = _Run(service, log, meter)
    with run.endpoint, log, progress(total=len(todo), desc=what) as bar:
        with ThreadPoolExecutor(service.concurrency) as pool:
            try:
                futures = [pool.submit(run.answer, key, question, bar) for key, question in todo.items()]
                for future in futures:
                    future.result()
            except BaseException:  # such as an interrupt: running requests end, and their answers are kept
                run.stop.set()
                raise
    remain = sum(key not in log.known for key in todo) + len(log.unwritten)
    for error in run.errors:
        if remain and run.is_fatal(error):
            raise InputError(
                f"{what}: {error}; {remain} of {len(todo)} questions remain, running again resumes"
            ) from None
    if meter is not None and run.errors:
        last = run.errors[-1]
        print(f"{what}: {remain} of {len(todo)} questions without an answer ({last})", file=sys.stderr)
    elif meter is None and remain:
        raise InputError(
            f"{what}: {remain} of {len(todo)} questions remain without an answer after {service.attempts} "
            f"attempts ({run.errors[-1]}); running again resumes"
        )


def _settings(question: Question) -> dict[str, Any]:
    """A question as the endpoint's API names its parts."""
    settings: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": question.temperature}
    if question.messages is None:
        settings["prompt"] = question.prompt
    else:
        settings["messages"] = question.messages
    if question.seed is not None:
        settings["seed"] = question.seed
    if question.top_p is not None:
        settings["top_p"] = question.top_p
    return settings


def _patiently(attempt: Callable[[], str | None], attempts: int, stop: threading.Event) -> str | None:
    """The result of `attempt`, called again when it raises Failed; None once `stop` is set.

    The waits are 0.5 s, 1 s, 2 s ..., each times a random factor from 0.5 to 1.5, or what
    Retry-After says.
    """
    for number in range(attempts):
        try:
            return attempt()
        except Failed as error:
            if number + 1 == attempts:
                raise
            jitter = random.uniform(0.5, 1.5)
            if error.wait is None:
                wait = FIRST_WAIT * 2 ** min(number, 20) * jitter
            else:
                wait = error.wait + 0.1 * jitter
            if stop.wait(min(wait, LONGEST_WAIT)):
                return None
    return None
