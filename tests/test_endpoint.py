"""One request: whatever an endpoint writes, it ends in time, and nobody else gets the key."""

import resource
import time

import endpoint
import pytest
from conftest import KEY

from cfgsafe.endpoint import LARGEST, Endpoint, Failed, retry_after
from cfgsafe.errors import InputError

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "temperature": 0.0}
TEXT = {"prompt": "Hi", "max_tokens": 9, "temperature": 0.0}
WORDS = {
    "trickle": "no answer within 0.5 s",
    "trickled head": "no answer within 0.5 s",
    "endless continues": "no answer within 0.5 s",
    "endless": f"more than {LARGEST} bytes",
    "endless error": "HTTP 500",
    "endless head": "no connection",
    "cut": "cut off",
    "no HTTP": "no connection",
    "gzip": "a compressed answer",
    "deep": "not JSON",
    "deep lists": "not JSON",
    "not UTF-8": "not JSON",
    "nothing": "not JSON",
    "no content": "not JSON",
    "wait for ever": "HTTP 429",
    "wait for a strange time": "HTTP 429",
}


@pytest.mark.parametrize("settings", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("fault", endpoint.HOSTILE)
def test_whatever_comes_is_a_failed_attempt_in_time(serve, fault, settings):
    server = serve(faults=(fault,), share=1.0, last_fault=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Endpoint("m", timeout=0.5 if WORDS.get(fault, "").startswith("no answer") else 20.0) as asked:
        started = time.monotonic()
        with pytest.raises(Failed, match=WORDS.get(fault, "an answer without text")):
            asked.ask(settings)
        assert time.monotonic() - started < 10
        assert asked.ask(settings) == "Fine."  # the connection serves on
    assert server.failed[fault] == 1 and len(server.bodies) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB on Linux


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(serve, status):
    """Another host would get the key and the question."""
    stranger = serve()
    server = serve(redirect=(status, stranger.url))
    with Endpoint("m", timeout=5.0) as asked, pytest.raises(InputError, match="redirects") as caught:
        asked.ask(CHAT)
    assert len(server.bodies) == 1 and not stranger.bodies
    assert len(str(caught.value).splitlines()) == 1 and KEY not in str(caught.value)


def test_an_answer_of_many_bytes_is_read(serve):
    long = "word " * (LARGEST // 10)
    serve(lambda body: long)
    with Endpoint("m", timeout=20.0) as asked:
        assert asked.ask(CHAT) == asked.ask(TEXT) == long


def test_retry_after_is_read():
    assert retry_after("7") == 7.0 and retry_after("-1") == 0.0
    for header in (None, "soon", "nan", "inf", "9" * 5000, "Mon, 01 Jan 0001 00:00:00 +2359", "\x00", ""):
        assert retry_after(header) is None or retry_after(header) == 0.0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 0 < retry_after(date) <= 30
