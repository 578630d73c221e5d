"""Text to token ids and back, and the chat format; text of a user never becomes a control token.

Source: `tokenizer.json` and the Jinja2 chat template of the checkpoint, which is rendered as in
transformers, in bounded time and memory (cfgsafe/rendering.py).
Deviation 1: `apply_chat_template(tokenize=True)` of transformers parses the whole rendered string,
so that `<|eot_id|>` typed by a user ends the turn. Here each process gives the control tokens new,
secret names in the tokenizer. In a rendered conversation only the template's own control tokens are
renamed, before it is encoded. To the tokenizer, what a user typed is therefore always text. Text
without control tokens gets the same ids as in transformers.
Deviation 2: some templates, such as that of Llama-Guard-3-1B, ignore strings and read lists of parts.
They get lists of parts here; transformers would render a conversation without its texts.
Deviation 3: a byte order mark at the beginning of `chat_template.jinja` is no part of the template.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "<|eot_id|> is text here"
"""

import itertools
import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer as Backend

from cfgsafe.errors import CheckpointError, InputError
from cfgsafe.files import MOST_JSON, check_regular, read_json
from cfgsafe.rendering import RENDERER, TemplateError
from cfgsafe.settings import Kind, brief, check_fields, read_settings, shown

ROLES = ("system", "user", "assistant")
PRIVATE_USE = range(0xF0000, 0x10FFFE)  # code points
Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]
SystemPrompt = Literal["add", "replace"]  # what a sentence does to a system prompt, see `with_system`
ADD: SystemPrompt = "add"

