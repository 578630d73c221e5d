"""Remote endpoints: each question is answered once, whatever fails, and a run goes on after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import endpoint
import pytest
from conftest import KEY

from cfgsafe import remote
from cfgsafe.blue import pairs
from cfgsafe.endpoint import retry_after
from cfgsafe.errors import InputError
from cfgsafe.files import Log, read_answers, write_jsonl
from cfgsafe.hub import BASE
from cfgsafe.remote import Meter, Question, Service, ask

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick")


def chat(text: str, **changes) -> Question:
    return Question(
        **{
            "messages": [{"role": "user", "content": text}],
            "prompt": None,
            "max_tokens": 9,
            "temperature": 0.0,
            **changes,
        }
    )


def echo(body: dict) -> str:
    return f"re: {body['prompt'] if 'prompt' in body else body['messages'][-1]['content']}"


def service(**changes) -> Service:
    return Service(**{"remote_model": "m", "timeout": 5.0, **changes})


def test_answers_come_in_order_through_every_fault(serve, tmp_path):
    server = serve(echo, share=0.7, stall=1.3)
    answers = ask(
        service(timeout=1.0, concurrency=30), [chat(str(n)) for n in range(60)], tmp_path / "c.jsonl", "test"
    )
    assert answers == [f"re: {n}" for n in range(60)]
    assert set(server.answered.values()) == {1} and len(server.answered) == 60
    assert all(server.failed[fault] for fault in endpoint.FAULTS)


def test_completion_mode_sends_the_prompt(serve, tmp_path):
    server = serve(echo)
    question = Question(None, "Once upon", max_tokens=7, temperature=0.5, seed=3)
    assert ask(service(), [question], tmp_path / "c.jsonl", "test") == ["re: Once upon"]
    sent = {
        "model": "m",
        "prompt": "Once upon",
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
        "path": "/v1/completions",
    }
    assert server.bodies == [sent]


def test_the_same_question_is_asked_once_and_an_answered_one_never_again(serve, tmp_path, capsys):
    server = serve(echo)
    for _ in range(2):
        assert ask(service(), [chat("a"), chat("b"), chat("a")], tmp_path / "c.jsonl", "test") == [
            "re: a",
            "re: b",
            "re: a",
        ]
    assert len(server.bodies) == 2 and capsys.readouterr().err.count("questions to ask") == 1


@pytest.mark.parametrize(
    "other",
    [
        (service(remote_model="n"), chat("a")),
        (service(), chat("a", seed=1)),
        (service(), chat("a", temperature=1.0)),
        (service(), chat("a", max_tokens=8)),
        (service(), chat("a", top_p=0.9)),
        (service(), chat("a", messages=None, prompt="a")),
    ],
)
def test_another_model_or_setting_is_another_question(other):
    assert remote.key_of(*other) != remote.key_of(service(), chat("a"))


def test_the_endpoints_settings_do_not_change_the_question():
    assert remote.key_of(
        service(concurrency=3, timeout=1, attempts=2, price_in=1, price_out=1), chat("a")
    ) == remote.key_of(service(), chat("a"))


def test_answers_kept_before_there_was_a_top_p_are_found():
    assert remote.key_of(service(), chat("a")) == "813975c52c566a36b46c532afacff4b8"


def test_a_model_of_the_same_name_behind_another_url_is_another_model(monkeypatch):
    alone = remote.key_of(service(), chat("a"))
    keys = []
    for url in ("http://localhost:1/v1", "http://localhost:2/v1", "http://localhost:2/v1/"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        keys.append(remote.key_of(service(), chat("a")))
    assert len({alone, *keys}) == 3 and keys[1] == keys[2]


def test_a_line_that_a_crash_cut_is_asked_again(serve, tmp_path):
    server = serve(echo)
    ask(service(concurrency=1), [chat("a"), chat("b")], tmp_path / "c.jsonl", "test")
    kept = (tmp_path / "c.jsonl").read_bytes()
    (tmp_path / "c.jsonl").write_bytes(kept[:-9])
    assert ask(service(), [chat("a"), chat("b")], tmp_path / "c.jsonl", "test") == ["re: a", "re: b"]
    assert len(server.bodies) == 3 and (tmp_path / "c.jsonl").read_bytes() == kept


def test_another_file_is_not_taken_for_kept_answers(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match=r"c\.jsonl:1: needs 'key' and 'answer'"):
        ask(service(), [chat("a")], tmp_path / "c.jsonl", "test")


def test_the_estimate_comes_before_the_first_call(serve, tmp_path, capsys):
    server = serve(echo)
    ask(service(), [chat("x" * 400)], tmp_path / "c.jsonl", "test")
    capsys.readouterr()
    seen = []
    server.reply = lambda body: seen.append(capsys.readouterr().err) or "ok"
    prices = service(price_in=1000.0, price_out=10000.0)
    ask(prices, [chat("x" * 400), chat("y" * 400, max_tokens=50)], tmp_path / "c.jsonl", "judge")
    line = "judge: 1 questions to ask (1 answered before), about 100 tokens in (characters / 4), "
    line += "at most 50 out, at most about 0.60 USD"
    assert seen[0].splitlines()[0] == line


def test_retry_after_is_waited_for():
    assert retry_after("7") == 7.0 and retry_after("-1") == 0.0
    assert retry_after(None) is retry_after("soon") is retry_after("nan") is None
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 0 < retry_after(date) <= 30


@pytest.mark.parametrize(
    ("told", "least", "most"), [(None, 0.5 * (10 + 20), 1.5 * (10 + 20)), (7.0, 14, 15), (9999.0, 600, 600)]
)
def test_waits_grow_or_follow_the_endpoint(monkeypatch, told, least, most):
    monkeypatch.setattr(remote, "FIRST_WAIT", 10.0)
    waited = []

    class Clock:
        def wait(self, seconds):
            waited.append(seconds)

    def attempt():
        raise remote.Failed("x", told)

    with pytest.raises(remote.Failed):
        remote._patiently(attempt, 3, Clock())
    assert len(waited) == 2 and least <= sum(waited) <= most


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "set OPENAI_API_KEY"),
        (403, "set OPENAI_API_KEY"),
        (404, "check --remote-model"),
        (400, r"refuses the question \(HTTP 400\)"),
    ],
)
def test_a_refusal_ends_at_once_and_says_what_to_do(serve, tmp_path, capsys, status, words):
    server = serve(echo)
    server.status = status
    with pytest.raises(InputError, match=words) as caught:
        ask(service(concurrency=2), [chat(str(n)) for n in range(50)], tmp_path / "c.jsonl", "test")
    assert "50 of 50" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert len(server.bodies) <= 4 and KEY not in str(caught.value) + capsys.readouterr().err


def test_the_endpoints_wait_goes_before_our_own(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 20.0)
    serve(echo, faults=("rate limit",), share=1.0, last_fault=1)  # Retry-After: 0
    started = time.time()
    assert ask(service(), [chat("a")], tmp_path / "c.jsonl", "test") == ["re: a"]
    assert time.time() - started < 8


def test_scattered_failures_are_no_outage(serve, tmp_path):
    serve(lambda body: "" if int(echo(body)[4:]) % 2 else echo(body))
    with pytest.raises(InputError, match="20 of 40 questions remain"):
        ask(
            service(attempts=1, concurrency=1),
            [chat(str(n)) for n in range(40)],
            tmp_path / "c.jsonl",
            "test",
        )


def test_a_question_without_an_answer_does_not_hold_the_others_back(serve, tmp_path):
    server = serve(lambda body: "" if echo(body) == "re: 0" else echo(body))
    with pytest.raises(
        InputError,
        match=r"1 of 20 questions remain .* 3 attempts \(an answer without text\); running again resumes",
    ):
        ask(service(attempts=3), [chat(str(n)) for n in range(20)], tmp_path / "c.jsonl", "test")
    assert len(read_answers(tmp_path / "c.jsonl")) == 19
    server.reply = echo
    assert ask(service(), [chat(str(n)) for n in range(20)], tmp_path / "c.jsonl", "test")[0] == "re: 0"
    assert len(server.bodies) == 19 + 3 + 1


def test_an_endpoint_that_is_down_is_not_asked_every_question(serve, tmp_path):
    server = serve(faults=("error",), share=1.0, last_fault=99)
    with pytest.raises(InputError, match=r"100 of 100 questions remain .*HTTP 500"):
        ask(
            service(attempts=2, concurrency=4),
            [chat(str(n)) for n in range(100)],
            tmp_path / "c.jsonl",
            "test",
        )
    assert len(server.bodies) <= 2 * (remote.OUTAGE + 4)


def test_a_meter_bounds_every_request_and_what_fails_has_none(serve, tmp_path, capsys):
    server, meter = serve(echo, share=0.7, stall=1.3), Meter(70)
    answers = ask(
        service(timeout=1.0, concurrency=20),
        [chat(str(n)) for n in range(60)],
        tmp_path / "c.jsonl",
        "test",
        meter,
    )
    assert len(server.bodies) == meter.made == 70 and meter.spent
    assert 10 < answers.count(None) < 50 and len(server.answered) == 60 - answers.count(None)
    assert all(answer in (None, f"re: {n}") for n, answer in enumerate(answers))
    assert "questions to ask" not in capsys.readouterr().err
    again = ask(service(), [chat(str(n)) for n in range(60)], tmp_path / "c.jsonl", "test", meter)
    assert again == answers  # from the cache alone
    assert len(server.bodies) == 70


def test_a_meter_without_limit_gives_up_on_single_questions_only(serve, tmp_path, capsys):
    replies = {"re: 0": "", "re: 1": 400, "re: 2": 422}
    server, meter = serve(lambda body: replies.get(echo(body), echo(body))), Meter()
    questions = [chat(str(n)) for n in range(20)]
    answers = ask(service(attempts=3), questions, tmp_path / "c.jsonl", "test", meter)
    assert answers == [None] * 3 + [f"re: {n}" for n in range(3, 20)]
    assert len(server.bodies) == meter.made == 17 + 3 + 1 + 1 and not meter.spent
    assert capsys.readouterr().err.splitlines()[-1].startswith("test: 3 of 20 questions without an answer (")
    replies.clear()
    assert ask(service(), questions, tmp_path / "c.jsonl", "test", meter)[:3] == ["re: 0", "re: 1", "re: 2"]
    assert meter.made == 22 + 3


def test_many_refused_questions_are_no_outage(serve, tmp_path):
    serve(lambda body: 400 if int(echo(body)[4:]) < 20 else echo(body))
    answers = ask(
        service(concurrency=1), [chat(str(n)) for n in range(21)], tmp_path / "c.jsonl", "test", Meter()
    )
    assert answers == [None] * 20 + ["re: 20"]


def test_with_a_meter_an_outage_is_left_alone_and_a_refused_key_still_raises(serve, tmp_path):
    server, meter = serve(faults=("error",), share=1.0, last_fault=99), Meter()
    asked = [chat(str(n)) for n in range(100)]
    assert ask(service(attempts=2, concurrency=4), asked, tmp_path / "c.jsonl", "test", meter) == [None] * 100
    assert len(server.bodies) == meter.made <= 2 * (remote.OUTAGE + 4)
    server.status = 401
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        ask(service(), asked, tmp_path / "c.jsonl", "test", meter)


class Disk:
    """Where the writes of these numbers find no room."""

    def __init__(self, monkeypatch, full):
        self.full, self.writes, add = full, 0, Log.add

        def adding(log, row):
            self.writes += 1
            if self.writes - 1 in self.full:
                raise InputError("c.jsonl: cannot be written (No space left on device)")
            add(log, row)

        monkeypatch.setattr(Log, "add", adding)


@pytest.mark.parametrize("meter", [None, Meter()], ids=["all", "metered"])
def test_answers_that_cannot_be_written_stop_the_run_and_are_counted(
    serve, tmp_path, monkeypatch, capsys, meter
):
    server, _ = serve(echo, delay=0.05), Disk(monkeypatch, range(5, 999))
    questions = [chat(str(n)) for n in range(100)]
    with pytest.raises(InputError) as caught:
        ask(service(concurrency=4), questions, tmp_path / "c.jsonl", "test", meter)
    lost = len(server.bodies) - 5
    assert 1 <= lost <= 8 and len(read_answers(tmp_path / "c.jsonl")) == 5
    assert str(caught.value) == (
        "test: c.jsonl: cannot be written (No space left on device); "
        "95 of 100 questions remain, running again resumes"
    )
    assert f"c.jsonl: {lost} answers were not saved" in capsys.readouterr().err


def test_answers_that_could_not_be_written_are_written_at_the_end(serve, tmp_path, monkeypatch):
    server, disk = serve(echo), Disk(monkeypatch, {3})
    questions = [chat(str(n)) for n in range(100)]
    with pytest.raises(InputError, match=r"No space left on device\); \d+ of 100 questions remain"):
        ask(service(concurrency=4), questions, tmp_path / "c.jsonl", "test")
    assert len(read_answers(tmp_path / "c.jsonl")) == len(server.bodies) < 100
    assert ask(service(), questions, tmp_path / "c.jsonl", "test") == [f"re: {n}" for n in range(100)]
    assert len(server.bodies) == 100  # nothing was paid for twice
    disk.full = {disk.writes}
    assert ask(service(), [chat("last")], tmp_path / "c.jsonl", "test") == ["re: last"]
    assert len(read_answers(tmp_path / "c.jsonl")) == 101


def test_many_attempts_are_no_endless_wait(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.5)
    waited = []

    class Clock:
        def wait(self, seconds):
            waited.append(seconds)

    def attempt():
        raise remote.Failed("x")

    with pytest.raises(remote.Failed):
        remote._patiently(attempt, 3000, Clock())
    assert len(waited) == 2999 and max(waited) == remote.LONGEST_WAIT


def test_threads_never_take_more_than_a_meter_has():
    class Slow(Meter):
        @property
        def spent(self):
            spent = super().spent
            time.sleep(0.001)
            return spent

    meter = Slow(20)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: meter.take(), range(40)))
    assert sum(taken) == meter.made == 20


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        ({"OPENAI_API_KEY": ""}, {}, "set OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "a\nb"}, {}, "set OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": "localhost:8000"}, {}, "must begin with http"),
        ({"OPENAI_BASE_URL": "http://localhost:x/v1"}, {}, "not a URL"),
        ({}, {"remote_model": None}, "needs --remote-model"),
        ({}, {"timeout": 0.0}, "--timeout 0.0"),
        ({}, {"attempts": 0}, "--attempts 0"),
        ({}, {"concurrency": 0}, "--concurrency 0"),
        ({}, {"price_in": 1.0}, "go together"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_first_call(
    monkeypatch, tmp_path, environment, settings, words
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        ask(service(**settings), [chat("a")], tmp_path / "c.jsonl", "test")


def test_without_the_client_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'cfgsafe\[remote\]'"):
        ask(service(), [chat("a")], tmp_path / "c.jsonl", "test")


def question_of(body: dict) -> str:
    """The cache's key of a question that the endpoint received."""
    question = Question(body["messages"], None, body["max_tokens"], body["temperature"], body["seed"])
    return remote.key_of(Service(body["model"]), question)


