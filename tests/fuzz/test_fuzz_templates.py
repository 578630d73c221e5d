"""Random chat templates and conversations: one line or transformers' own text, in time; user text stays text.

Templates are assembled from fragments of Jinja2, or are real ones with characters changed. A case holds when
  - rendering gives what transformers' own environment gives, or both fail, ours with one printable line;
  - a template made to run on or to grow without end is a line, in time;
  - the control tokens of a conversation are those of the same conversation without "<", for templates that
    only write and trim the texts;
  - a pair that is let through has the prompt's control tokens and one at its end.
"""

import json
import random
import re
import time
from pathlib import Path

import pytest

from cfgsafe import tokenizer as tokenizer_file
from cfgsafe.errors import InputError
from cfgsafe.hub import BASE
from cfgsafe.rendering import Renderer, TemplateError
from cfgsafe.tokenizer import LLAMA31_TEMPLATE, Tokenizer

pytestmark = pytest.mark.slow
SECONDS = 1.0  # of a rendering
FILES = json.loads((Path(BASE) / "tokenizer.json").read_text())
SPECIAL = [token["content"] for token in FILES["added_tokens"]]

REAL = {
    "llama 3.1": LLAMA31_TEMPLATE,
    "llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant!') }}"
        "{% endif %}{% endfor %}"
    ),
    "joined": "{{ bos_token }}{%- for m in messages -%}{{ m.content }}{%- endfor -%}",
    "trimmed": "{{ bos_token }}{% for m in messages %}{{ m.content.strip() }}{% endfor %}_id|>",
    "removed": (
        "{{ bos_token }}{% for m in messages %}{{ m.content.replace('</s>', '') }}<|eot_id|>{% endfor %}"
    ),
    "reversed": "{{ bos_token }}{% for m in messages %}{{ m.content | reverse }}<|eot_id|>{% endfor %}",
    "parts": (
        "{{ bos_token }}{% for m in messages %}{{ m.content | selectattr('type', 'equalto', 'text') "
        "| map(attribute='text') | join }}<|eot_id|>{% endfor %}"
    ),
    "alternating": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}<|eot_id|>{% endfor %}"
    ),
}
VALUES = [
    "messages", "m", "m.content", "m.role",
    "messages[0]", "messages[-1].content", "bos_token", "eos_token",
    "'x'", "\"<|eot_id|>\"", "'{{'", "3", "-1",
    "1.5", "none", "true", "[1, 'a']", "{'k': 2}", "nothing",
    "nothing.more", "loop.index", "loop.last",
    "add_generation_prompt", "range(3)", "namespace(x=1)", "ns.x",
    "messages | length", "m.content[:3]", "m.content.split()",
    "m['content']", "m.nope", "self", "dict(a=1)",
    "tools", "''.join(['a'])", "'%s' % m",
    "m.content ~ 1", "m.content + 1", "'é\u2028😀'", "m.content.__class__",
]  # fmt: skip
FILTERS = [
    "trim", "upper", "lower", "length", "tojson",
    "tojson(indent=2)", "join(', ')", "first", "last", "list", "int",
    "string", "default('d')", "replace('a', 'b')",
    "map(attribute='content')", "selectattr('role')", "sort",
    "reverse", "title", "indent(3)", "truncate(5)", "wordcount",
    "batch(2)", "unique", "items", "escape", "safe",
    "groupby('role')", "sum", "abs", "round", "urlize",
    "striptags", "center(9)", "format(1)", "nope", "dictsort",
    "min", "max", "float", "pprint",
    "xmlattr", "wordwrap(4)", "filesizeformat", "slice(2)", "attr('content')",
]  # fmt: skip
TESTS = [
    "defined",
    "none",
    "string",
    "mapping",
    "iterable",
    "number",
    "odd",
    "equalto('x')",
    "in ['user']",
    "nope",
]
HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(70) }}",
    "{{ 'x' * 10**10 }}",
    "{{ 9**(9**9) }}",
    "{{ 10**10**6 }}",
    "{{ range(10**9) | list }}",
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
    "{{ n.x | tojson }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{{ 'x'.center(10**11) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ 'x' | indent(10**11) }}",
    "{{ lipsum(n=10**9) }}",
    "{{ [1] * 10**11 }}",
    "{{ messages | tojson(indent=10**11) }}",
    "{{ 'a b' | wordwrap(0) }}",
    "{{ ('a' * 99999) | urlize }}{{ ('<' * 99999) | striptags }}{{ ('a@' * 99999) | urlize }}",
    "{{ strftime_now('%Y' * 9999999) }}",
    "{{ (1).to_bytes(10**11, 'big') }}",
    "{{ ''.join(['x' * 99999] * 99999) }}",
    "{{ 'x'.replace('', 'y' * 99999) * 99999 }}",
    "{" * 99999,
    "{{ " + "-" * 9999 + "1 }}",
    "{{ " + "[" * 9999 + "]" * 9999 + " }}",
    "{% if 1 %}" * 999 + "{% endif %}" * 999,
    "{{ 1" + " + 1" * 9999 + " }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(messages) }}",
    "{% set x = messages.__init__.__globals__ %}{{ x }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
]
PIECES = [
    *SPECIAL, *(token[::-1] for token in SPECIAL), "<|eot", "_id|>", "<|", "|>", "<", ">",
    "|", "<|im_start|>", "eot_id", " ", "\n", "  a b  ", "Hello",
    "{{ x }}", "{% for %}", "{#", "\u2028", "\u200b",
    "\ue000", "\U000f0000", "é", "e\u0301", "日本", "😀👩‍👩‍👧",
    "\x00", "\x1b[2J", "\ufeff", "\t", "\r\n", "",
    "x" * 300, "[INST]", "</s>", "\u202e", "ﬁ", "'", '"', "\\",
]  # fmt: skip


