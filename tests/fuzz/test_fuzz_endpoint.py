"""Runs against an endpoint that fails in random ways: in time, one line, and no answer paid for twice.

A case holds when
  - the run ends in time, with the right answers in order or with one line, and nobody else gets a request;
  - every kept answer is one that the endpoint gave, and no request is made beyond the meter;
  - a second run against a sound endpoint asks what is not kept, once, and then has every answer;
  - the key is in no message and in no file.
"""

import json
import os
import time

import endpoint
import pytest

from cfgsafe import remote
from cfgsafe.errors import InputError
from cfgsafe.files import Log, read_answers
from cfgsafe.remote import Meter, Question, Service, ask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
LONGEST = 40  # seconds of a run; on a free machine it needs 5 at most
FAULTS = (*endpoint.FAULTS, *endpoint.HOSTILE)


def reply(body: dict) -> str:
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return f"re: {text} {body.get('seed')}"


def questions_of(rng) -> list[Question]:
    questions = []
    for _ in range(rng.randrange(1, 25)):
        text, seed = str(rng.randrange(15)), rng.choice([None, 3])
        chat = None if rng.random() < 0.3 else [{"role": "user", "content": text}]
        questions.append(Question(chat, None if chat else text, 9, 0.0, seed))
    return questions


def wanted(question: Question) -> str:
    return f"re: {question.messages[-1]['content'] if question.messages else question.prompt} {question.seed}"


class Disk:
    """Where some writes of answers fail."""

    def __init__(self, monkeypatch):
        self.share, add = 0.0, Log.add

        def adding(log, row):
            if self.rng.random() < self.share:
                raise InputError("answers.jsonl: cannot be written (No space left on device)")
            add(log, row)

        monkeypatch.setattr(Log, "add", adding)


def test_fuzz_endpoint(cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.2)
    disk, key = Disk(monkeypatch), os.environ["OPENAI_API_KEY"]
    counts = {"whole": 0, "line": 0, "kept": 0, "requests": 0}
    for number, rng in enumerate(cases):
        questions, cache = questions_of(rng), tmp_path / f"{number}.jsonl"
        few = rng.sample(FAULTS, rng.randrange(1, len(FAULTS)))
        server_settings = {"faults": few, "share": rng.choice([0.0, 0.2, 0.5, 1.0]), "stall": 0.6}
        server_settings["last_fault"] = rng.choice([1, 2, 99])
        service = Service("m", rng.choice([1, 4, 16]), rng.choice([0.3, 0.5]), rng.randrange(1, 5))
        meter = rng.choice([None, Meter(), Meter(rng.randrange(1, 30))])
        disk.rng, disk.share = rng, rng.choice([0.0, 0.0, 0.1, 1.0])
        with endpoint.running(reply) as stranger, endpoint.running(reply, **server_settings) as server:
            server.rng = rng
            if rng.random() < 0.1:
                server.redirect = (rng.choice([301, 302, 307, 308]), stranger.url)
            if rng.random() < 0.1:
                server.status = rng.choice([400, 401, 403, 404, 413, 418, 422, 429, 500, 503, 599])
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            monkeypatch.setenv("OPENAI_API_KEY", key)
            started = time.monotonic()
            try:
                answers = ask(service, questions, cache, "fuzz", meter)
            except InputError as error:
                line = str(error)
                assert line.isprintable() and len(line) < 400 and key not in line
                counts["line"] += 1
            else:
                counts["whole"] += None not in answers
                for question, answer in zip(questions, answers, strict=True):
                    assert answer == wanted(question) or (answer is None and meter)
            assert time.monotonic() - started < LONGEST
            assert not stranger.bodies
            assert meter is None or meter.made >= len(server.bodies)  # some may not come in time
            assert meter is None or meter.limit is None or meter.made <= meter.limit
            texts = {answer.text for answer in read_answers(cache).values()}
            given = {reply(json.loads(raw)) for raw in server.answered}
            assert texts <= given
            monkeypatch.setenv("OPENAI_API_KEY", f"{key}-2")  # tells its requests from late ones
            server.faults, server.share, server.redirect, server.status = (), 0.0, None, None
            disk.share = 0.0
            kept = len(read_answers(cache))
            service.timeout = 20.0
            again = ask(service, questions, cache, "fuzz")
            assert again == [wanted(question) for question in questions]
            different = len({remote.key_of(service, question) for question in questions})
            assert server.keys.count(f"Bearer {key}-2") == different - kept
        counts["kept"] += kept
        counts["requests"] += len(server.bodies)
        assert key not in cache.read_text() + capsys.readouterr().err
        cache.unlink()
    with capsys.disabled():
        print(counts)
