"""One request to an OpenAI-compatible endpoint, which may answer slowly, wrongly or without an end.

Source: OpenAI's HTTP API, chat and completions, through the `openai` client. The base URL and the
key come from OPENAI_BASE_URL and OPENAI_API_KEY only, and no message shows them.
Deviations: the client's own retries are off. They do not cover unreadable and empty answers, and they
hide the number of requests. Its time limit holds for each read, so that a byte a second never ends;
here one limit holds for the whole request, which an event loop can end at any byte. At most LARGEST
bytes of an answer are read, and none of an error. No redirect is followed: another host would get the
key and the questions. Compressed answers are refused, because a small one can be huge.

Run it: python -m pytest tests/test_endpoint.py
"""

import asyncio
import json
import os
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any, Self

from cfgsafe.errors import InputError

LARGEST = 2**23  # bytes of an answer
QUESTION_REFUSED = (400, 413, 422)  # HTTP statuses that concern one question, not the key or the model


class Refused(InputError):
    """The endpoint will not answer this question; it may answer others."""


class Failed(Exception):
    """An attempt gave no answer; `wait` is the number of seconds that the endpoint asks to wait."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class Endpoint:
    """A connection to the endpoint, whose event loop has a thread of its own. Threads may share it."""

    def __init__(self, model: str, timeout: float):
        """Raises InputError when the `openai` package, the key or a usable URL is missing."""
        self.model, self.timeout = model, timeout
        self._client = open_client(self._check)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, settings: dict[str, Any]) -> str:
        """The answer to one request; `settings` hold `messages` or `prompt`, and how to sample.

        Raises Failed when asking again may help, and InputError when it cannot.
        """
        body = asyncio.run_coroutine_threadsafe(self._post(settings), self._loop).result()
        try:
            response = json.loads(body)
        except (ValueError, RecursionError):
            raise Failed("an answer that is not JSON") from None
        text = _text_of(response, chat="messages" in settings)
        if text is None:
            raise Failed("an answer without text")
        return text.encode(errors="replace").decode()  # half of a surrogate pair is not text

    async def _post(self, settings: dict[str, Any]) -> bytes:
        """The body of the answer. Raises as `ask` does."""
        import openai

        kind = self._client.chat.completions if "messages" in settings else self._client.completions
        request = kind.with_streaming_response.create(
            model=self.model, extra_headers={"Accept-Encoding": "identity"}, **settings
        )
        try:
            async with asyncio.timeout(self.timeout), request as response:
                return await _read(response)
        except (TimeoutError, openai.APITimeoutError):
            raise Failed(f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, InputError | Failed):  # some versions wrap what _check raises
                raise error.__cause__ from None
            raise Failed("no connection; is OPENAI_BASE_URL right?") from None

    async def _check(self, response) -> None:
        """Called before the body is read: raises unless it may be an answer."""
        status, headers = response.status_code, response.headers
        if status in (408, 409, 429) or status >= 500:
            raise Failed(f"HTTP {status}", retry_after(headers.get("retry-after")))
        if 300 <= status < 400:
            raise InputError(
                f"the endpoint redirects (HTTP {status}), which is not followed, since another host would "
                "get the key; set OPENAI_BASE_URL to where it leads"
            )
        if status >= 400:
            raise (Refused if status in QUESTION_REFUSED else InputError)(_refusal(status, self.model))
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Failed("a compressed answer, though none was asked for")


async def _read(response) -> bytes:
    """The body of a response. Raises Failed when it is cut off or too large."""
    body = bytearray()
    try:
        async for chunk in response.iter_bytes():
            body += chunk
            if len(body) > LARGEST:
                break
    except Exception:  # of the library under the client, which differs from version to version
        raise Failed("an answer that was cut off") from None
    if len(body) > LARGEST:
        raise Failed(f"an answer of more than {LARGEST} bytes")
    return bytes(body)


def _text_of(response: object, chat: bool) -> str | None:
    """The text of a response; None when it has none, or only white space."""
    choices = response.get("choices") if isinstance(response, dict) else None
    holder = choices[0] if isinstance(choices, list) and choices else None
    if chat and isinstance(holder, dict):
        holder = holder.get("message")
    text = holder.get("content" if chat else "text") if isinstance(holder, dict) else None
    return text if isinstance(text, str) and text.strip() else None


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a header with a number of seconds or a date; None when it has neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None


def _refusal(status: int, model: str) -> str:
    if status in (401, 403):
        advice = f"set OPENAI_API_KEY to one that may use {model!r}"
        return f"the endpoint refuses the key (HTTP {status}); {advice}"
    if status == 404:
        return (
            f"the endpoint knows no model {model!r}, or no such path (HTTP 404); check --remote-model and "
            "OPENAI_BASE_URL (mostly .../v1)"
        )
    return (
        f"the endpoint refuses the question (HTTP {status}); check that {model!r} takes max_tokens, "
        "temperature and prompts of this length"
    )


def open_client(check):
    """An `openai.AsyncOpenAI` that calls `check(response)` before it reads the body.

    Raises InputError when the package, the key or a usable URL is missing.
    """
    try:
        import openai
    except ImportError:
        raise InputError("a remote endpoint needs the openai client: pip install 'cfgsafe[remote]'") from None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    url = os.environ.get("OPENAI_BASE_URL", "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise InputError("set OPENAI_API_KEY to the endpoint's key (any word where it needs none)")
    if url and not url.startswith(("http://", "https://")):
        raise InputError("OPENAI_BASE_URL must begin with http:// or https://")
    http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [check]})
    try:
        return openai.AsyncOpenAI(
            api_key=key, base_url=url or None, timeout=None, max_retries=0, http_client=http
        )
    except Exception:  # the client's URL parser has its own exception, and its message would show the URL
        raise InputError("OPENAI_BASE_URL is not a URL such as http://localhost:8000/v1") from None