def expression(rng: random.Random) -> str:
    text = rng.choice(VALUES)
    for _ in range(rng.randrange(3)):
        kind = rng.random()
        if kind < 0.6:
            text += f" | {rng.choice(FILTERS)}"
        elif kind < 0.75:
            operator = rng.choice(["+", "~", "==", "in", "and", "<", "%", "-", "//"])
            text = f"({text} {operator} {rng.choice(VALUES)})"
        elif kind < 0.85:
            text = f"({text} is {rng.choice(TESTS)})"
        else:
            text = f"({text} if {rng.choice(VALUES)} else {rng.choice(VALUES)})"
    return text


def fragment(rng: random.Random, depth: int = 0) -> str:
    inner = "".join(fragment(rng, depth + 1) for _ in range(rng.randrange(4 - depth))) if depth < 3 else "x"
    left, right = rng.choice(["{%", "{%-"]), rng.choice(["%}", "-%}"])
    kinds = [
        lambda: f"{{{{ {expression(rng)} }}}}",
        lambda: rng.choice(["text ", "\n", "  ", *SPECIAL, "{# note #}"]),
        lambda: f"{left} for m in messages {right}{inner}{{% endfor %}}",
        lambda: f"{left} if {expression(rng)} {right}{inner}{{% else %}}y{{% endif %}}",
        lambda: f"{left} set x = {expression(rng)} {right}{{{{ x }}}}",
        lambda: f"{{% set ns = namespace(x='s') %}}{inner}{{% set ns.x = {expression(rng)} %}}{{{{ ns.x }}}}",
        lambda: f"{{% macro f(m) %}}{inner}{{% endmacro %}}{{{{ f(messages[0]) }}}}",
        lambda: f"{{% generation %}}{inner}{{% endgeneration %}}",
        lambda: f"{{% filter {rng.choice(FILTERS)} %}}{inner}{{% endfilter %}}",
        lambda: rng.choice(["{% break %}", "{% continue %}", "{% raw %}{{ x }}{% endraw %}"]),
        lambda: "{{ raise_exception('no\n!') }}",
    ]
    return rng.choice(kinds)()


def changed(rng: random.Random, template: str) -> str:
    """A real template after some changes of characters."""
    for _ in range(rng.randrange(1, 5)):
        a = rng.randrange(len(template) + 1)
        b = min(len(template), a + rng.randrange(12))
        kind = rng.randrange(4)
        if kind == 0:
            template = template[:a] + template[b:]
        elif kind == 1:
            template = template[:b] + template[a:]
        elif kind == 2:
            template = (
                template[:a]
                + rng.choice(["{", "}", "%", "'", "|", "(", ".", " ", "-", "é", "0"])
                + template[b:]
            )
        else:
            template = template[:a] + fragment(rng) + template[a:]
    return template


def text_of(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(7)))


def conversation(rng: random.Random) -> list[dict[str, str]]:
    roles = ["system"] if rng.random() < 0.4 else []
    roles += ["user", "assistant"] * rng.randrange(4) + ["user"]
    if rng.random() < 0.2:
        roles = [rng.choice(["system", "user", "assistant"]) for _ in range(rng.randrange(1, 6))]
    return [{"role": role, "content": text_of(rng)} for role in roles]


def check_line(error: Exception) -> None:
    line = str(error)
    assert line.isprintable() and 0 < len(line) < 600, line