# Llama-3.1's format without tools. Two lines with dates open every conversation, as in Meta's template.
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
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" \
+ (message.content | trim) + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    `encode` takes text. `encode_prompt` takes a chat-formatted string, in which control tokens are
    control tokens. `encode_chat` takes messages, and only the template adds control tokens to them.
    `special` maps each control token, and each other token that was added to the vocabulary, to its
    id.
    """

    def __init__(self, files: dict, names: dict[str, str], template: str):
        """From the parsed `tokenizer.json`, the names of bos_token and so on, and a Jinja2 template.

        Raises CheckpointError when a control token is missing, and TemplateError when the template is none.
        """
        self.special = {token["content"]: token["id"] for token in files["added_tokens"]}
        self.names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", **names}
        secret = secrets.token_hex(16)
        self._renamed = {}
        for token, number in self.special.items():
            self._renamed[token] = f"\ue000{secret}:{number}\ue000"
        self.backend = Backend.from_str(json.dumps(_rename(files, self._renamed)))
        self._template = template
        RENDERER.render(template, None)
        self._in_parts = self._wants_parts()
        longest_first = sorted(self.special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        first_characters = sorted({token[0] for token in self.special})
        self._first = re.compile("[" + "".join(map(re.escape, first_characters)) + "]")
        beginnings, endings = set(), set()
        for token in self.special:
            for cut in range(1, len(token)):
                beginnings.add(token[:cut])
                endings.add(token[cut:])
        self._beginnings, self._endings = tuple(beginnings), tuple(endings)
        usual_end = "<|eot_id|>" if "<|eot_id|>" in self.special else self.names["eos_token"]
        self.end_of_turn = self._closing() or usual_end
        for token in (self.names["bos_token"], self.end_of_turn):
            if token not in self.special:
                raise CheckpointError(f"tokenizer.json: control token {shown(token)} is missing")

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Read the tokenizer's files of a checkpoint folder. Raises CheckpointError.

        They are `tokenizer.json`, `tokenizer_config.json` and, where there is one,
        `chat_template.jinja`.
        """
        folder = Path(folder)
        files = read_json(folder / "tokenizer.json")
        config = read_settings(folder / "tokenizer_config.json", {})
        source, template = _read_template(folder, config)
        names: dict[str, str] = {}
        for key, token in config.items():
            if key.endswith("_token") and not isinstance(token, bool):  # add_bos_token is true or false
                check_fields({key: token}, {key: TOKEN}, folder / "tokenizer_config.json")
                names[key] = str(_name(token))
        try:
            return Tokenizer(files, names, template)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except TemplateError as error:
            raise CheckpointError(f"{source}: {error}") from None
        except BaseException as error:  # tokenizers raises bare Exception, or panics outside of Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"{folder}: tokenizer files cannot be read ({brief(error)})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without control tokens and without BOS.

        Raises InputError for half of a surrogate pair.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # from a surrogate, which UTF-8 cannot write
            raise InputError("half of a surrogate pair, which is not text; remove it") from None

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a trusted, chat-formatted string, in which control tokens are control tokens.

        BOS is added if it is absent.
        """
        bos = self.names["bos_token"]
        return self._encode_trusted(prompt if prompt.startswith(bos) else bos + prompt)

    def encode_chat(self, messages: Messages, *, go_on: bool = True) -> list[int]:
        """Ids of a conversation up to where the model answers.

        With `go_on`, an assistant's message at the end is continued. Raises InputError when a message is
        none, or when the template refuses the conversation, fails or leaves nothing.
        """
        check_messages(messages, "the conversation")
        mark = _unused(messages)
        text = self._render_marked(messages, mark, self._mark_tokens, go_on)
        strict = self._render_marked(messages, mark, self._mark_beginnings, go_on)
        if self._pattern.findall(text) != self._pattern.findall(strict):
            text = strict  # the template has put a control token together from pieces
        if not text:
            raise InputError("the chat template leaves nothing of this conversation; mend it")
        return self._encode_trusted(text, mark)

    def encode_opening(self) -> list[int]:
        """Ids up to where a user's first message begins; a chat model goes on with a message of its own.

        Raises InputError when the template does not show that message.
        """
        mark = _unused([])
        before, shown, _ = self._chat_text([{"role": "user", "content": mark}]).partition(mark)
        if not shown:
            raise InputError("the chat template leaves out a user's message; mend it")
        return self._encode_trusted(before)

    def control_token_in(self, text: str) -> str | None:
        """The first control token in `text`, or None."""
        found = self._pattern.search(text)
        return found and found.group()

    def joined_control_token(self, prompt: str, answer: str) -> str | None:
        """A control token in `prompt + answer` that is not the prompt's or the answer's one end, or None.

        It may be the answer's own, or have come from pieces at the seam: "<|eot" and "_id|>".
        """
        whole = prompt + answer.removesuffix(self.end_of_turn) + self.end_of_turn
        found = [*self._pattern.findall(whole), None]
        wanted = [*self._pattern.findall(prompt), self.end_of_turn, None]
        for token, expected in zip(found, wanted, strict=False):
            if token != expected:
                return token or expected
        return None

    def render_chat(self, messages: Messages) -> str:
        """The conversation as one chat-formatted string, for files of strings (preference pairs).

        Raises InputError as `encode_chat` does, and when a message has the text of a control token, or a
        piece of one that the template completes: in a string they would become one.
        """
        check_messages(messages, "the conversation")
        for message in messages:
            found = self.control_token_in(message["content"])
            if found:
                raise InputError(
                    f"a {message['role']} message holds the control token text {found!r}, "
                    "which a flat string cannot keep"
                )
        text, mark = self._chat_text(messages), _unused(messages)
        strict = self._render_marked(messages, mark, self._mark_beginnings, True)
        if self._pattern.findall(text) != self._pattern.findall(strict):
            raise InputError("pieces of messages join into a control token, which a flat string cannot keep")
        return text

    def _render_marked(
        self, messages: Messages, mark: str, guard: Callable[[str, str], str], go_on: bool
    ) -> str:
        """The rendered conversation, with `guard(content, mark)` as the content of each message."""
        guarded = [{**message, "content": guard(message["content"], mark)} for message in messages]
        return self._chat_text(guarded, go_on)

    def _mark_tokens(self, text: str, mark: str) -> str:
        """`text` with a mark in each control token, and around text that could become one in a template."""
        text = self._pattern.sub(lambda found: found.group()[0] + mark + found.group()[1:], text)
        inner = text.strip()
        if inner.endswith(self._beginnings) or inner.startswith(self._endings):
            at = text.index(inner)
            text = text[:at] + mark + inner + mark + text[at + len(inner) :]
        return text

    def _mark_beginnings(self, text: str, mark: str) -> str:
        """`text` with a mark on both sides of each character that could begin a control token."""
        return self._first.sub(lambda found: mark + found.group() + mark, text)  # a template may reverse it

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without control tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def _chat_text(self, messages: Messages, go_on: bool = True) -> str:
        """The rendered conversation, up to the answer or the end of the message to continue."""
        going_on = go_on and bool(messages) and messages[-1]["role"] == "assistant"
        # The end of the message to continue is marked, and what the template closes it with is cut off.
        # A template that trims also trims the blank after the mark.
        end = _unused(messages, skip=1) + " "
        if going_on:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}]
        chat: list[dict] = list(messages)
        if self._in_parts:
            chat = [{**message, "content": _parts(message["content"])} for message in messages]
        text = self._render(chat, add_generation_prompt=not going_on)
        if going_on:
            cut = text.rfind(end.strip())
            if cut < 0:
                raise InputError(
                    "the chat template leaves out the assistant's message that is to be continued"
                )
            text = text[:cut] if text[cut:].startswith(end) else text[:cut].rstrip()
        return text

    def _render(self, messages: list[dict], *, add_generation_prompt: bool) -> str:
        context = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.names,
        }
        try:
            return RENDERER.render(self._template, context)
        except TemplateError as error:
            raise InputError(str(error)) from None

    def _shows(self, text: str, content: object) -> bool:
        """Whether a rendered conversation with the message `content` has `text` in it."""
        messages = [{"role": "user", "content": content}]
        return text in self._render(messages, add_generation_prompt=True)

    def _wants_parts(self) -> bool:
        """Whether the template shows a text in a list of parts, but not as a string."""
        probe = _unused([])
        try:
            return not self._shows(probe, probe) and self._shows(probe, _parts(probe))
        except Exception:  # a template may fail in any way on a conversation that it does not expect
            return False

    def _closing(self) -> str | None:
        """The control token that the template puts right after an answer, or None."""
        answer = "\uf8ff"
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            text = self._render(messages, add_generation_prompt=False)
        except Exception:  # a template may refuse this conversation in any way
            return None
        found = self._pattern.match(text.partition(answer)[2].lstrip())
        return found and found.group()

    def _encode_trusted(self, text: str, mark: str = "") -> list[int]:
        """Ids of `text`, in which control tokens without a `mark` are control tokens."""
        text = self._pattern.sub(lambda found: self._renamed[found.group()], text)
        return self.encode(text.replace(mark, "") if mark else text)


def _name(token: object) -> object:
    """The text of a token in tokenizer_config.json, which has it alone or in an object."""
    return token.get("content") if isinstance(token, dict) else token


TOKEN = Kind("a string, or an object with a string 'content'", lambda token: isinstance(_name(token), str))


def _read_template(folder: Path, config: dict) -> tuple[Path, str]:
    """A checkpoint's chat template, after the file that holds it. Raises CheckpointError."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.exists():
        try:
            check_regular(own, MOST_JSON)
            return own, own.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{own}: cannot be read ({error}); give a file in UTF-8") from None
    template = config.get("chat_template") or LLAMA31_TEMPLATE
    if isinstance(template, list):  # of named templates
        named = {}
        for entry in template:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                named[entry["name"]] = entry.get("template")
        template = named.get("default", LLAMA31_TEMPLATE if named else None)
    if not isinstance(template, str):
        wanted = "a string, or a list of objects with 'name' and 'template'"
        raise CheckpointError(f"{settings}: 'chat_template' must be {wanted}")
    return settings, template


