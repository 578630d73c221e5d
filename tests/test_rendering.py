"""Chat templates from elsewhere: each failure is one line, and time and memory have a limit."""

import os
import random
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import random_model

from cfgsafe.blue import pairs
from cfgsafe.errors import InputError
from cfgsafe.hub import BASE
from cfgsafe.measure import leak, recollect
from cfgsafe.measure.perplexity import dialogue_logprobs
from cfgsafe.measure.targets import Target
from cfgsafe.measure.utility import option_logprobs
from cfgsafe.red import safety
from cfgsafe.rendering import RENDERER, Renderer, TemplateError
from cfgsafe.request import Request
from cfgsafe.request_lines import read_request
from cfgsafe.subject import Subject, answers
from cfgsafe.tokenizer import Tokenizer

QUICK = Renderer(seconds=1)
HI = {"messages": [{"role": "user", "content": "Hi {{ 7 * 6 }}"}], "bos_token": "<s>"}

FAILURES = {
    "{% if %}": "fails in line 1 (TemplateSyntaxError",
    "a\n{{ messages[3].content.x }}": "fails in line 2 (UndefinedError",
    "{{ nothing() }}": "UndefinedError: 'nothing' is undefined",
    "{{ messages | sum }}": "TypeError",
    "{{ 'x' | format(1, 2) }}": "TypeError",
    "{{ messages[0].content.nope.nope }}": "UndefinedError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "SecurityError",
    "{% set x = messages.append(1) %}": "SecurityError",
    "{% include 'x' %}": "TypeError: no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('no\nsystem\x1b[2J') }}": "refuses this conversation: no system [2J",
    "{{ range(10**9) | list }}": "OverflowError: Range too big",
    "{{ 'x' * 10**10 }}": "needs more than 1024 MiB of memory",
    "{{ 'x'.center(10**11) }}": "needs more than 1024 MiB of memory",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "mend it",
    "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x }}": "",
    "{{ 'x' * 2**25 }}": "writes more than 16777216 characters",
    "{{ raise_exception('x' * 5000) }}": "x...",
    "{" * 20000: "",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}": "RecursionError",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "",
}


@pytest.mark.parametrize(("template", "words"), FAILURES.items(), ids=range(len(FAILURES)))
def test_each_failure_is_one_line(template, words):
    with pytest.raises(TemplateError) as caught:
        QUICK.render(template, HI)
    line = str(caught.value)
    assert line.startswith("the chat template ") and words in line
    assert line.isprintable() and len(line) < 500
    assert QUICK.render("{{ bos_token }}", HI) == "<s>"


LOOPS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 9**(9**9) }}",
    "{% set x = (range(99999) | list) * 90 %}{{ x | sum(start=[] | length) }}{{ x | unique | list | length }}"
    "{% for i in range(99999) %}{% if 0.5 in x %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("template", LOOPS, ids=range(len(LOOPS)))
def test_a_template_that_runs_on_ends(template):
    """Also where Python itself gets no turn, inside one call."""
    started = time.monotonic()
    with pytest.raises(TemplateError, match="takes more than 1 s"):
        QUICK.render(template, HI)
    assert time.monotonic() - started < 30  # on a machine that does other things too
    assert QUICK.render("ok", HI) == "ok"


def test_text_of_a_user_is_no_template():
    assert RENDERER.render("{{ messages[0].content }}", HI) == "Hi {{ 7 * 6 }}"


def test_any_text_comes_back_as_it_is():
    text = "a\n\r\t\u2028\x00\x1b\ud800 😀 \\ud83d \"'"
    assert RENDERER.render("{{ x }}", {"x": text}) == text


def test_threads_get_their_own_texts():
    wrong = []

    def many(number: int) -> None:
        for turn in range(50):
            text = f"{number} {turn}"
            if RENDERER.render("{{ x }}", {"x": text}) != text:
                wrong.append(text)

    threads = [threading.Thread(target=many, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_interrupt_leaves_no_reply_for_the_next(monkeypatch):
    renderer = Renderer()
    renderer.render("x", HI)
    process, stream = renderer._process, renderer._process.stdout

    class Interrupted:
        def __getattr__(self, name):
            return getattr(stream, name)

        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        renderer.render("old", HI)
    assert process.poll() is not None and renderer.render("new", HI) == "new"


def test_a_fork_has_a_process_of_its_own():
    assert RENDERER.render("before", HI) == "before"
    mine = RENDERER._process.pid
    child = os.fork()
    if child == 0:
        text = RENDERER.render("child", HI)
        os._exit(0 if text == "child" and RENDERER._process.pid != mine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert RENDERER.render("after", HI) == "after" and RENDERER._process.pid == mine


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    """Each reader of conversations knows the file and the line."""
    refuse = "{% for m in messages if m.content == 'B' %}{{ raise_exception('no B') }}{% endfor %}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BASE) / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(refuse + "{{ bos_token }}{{ messages[-1].content }}")
    tokenizer, model, subject = Tokenizer.load(tmp_path), random_model(), Subject("m")
    bad = [{"role": "user", "content": "B"}]
    turns = [*bad, {"role": "assistant", "content": "x"}]
    sample = pairs.Sample(bad, "x", "f:7", ())
    asked = pairs.Options("d", "m", "p", recipes=("avoid",))
    writer = safety.Writer(safety.Options("m", attacks=("a",), out="o"), model, tokenizer)
    prompt = leak.Prompt("p", "", "", bad, {}, "f:7")
    target = Target(0, "f:7", "PERSON", "x", "", bad)
    read = partial(read_request, place="f:7", tokenizer=tokenizer, subject=subject, defaults=Request([]))
    calls = {
        "answers": lambda: answers(subject, model, tokenizer, [bad], "quiz", 1, ["f:7"]),
        "request": lambda: read({"messages": bad}, system=None),
        "sides": lambda: read({"messages": bad, "negative_messages": bad, "guidance": 3}, system=None),
        "perplexity": lambda: dialogue_logprobs(subject, model, tokenizer, [("f:7", turns)]),
        "options": lambda: option_logprobs(subject, model, tokenizer, [("f:7", {"options": ["a"]})], [bad]),
        "recollect": lambda: recollect.sample(
            subject, recollect.Settings(1, 1, 0), model, tokenizer, [target]
        ),
        "pairs": lambda: pairs.plain((sample, "y"), tokenizer),
        "chosen": lambda: pairs.from_model([sample], model, tokenizer, asked, random.Random(0)),
        "safety": lambda: writer.answer([prompt], None, 0.0, random.Random(0), "x"),
        "row": lambda: writer.row(prompt, "x"),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises(InputError) as caught:
            call()
        said[name] = str(caught.value)
    assert said == dict.fromkeys(calls, "f:7: the chat template refuses this conversation: no B")