def without_addresses(text: str) -> str:
    return re.sub(r"<function \S+ at 0x[0-9a-f]+>|0x[0-9a-f]+", "AT", text)


def same(given: str, wanted: str) -> bool:
    """Whether two texts are equal but for addresses, which filters may have wrapped or sorted."""
    if without_addresses(given) == without_addresses(wanted):
        return True
    has_address = re.search(r"object|function|method", re.sub("[^a-z]", "", wanted.lower()))
    rest = [re.sub(r"[0-9a-f\s]", "", text.lower()) for text in (given, wanted)]
    return bool(has_address or "0x" in wanted or "x0" in wanted) and sorted(rest[0]) == sorted(rest[1])


@pytest.fixture
def renderer(monkeypatch):
    """Renders with a shorter time limit, also in tokenizers."""
    renderer = Renderer(SECONDS)
    monkeypatch.setattr(tokenizer_file, "RENDERER", renderer)
    return renderer


def test_fuzz_templates(cases, renderer):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import _compile_jinja_template

    counts = {"equal": 0, "both fail": 0}
    for rng in cases:
        template = changed(rng, rng.choice([*REAL.values()]))
        if rng.random() < 0.5:
            template = "".join(fragment(rng) for _ in range(rng.randrange(1, 5)))
        if "generation" in template and ("break" in template or "continue" in template):
            continue  # transformers makes a function of the block, which cannot leave the loop around it
        context = {"messages": conversation(rng), "tools": None, "documents": None, "bos_token": "<s>"}
        context |= {"eos_token": "</s>", "add_generation_prompt": rng.random() < 0.5}
        try:
            wanted = _compile_jinja_template(template).render(**context)
        except Exception as error:
            wanted, why = None, error
        started = time.monotonic()
        try:
            given = renderer.render(template, context)
        except TemplateError as error:
            assert wanted is None, (error, wanted)
            check_line(error)
        else:
            assert wanted is not None, (why, given)
            assert same(given, wanted)
        assert time.monotonic() - started < 30
        counts["both fail" if wanted is None else "equal"] += 1
    assert min(counts.values()) > 0 or sum(counts.values()) < 20
    print(counts)


def test_fuzz_hostile_templates(cases, renderer):
    for rng in cases:
        template = rng.choice(HOSTILE)
        if rng.random() < 0.3:
            template = changed(rng, template)
        if rng.random() < 0.5:
            template = fragment(rng) + template + fragment(rng)
        started = time.monotonic()
        try:
            text = renderer.render(template, {"messages": conversation(rng), "bos_token": "<s>"})
            assert len(text) <= 2**24
        except TemplateError as error:
            check_line(error)
        assert time.monotonic() - started < 30
        assert renderer.render("{{ x }}", {"x": "after"}) == "after"


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token for token in ids if token in set(tokenizer.special.values())]


def test_fuzz_conversations(cases, renderer):
    """Texts with pieces of control tokens under real templates, and pairs that go on from them."""
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    tokenizers = {}
    for name, template in REAL.items():
        tokenizers[name] = Tokenizer(FILES, names, template)
    for rng in cases:
        tokenizer = tokenizers[rng.choice([*REAL])]
        messages = conversation(rng)
        if rng.random() < 0.1:
            wrong = rng.choice([None, 3, "x", {}, {"role": "user"}, {"role": "tool", "content": "x"}])
            messages.insert(rng.randrange(len(messages) + 1), wrong)
        go_on = rng.random() < 0.5
        try:
            ids = tokenizer.encode_chat(messages, go_on=go_on)
        except InputError as error:
            check_line(error)
            continue
        neutral = [{**message, "content": message["content"].replace("<", "x")} for message in messages]
        wanted = tokenizer.encode_chat(neutral, go_on=go_on)
        assert controls(tokenizer, ids) == controls(tokenizer, wanted), messages
        try:
            prompt = tokenizer.render_chat(messages)
        except InputError as error:
            check_line(error)
            continue
        begun = tokenizer.encode_chat(messages)
        if prompt.startswith(names["bos_token"]):
            assert controls(tokenizer, tokenizer.encode_prompt(prompt)) == controls(tokenizer, begun)
        answer = text_of(rng) + rng.choice(["", tokenizer.end_of_turn])
        joined = controls(tokenizer, tokenizer.encode_prompt(prompt + answer))
        alone = controls(tokenizer, tokenizer.encode_prompt(prompt))
        end = [tokenizer.special[tokenizer.end_of_turn]] * answer.endswith(tokenizer.end_of_turn)
        fits = tokenizer.joined_control_token(prompt, answer) is None
        assert fits == (joined == alone + end), (prompt, answer)
