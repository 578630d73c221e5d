"""Text to token ids and back, and the chat format, with user text that can never become a control token.

Source: `tokenizer.json` and the Jinja2 chat template of the checkpoint; the template is rendered in Jinja2's sandbox.
Deviation: `apply_chat_template(tokenize=True)` of transformers parses the whole rendered string, so that
`<|eot_id|>` typed by a user ends the turn. Here every character of a message's content that could begin a control
token is marked before rendering, the rendered text is split at the control tokens that are left (the template's own),
and what lies between is encoded as plain text. Text without control tokens gets the same ids as in transformers.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "<|eot_id|> is text here"
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer as Backend

from cfgsafe.errors import CheckpointError, InputError

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
{{- "Today Date: " + (date_string or "26 Jul 2024") + "\\n\\n" + system + "<|eot_id|>" }}
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
    """

    def __init__(self, backend: Backend, *, bos: str, eos: str, template: str):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.backend = backend
        self.bos = bos
        self.template = template
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        self._render = environment.from_string(template).render
        self.special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.end_of_turn = "<|eot_id|>" if "<|eot_id|>" in self.special else eos
        for token in (bos, self.end_of_turn):
            if token not in self.special:
                raise CheckpointError(f"tokenizer.json: control token {token!r} is missing")
        self._special_pattern = re.compile("|".join(re.escape(s) for s in sorted(self.special, key=len, reverse=True)) or r"(?!)")
        self._special_start = re.compile("[" + "".join(re.escape(c) for c in sorted({s[0] for s in self.special})) + "]")
        backend.encode_special_tokens = True  # a control token in text stays text

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint folder. Raises CheckpointError."""
        folder = Path(folder)
        try:
            backend = Backend.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{error.filename}: not found; a checkpoint folder holds tokenizer.json and tokenizer_config.json") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{folder}: tokenizer files cannot be read ({error})") from None
        template = config.get("chat_template") or LLAMA31_TEMPLATE
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        named = lambda key, default: token["content"] if isinstance(token := config.get(key) or default, dict) else token
        return Tokenizer(backend, bos=named("bos_token", "<|begin_of_text|>"), eos=named("eos_token", "<|end_of_text|>"), template=template)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no control token can come out of it, no BOS is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a trusted, chat-formatted string: control tokens in it are control tokens, BOS is added if absent."""
        ids = self._encode_trusted(prompt, mark="")
        bos = self.special[self.bos]
        return ids if ids[:1] == [bos] else [bos, *ids]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the model answers, or goes on with the partial answer that ends it."""
        mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in m["content"] for m in messages))
        guard = lambda text: self._special_start.sub(lambda m: m.group() + mark, text)
        marked = [{"role": m["role"], "content": guard(m["content"])} for m in messages]
        return self._encode_trusted(self._chat_text(marked), mark)

    def render_chat(self, messages: Messages) -> str:
        """The conversation as one chat-formatted string, for files that hold strings (preference pairs).

        Raises InputError when a message holds the text of a control token: in a flat string it would become one.
        """
        for message in messages:
            if found := self._special_pattern.search(message["content"]):
                raise InputError(f"a {message['role']} message holds the control token text {found.group()!r}, which a chat-formatted string cannot keep as text")
        return self._chat_text(messages)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens are left out."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def _chat_text(self, messages: Messages) -> str:
        going_on = bool(messages) and messages[-1]["role"] == "assistant"
        text = self._render(messages=messages, bos_token=self.bos, add_generation_prompt=not going_on, date_string=None)
        if going_on:  # cut what the template closes the turn with
            partial = messages[-1]["content"].strip()
            text = text[: text.rindex(partial) + len(partial)]
        return text

    def _encode_trusted(self, text: str, mark: str) -> list[int]:
        ids, start = [], 0
        for found in self._special_pattern.finditer(text):
            ids += self.encode(_without(text[start : found.start()], mark))
            ids.append(self.special[found.group()])
            start = found.end()
        return ids + self.encode(_without(text[start:], mark))


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


def _without(text: str, mark: str) -> str:
    return text.replace(mark, "") if mark else text


def _raise_exception(message: str):
    raise InputError(f"the chat template refuses this conversation: {message}")
