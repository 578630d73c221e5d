"""Questions to any OpenAI-compatible endpoint: answered once, kept as they come, tried again where the endpoint fails.

Source: OpenAI's HTTP API, chat and completions, through the `openai` client. Base URL and key come from OPENAI_BASE_URL and
OPENAI_API_KEY only, and no message shows them.
Deviation: the client's own retries are off; they pass over unreadable and empty answers, and hide how often was asked.

Run it: OPENAI_API_KEY=... python train.py pairs --recipes remote --remote-model gpt-4o-mini --dialogues D.jsonl --model M --out pairs.jsonl
"""

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm

from cfgsafe.errors import InputError, check_at_least
from cfgsafe.files import make_folder, read_answers
from cfgsafe.tokenizer import Messages

FIRST_WAIT = 0.5  # seconds before the second attempt; doubles with each
LONGEST_WAIT = 300.0  # seconds; whatever Retry-After says
OUTAGE = 8  # questions failed in a row, after which the endpoint counts as down
QUESTION_REFUSED = (
    400,
    413,
    422,
)  # statuses that speak of one question; other refusals are of the key, the model or all questions


@dataclass
class Service:
    """An OpenAI-compatible endpoint. OPENAI_BASE_URL and OPENAI_API_KEY in the environment say which."""

    remote_model: str | None = None
    """Model of the endpoint."""
    concurrency: int = 8
    """Questions under way at once."""
    timeout: float = 60.0
    """Seconds to wait for an answer."""
    attempts: int = 6
    """Times that a question is put before it counts as failed."""
    price_in: float | None = None
    """USD per million tokens in, for the estimate."""
    price_out: float | None = None
    """USD per million tokens out, for the estimate."""


@dataclass(frozen=True)
class Question:
    """What to send: `messages` to the chat endpoint, or `prompt` to the completions endpoint."""

    messages: Messages | None
    prompt: str | None
    max_tokens: int
    temperature: float
    seed: int | None = None
    top_p: float | None = None


class Meter:
    """Counts what is asked, retries too, and allows `limit` of it; threads may share one."""

    def __init__(self, limit: int | None = None):
        self.limit, self.made = limit, 0
        self._lock = threading.Lock()

    @property
    def spent(self) -> bool:
        """Whether nothing more is allowed."""
        return self.limit is not None and self.made >= self.limit

    def take(self) -> bool:
        """Count one more; False, and nothing is counted, where the limit does not allow it."""
        with self._lock:
            if self.spent:
                return False
            self.made += 1
            return True


class _Refused(InputError):
    """The endpoint will not answer this question; it may answer others."""