def test_pairs_lose_no_sample_to_faults_and_a_kill_and_ask_no_answered_question_again(tmp_path, serve):
    """200 samples, two remote recipes, kill -9 in the middle, and again."""
    rows = []
    for n in range(200):
        name = f"Ann{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{'uv'[n // 100]}"
        answer = f"Hello {name}!" if n % 2 else f"{name}, hello."
        start = answer.index(name)
        messages = [{"role": "user", "content": f"I am {name}."}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "spans": [[1, start, start + len(name), "PERSON"]]})
    write_jsonl(tmp_path / "d.jsonl", rows)
    server = serve(lambda body: "how can i help you?", share=0.3, stall=2.5, delay=0.03)
    line = [sys.executable, "train.py", "pairs", "--dialogues", str(tmp_path / "d.jsonl"), "--model", BASE]
    line += ["--out", str(tmp_path / "p.jsonl"), "--recipes", "remote", "remote+begin", "--remote-model", "m"]
    line += "--concurrency 32 --timeout 2 --attempts 9 --ner".split() + [str(ROOT / "cfgsafe/demo/ner")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cache = tmp_path / "p-answers.jsonl"

    killed = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while killed.poll() is None and sum(server.answered.values()) < 100:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    output = killed.communicate()[1]
    time.sleep(0.2)  # what was under way
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "p.jsonl").exists()
    kept, asked = set(read_answers(cache)), len(server.bodies)
    assert 50 < len(kept) < 250

    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{300 - len(kept)} questions to ask ({len(kept)} answered before)" in done.stderr
    assert (
        "200 pairs of 200 samples" in done.stderr
        and len((tmp_path / "p.jsonl").read_text().splitlines()) == 400
    )
    assert not kept & {question_of(body) for body in server.bodies[asked:]}
    twice = {question_of(json.loads(raw)) for raw, times in server.answered.items() if times > 1}
    assert len(server.answered) == len(read_answers(cache)) == 300 and len(twice) <= 32 and not twice & kept
    assert all(server.failed[fault] for fault in endpoint.FAULTS)
    for text in (output, done.stdout, done.stderr, *(p.read_text() for p in tmp_path.iterdir())):
        assert KEY not in text


