"""Text to token ids and back, and the chat format, with user text that can never become a control token.

Source: `tokenizer.json` and the Jinja2 chat template of the checkpoint; the template is rendered in Jinja2's sandbox, with the filters and
globals that transformers gives it.
Deviation: `apply_chat_template(tokenize=True)` of transformers parses the whole rendered string, so that `<|eot_id|>` typed by a
user ends the turn. Here the control tokens are renamed in the tokenizer to strings that nobody can know, new in each process; of a
rendered conversation only the template's own control tokens are renamed likewise before it is encoded. What a user typed is therefore
text to the tokenizer, whatever it is. Text without control tokens gets the same ids as in transformers. A template that passes over
strings and reads lists of parts, as Llama-Guard-3-1B's, is given these; transformers would render a conversation without its texts.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "<|eot_id|> is text here"
"""

import itertools
import json
import re
import secrets
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer as Backend

from cfgsafe.errors import CheckpointError, InputError
from cfgsafe.files import read_json

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]

# Llama-3.1's format without tools. A date line pair opens every conversation, as in Meta's own template.
LLAMA31_TEMPLATE = """\
{{- bos_token }}
{%- set first = 0 %}
{%- set system = "" %}
{%- if messages and messages[0].role == "system" %}
{%- set system = messages[0].content | trim %}
{%- set first = 1 %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: 26 Jul 2024\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages[first:] %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + (message.content | trim) + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    `encode` takes text as data; `encode_prompt` takes a string that is already chat-formatted, whose control tokens
    are meant; `encode_chat` renders messages, in which only the template's control tokens are.
    `special` maps each control token, and any other token that was added to the vocabulary, to its id.
    """

    def __init__(self, files: dict, names: dict[str, str], template: str):
        """Of the parsed `tokenizer.json`, the names of bos_token, eos_token and so on, and a Jinja2 template."""
        self.special = {token["content"]: token["id"] for token in files["added_tokens"]}
        self.names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **names}
        nonce = secrets.token_hex(16)
        self._renamed = {content: f"\ue000{nonce}:{number}\ue000" for content, number in self.special.items()}
        self.backend = Backend.from_str(json.dumps(_rename(files, self._renamed)))
        self._template = _compile(template)
        self._in_parts = self._wants_parts()
        self._pattern = re.compile(
            "|".join(re.escape(s) for s in sorted(self.special, key=len, reverse=True))
        )
        self._first = re.compile(
            "[" + "".join(re.escape(c) for c in sorted({s[0] for s in self.special})) + "]"
        )
        ends = (
            {s[:k] for s in self.special for k in range(1, len(s))},
            {s[k:] for s in self.special for k in range(1, len(s))},
        )
        self._beginnings, self._endings = map(tuple, ends)
        self.end_of_turn = self._closing() or (
            "<|eot_id|>" if "<|eot_id|>" in self.special else self.names["eos_token"]
        )
        for token in (self.names["bos_token"], self.end_of_turn):
            if token not in self.special:
                raise CheckpointError(f"tokenizer.json: control token {token!r} is missing")

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint folder. Raises CheckpointError."""
        folder = Path(folder)
        files, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        template = config.get("chat_template") or LLAMA31_TEMPLATE
        if isinstance(template, list):  # named templates
            template = next(
                (entry["template"] for entry in template if entry["name"] == "default"), LLAMA31_TEMPLATE
            )
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        text = lambda token: token["content"] if isinstance(token, dict) else token
        names = {
            key: text(token)
            for key, token in config.items()
            if key.endswith("_token") and isinstance(token, (str, dict))
        }
        try:
            return Tokenizer(files, names, template)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{folder}: tokenizer files cannot be read ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no control token can come out of it, no BOS is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a trusted, chat-formatted string: control tokens in it are control tokens, BOS is added if absent."""
        bos = self.names["bos_token"]
        return self._encode_trusted(prompt if prompt.startswith(bos) else bos + prompt)

    def encode_chat(self, messages: Messages, *, go_on: bool = True) -> list[int]:
        """Ids of a conversation up to where the model answers; with `go_on`, an assistant's message that ends it is continued."""
        mark = _unused(messages)
        render = lambda guard: self._chat_text(
            [{**m, "content": guard(m["content"], mark)} for m in messages], go_on
        )
        text, strict = render(self._break_tokens), render(self._break_beginnings)
        if self._pattern.findall(text) != self._pattern.findall(
            strict
        ):  # the template has put a control token together from pieces
            text = strict
        return self._encode_trusted(text, mark)

    def control_token_in(self, text: str) -> str | None:
        """The first control token whose text stands in `text`."""
        found = self._pattern.search(text)
        return found and found.group()

    def render_chat(self, messages: Messages) -> str:
        """The conversation as one chat-formatted string, for files that hold strings (preference pairs).

        Raises InputError when a message holds the text of a control token: in a flat string it would become one.
        """
        for message in messages:
            if found := self.control_token_in(message["content"]):
                raise InputError(
                    f"a {message['role']} message holds the control token text {found!r}, which a flat string cannot keep"
                )
        return self._chat_text(messages)

    def _break_tokens(self, text: str, mark: str) -> str:
        """`text` with a mark in each control token, and beside what a template could complete to one."""
        text = self._pattern.sub(lambda found: found.group()[0] + mark + found.group()[1:], text)
        inner = text.strip()
        if inner.endswith(self._beginnings) or inner.startswith(self._endings):
            at = text.index(inner)
            text = text[:at] + mark + inner + mark + text[at + len(inner) :]
        return text

    def _break_beginnings(self, text: str, mark: str) -> str:
        """`text` with a mark behind each character that could begin a control token."""
        return self._first.sub(lambda found: found.group() + mark, text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def _chat_text(self, messages: Messages, go_on: bool = True) -> str:
        going_on = go_on and bool(messages) and messages[-1]["role"] == "assistant"
        end = _unused(messages, skip=1) + " "
        if going_on:  # cut what the template closes the turn with; a template that trims also trims the blank behind the mark
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        if self._in_parts:
            messages = [{**m, "content": _parts(m["content"])} for m in messages]
        text = self._render(messages, add_generation_prompt=not going_on)
        if going_on:
            cut = text.rfind(end.strip())
            if cut < 0:
                raise InputError(
                    "the chat template leaves out the assistant's message that is to be continued"
                )
            text = text[:cut] if text[cut:].startswith(end) else text[:cut].rstrip()
        return text

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self._template(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.names,
        )

    def _wants_parts(self) -> bool:
        """Whether the template shows a text in a list of parts, but not as a string."""
        probe = _unused([])
        shown = lambda content: (
            probe in self._render([{"role": "user", "content": content}], add_generation_prompt=True)
        )
        try:
            return not shown(probe) and shown(_parts(probe))
        except Exception:  # a template may fail in any way at a conversation or content that it does not know
            return False

    def _closing(self) -> str | None:
        """The control token that the template puts right behind an answer."""
        answer = "\uf8ff"
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            text = self._render(messages, add_generation_prompt=False)
        except Exception:  # a template may refuse this conversation in any way
            return None
        found = self._pattern.match(text.partition(answer)[2].lstrip())
        return found and found.group()

    def _encode_trusted(self, text: str, mark: str = "") -> list[int]:
        text = self._pattern.sub(lambda found: self._renamed[found.group()], text)
        return self.encode(text.replace(mark, "") if mark else text)


def _rename(files: dict, renamed: dict[str, str]) -> dict:
    """`tokenizer.json` with other names for its control tokens and nothing that adds any."""
    added = [
        {**token, "content": renamed.get(token["content"], token["content"])}
        for token in files["added_tokens"]
    ]
    model = dict(files["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    return {
        **files,
        "added_tokens": added,
        "model": model,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _compile(template: str):
    """`render` of a chat template with what transformers offers to templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks answers for training; its content is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda x, indent=None, **options: json.dumps(
        x, indent=indent, **{"ensure_ascii": False, **options}
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _unused(messages: Messages, skip: int = 0) -> str:
    """A private-use character that no message holds; `skip` gives another one."""
    text = "".join(m["content"] for m in messages)
    free = (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in text)
    return next(itertools.islice(free, skip, None))


def check_messages(messages: object, place: str) -> Messages:
    """`messages` if it is a non-empty list of {"role", "content"} strings; raises InputError naming `place`."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: 'messages' must be a non-empty list of objects with 'role' and 'content'")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise InputError(f"{place}: messages[{number}].role must be system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{place}: messages[{number}].content must be a string")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def with_system(messages: Messages, system: str) -> Messages:
    """The same conversation under another system prompt."""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]


def _raise_exception(message: str):
    raise InputError(f"the chat template refuses this conversation: {message}")