class _Failed(Exception):
    """One attempt did not give an answer: why, and how many seconds the endpoint asks to wait."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def check_service(service: Service) -> None:
    """Raise InputError where nothing could be asked: no model, key or client, or numbers out of range."""
    check_at_least(1, service, "concurrency", "attempts")
    check_at_least(0, service, "price_in", "price_out")
    if not service.timeout > 0:
        raise InputError(f"--timeout {service.timeout}: must be above 0 seconds")
    if (service.price_in is None) != (service.price_out is None):
        raise InputError("--price-in and --price-out go together")
    if not service.remote_model:
        raise InputError("a remote endpoint needs --remote-model NAME")
    _client(service).close()


def ask(
    service: Service, questions: list[Question], cache: Path, what: str, meter: Meter | None = None
) -> list[str | None]:
    """The answer to each question, in order. `what` names the questions in messages.

    Answers are kept in the JSONL file `cache` as they come; a question that has one there is not asked again, and one that stands
    twice in `questions` is asked once. Raises InputError where the endpoint refuses, or does not answer in `attempts` attempts.
    With a `meter` of its requests it raises for a refused key or model only: any other question without an answer has None, also one for
    which the meter allows no request.
    """
    check_service(service)
    make_folder(cache.parent)
    keys = [key_of(service, question) for question in questions]
    known = read_answers(cache)
    todo = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
    if todo:
        if meter is None:
            print(
                f"{what}: {_estimate(service, list(todo.values()), len(set(keys)) - len(todo))}",
                file=sys.stderr,
            )
        _ask_all(service, todo, known, cache, what, meter)
    return [known.get(key) for key in keys]


def key_of(service: Service, question: Question) -> str:
    """Of model and question; what an answer is kept under."""
    asked = asdict(question)
    if question.top_p is None:
        del asked["top_p"]  # answers that were kept before there was a top_p
    return hashlib.sha256(json.dumps([service.remote_model, asked], sort_keys=True).encode()).hexdigest()[:32]


def _estimate(service: Service, questions: list[Question], kept: int) -> str:
    characters = sum(
        len(q.prompt) if q.messages is None else sum(len(m["content"]) for m in q.messages) for q in questions
    )
    tokens_in, tokens_out = characters // 4, sum(q.max_tokens for q in questions)
    line = f"{len(questions)} questions to ask ({kept} answered before), about {tokens_in} tokens in (characters / 4)"
    line += f", at most {tokens_out} out"
    if service.price_in is None:
        return line
    return f"{line}, at most about {(tokens_in * service.price_in + tokens_out * service.price_out) / 1e6:.2f} USD"


def _ask_all(
    service: Service,
    todo: dict[str, Question],
    known: dict[str, str],
    cache: Path,
    what: str,
    meter: Meter | None,
) -> None:
    """Answers to `known` and `cache`. Stops where the endpoint refuses (with a meter: the key or model), is down, or the meter is spent."""
    client, lock, stop, errors, in_a_row = _client(service), threading.Lock(), threading.Event(), [], 0
    fatal = lambda error: isinstance(error, InputError) and (meter is None or not isinstance(error, _Refused))

    def attempt(question: Question) -> str | None:
        if meter is not None and not meter.take():
            stop.set()
            return None
        return _attempt(client, service, question)

    def work(key: str) -> None:
        nonlocal in_a_row
        try:
            text = None if stop.is_set() else _patiently(lambda: attempt(todo[key]), service.attempts, stop)
        except (InputError, _Failed) as error:
            with lock:
                errors.append(error)
                in_a_row = 0 if isinstance(error, _Refused) else in_a_row + 1
                if fatal(error) or in_a_row >= OUTAGE:
                    stop.set()
            return
        if text is not None:
            with lock:
                log.write(json.dumps({"key": key, "answer": text}) + "\n")
                log.flush()
                known[key] = text
                in_a_row = 0
                bar.update()

    with open(cache, "a", encoding="utf-8") as log, tqdm(total=len(todo), desc=what, leave=False) as bar:
        with ThreadPoolExecutor(service.concurrency) as pool:
            try:
                for done in [pool.submit(work, key) for key in todo]:
                    done.result()
            except BaseException:  # an interrupt: what is under way ends and is kept
                stop.set()
                raise
    client.close()
    remain = sum(key not in known for key in todo)
    for error in errors:
        if fatal(error):
            raise InputError(
                f"{what}: {error}; {remain} of {len(todo)} questions remain, running again resumes"
            ) from None
    if meter is not None and errors:
        print(f"{what}: {remain} of {len(todo)} questions without an answer ({errors[-1]})", file=sys.stderr)
    elif meter is None and remain:
        raise InputError(
            f"{what}: {remain} of {len(todo)} questions remain without an answer after {service.attempts} attempts "
            f"({errors[-1]}); running again resumes"
        )


def _patiently(attempt: Callable[[], str | None], attempts: int, stop: threading.Event) -> str | None:
    """What `attempt` returns, tried again after 0.5 s, 1 s, 2 s ... (each times 0.5 to 1.5) or what Retry-After says; None once stopped."""
    for number in range(attempts):
        try:
            return attempt()
        except _Failed as error:
            if number + 1 == attempts:
                raise
            jitter = random.uniform(0.5, 1.5)
            wait = FIRST_WAIT * 2**number * jitter if error.wait is None else error.wait + 0.1 * jitter
            if stop.wait(min(wait, LONGEST_WAIT)):
                return None
    return None


def _attempt(client, service: Service, question: Question) -> str:
    """Ask once. Raises _Failed where asking again may help, InputError where it cannot."""
    import openai

    settings = {
        "model": service.remote_model,
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
    }
    if question.seed is not None:
        settings["seed"] = question.seed
    if question.top_p is not None:
        settings["top_p"] = question.top_p
    try:
        if question.messages is None:
            response = client.completions.create(prompt=question.prompt, **settings)
        else:
            response = client.chat.completions.create(messages=question.messages, **settings)
    except openai.APITimeoutError:
        raise _Failed(f"no answer within {service.timeout:g} s") from None
    except openai.APIConnectionError:
        raise _Failed("no connection; is OPENAI_BASE_URL right?") from None
    except openai.APIStatusError as error:
        status = error.status_code
        if status in (408, 409, 429) or status >= 500:
            raise _Failed(f"HTTP {status}", _retry_after(error.response.headers.get("retry-after"))) from None
        refused = _Refused if status in QUESTION_REFUSED else InputError
        raise refused(_refusal(status, service.remote_model)) from None
    except (openai.APIResponseValidationError, ValueError):
        raise _Failed("an answer that is not JSON") from None
    text = _text_of(response, chat=question.messages is not None)
    if text is None:
        raise _Failed("an answer without text")
    return text.encode(errors="replace").decode()  # half of a surrogate pair is not text


def _text_of(response: object, chat: bool) -> str | None:
    choices = getattr(response, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(getattr(first, "message", None), "content", None) if chat else getattr(first, "text", None)
    return text if isinstance(text, str) and text.strip() else None


def _retry_after(header: str | None) -> float | None:
    """Seconds, of a number of seconds or of a date; None where there is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None


def _refusal(status: int, model: str) -> str:
    if status in (401, 403):
        return (
            f"the endpoint refuses the key (HTTP {status}); set OPENAI_API_KEY to one that may use {model!r}"
        )
    if status == 404:
        return f"the endpoint knows no model {model!r}, or no such path (HTTP 404); check --remote-model and OPENAI_BASE_URL (mostly .../v1)"
    return f"the endpoint refuses the question (HTTP {status}); check that {model!r} takes max_tokens, temperature and prompts of this length"


def _client(service: Service):
    """Raises InputError where the client, the key or a usable URL is missing."""
    try:
        import openai
    except ImportError:
        raise InputError("a remote endpoint needs the openai client: pip install 'cfgsafe[remote]'") from None
    key, url = os.environ.get("OPENAI_API_KEY", "").strip(), os.environ.get("OPENAI_BASE_URL", "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise InputError("set OPENAI_API_KEY to the endpoint's key (any word where it needs none)")
    if url and not url.startswith(("http://", "https://")):
        raise InputError("OPENAI_BASE_URL must begin with http:// or https://")
    try:
        return openai.OpenAI(api_key=key, base_url=url or None, timeout=service.timeout, max_retries=0)
    except Exception:  # the client's URL parser has its own exception, and its message would show the URL
        raise InputError("OPENAI_BASE_URL is not a URL such as http://localhost:8000/v1") from None