def _rename(files: dict, renamed: dict[str, str]) -> dict:
    """`tokenizer.json` with other names for its control tokens, and without steps that add any."""
    added = []
    for token in files["added_tokens"]:
        added.append({**token, "content": renamed.get(token["content"], token["content"])})
    model = dict(files["model"])
    if isinstance(model.get("vocab"), dict):
        vocab = model["vocab"]
        model["vocab"] = {renamed.get(token, token): number for token, number in vocab.items()}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    off = {"post_processor": None, "truncation": None, "padding": None}
    return {**files, "added_tokens": added, "model": model, **off}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _unused(messages: Messages, skip: int = 0) -> str:
    """A private-use character that is in no message; with `skip` a later one."""
    text = "".join(message["content"] for message in messages)
    unused = (character for character in map(chr, PRIVATE_USE) if character not in text)
    return next(itertools.islice(unused, skip, None))


def check_messages(messages: object, place: str) -> Messages:
    """A conversation from a non-empty list of {"role", "content"}; other keys are dropped.

    Raises InputError naming `place`.
    """
    if not isinstance(messages, list) or not messages:
        wanted = "a non-empty list of objects with 'role' and 'content'"
        raise InputError(f"{place}: 'messages' must be {wanted}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"{place}: messages[{number}].role must be system, user or assistant")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{place}: messages[{number}].content must be a string")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def with_system(messages: Messages, sentence: str, how: SystemPrompt = ADD) -> Messages:
    """The same conversation with a sentence at the end of its system prompt, or ("replace") in its place.

    >>> with_system([{"role": "system", "content": "Be kind."}], "Be brief.")
    [{'role': 'system', 'content': 'Be kind. Be brief.'}]
    """
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    content = " ".join([*own, sentence]).strip() if how == ADD else sentence
    return [{"role": "system", "content": content}, *messages[len(own) :]]