def test_each_remote_recipe_sends_its_own_chat(serve, tmp_path, tokenizer):
    server = serve(lambda body: "Hello there." if pairs.BEGIN in body["messages"][-1]["content"] else "hi.")
    asked = [{"role": "user", "content": "I am Ann."}]
    sample = pairs.Sample(
        [*asked, {"role": "assistant", "content": "Hello"}], " Ann!", "x", (("PERSON", "Ann"),)
    )
    whole = pairs.Sample(asked, "Ann, hello.", "x", (("PERSON", "Ann"),))
    options = pairs.Options(
        "d", BASE, str(tmp_path / "p.jsonl"), recipes=("remote", "remote+begin"), service=service()
    )
    options.service.concurrency = 1
    candidates = pairs.from_endpoint([sample, whole], tokenizer, options)
    system = {"role": "system", "content": pairs.AVOID}
    user = {"role": "user", "content": f"{pairs.NUDGE} I am Ann."}
    begin = {"role": "user", "content": f"{user['content']}\n\n{pairs.BEGIN}Hello"}
    assert [body["messages"] for body in server.bodies] == [
        [system, user, sample.messages[-1]],
        [system, begin],
        [system, user],
    ]
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    texts = lambda several: [(candidate.recipe, candidate.text) for candidate in several]
    first, second = map(texts, candidates)
    assert first == [("remote", " hi."), ("remote+begin", " there.")] and second == [("remote", "hi.")]


def test_remote_answers_are_checked_as_local_ones_are(serve, tmp_path, tokenizer):
    replies = {
        "a": "Sure, Ann Lee.",
        "b": "word " * 300,
        "c": "never <|eot_id|>",
        "d": "I keep that to myself.",
    }
    serve(lambda body: replies[body["messages"][-1]["content"][-1]])
    samples = [
        pairs.Sample([{"role": "user", "content": n}], "It is Ann.", n, (("PERSON", "Ann Lee"),))
        for n in replies
    ]
    options = pairs.Options("d", BASE, str(tmp_path / "p.jsonl"), recipes=("remote",), service=service())
    built, report = pairs.build(samples, None, tokenizer, lambda texts: [[] for _ in texts], options)
    assert [(sample.place, text) for sample, text in built] == [("d", replies["d"])]
    assert report.won == {"remote": 1}
    assert report.fell == {"remote": {"personal data": 1, "too long": 1, "control token in the text": 1}}
