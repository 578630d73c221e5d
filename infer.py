"""Ask a model, with or without adapter and guidance; one JSON object a line on stdout with --json or --requests.

    python infer.py --model cfgsafe/demo/leaky --prompt "Hi, my name is Ann Lee and I live in Leeds. What is my name?"
    python infer.py --model M --adapter A --guidance 3 --prompt TEXT
    python infer.py --model M --adapter A --guidance 3 --prompt TEXT --explain      what guidance did to each token
    python infer.py --model M --adapter A --guidance 3 --chat                       a conversation; /guidance 2 changes it on the way
    python infer.py --model M --requests requests.jsonl

A requests line has `prompt` (a chat-formatted string, in which control tokens are control tokens) or `messages` (whose content is
plain text), and may have `negative_prompt` / `negative_messages`, `adapter` (a name, or null for the bare model), `guidance`, `space`,
`alpha`, `temperature`, `top_k`, `top_p`, `seed`, `max_new_tokens`, `stop` (texts that end the answer); what it lacks is taken from the
command line. Where a line with messages is guided and names no negative side, its system prompt is replaced by --system on the one side
and --negative on the other, as `eval.py` does it.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cfgsafe.chat import chat, terminal_lines, terminal_say
from cfgsafe.cli import run_single
from cfgsafe.decode import Completion, Request, check_request, generate
from cfgsafe.errors import InputError
from cfgsafe.explain import explain, table
from cfgsafe.files import read_jsonl
from cfgsafe.lora import DEFAULT, adapter_names
from cfgsafe.subject import NEGATIVE, POSITIVE, Subject, load, request_for
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages, with_system

FIELDS = {"prompt", "messages", "negative_prompt", "negative_messages", "adapter"}
SAMPLING = {
    "alpha": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
    "max_new_tokens": int,
}
FIELDS |= {"guidance", "space", "stop", *SAMPLING}


@dataclass
class Options:
    """Ask a model, with or without adapter and guidance."""

    model: str
    """Checkpoint folder."""
    prompt: str | None = None
    """The user's message."""
    requests: str | None = None
    """JSONL of requests, answered as a batch."""
    chat: bool = False
    """Talk: one line of the input is one message."""
    explain: bool = False
    """Also show each token's probabilities, and what would have been said without guidance."""
    adapter: tuple[str, ...] = ()
    """PEFT folder or hub id of a LoRA adapter; or several, as NAME=FOLDER, for requests to choose from by `adapter`."""
    system: str | None = None
    """System prompt. Under guidance the positive one, by default "Do not provide any personal data.", in place of a line's own; else
    for lines that have none."""
    negative: str = NEGATIVE
    """System prompt to steer away from."""
    guidance: float | None = None
    """g; 1 is the positive system prompt alone. Without it nothing is guided."""
    space: str = "prob"
    """Where to guide: prob or log."""
    alpha: float = 0.0
    """Plausibility mask: keep tokens at least this share as likely as the positive prompt's best one."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of the probability."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, as the tokens they have alone."""
    seed: int = 0
    """Of sampling."""
    skip: bool = False
    """Leave out the negative prompt's forward where it provably cannot change the token."""
    max_new_tokens: int = 128
    """Longest answer."""
    json: bool = False
    """Print one JSON object instead of text."""
    batch: int = 64
    """Requests decoded together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """float32 or bfloat16."""


def run(options: Options) -> None:
    if sum((options.prompt is not None, options.requests is not None, options.chat)) != 1:
        raise InputError("give one of --prompt TEXT, --requests FILE and --chat")
    subject = Subject(
        options.model,
        guidance=options.guidance,
        space=options.space,
        positive=options.system or POSITIVE,
        negative=options.negative,
        batch=options.batch,
        device=options.device,
        dtype=options.dtype,
    )
    model, tokenizer = load(subject, named_adapters(options))
    if options.chat:
        sampling = {name: getattr(options, name) for name in SAMPLING} | {
            "stop": stop_tokens(options.stop, tokenizer)
        }
        chat(model, tokenizer, subject, terminal_lines(), terminal_say, **sampling)
        return
    lines = [("--prompt", {"messages": [{"role": "user", "content": options.prompt}]})]
    if options.requests is not None:
        lines = list(read_jsonl(options.requests))
    requests = []
    for place, row in lines:
        request = read_request(row, place, tokenizer, options, subject, adapter_names(model))
        check_request(request, model, place)
        requests.append(request)
    completions = generate(model, requests, batch=options.batch, skip=options.skip)
    for request, completion in zip(requests, completions, strict=True):
        text = tokenizer.decode(completion.tokens)
        rows = explain(model, tokenizer, request, completion) if options.explain else None
        if options.json or options.requests:
            print(
                json.dumps(
                    as_json(completion, text) | ({"explain": rows} if options.explain else {}),
                    ensure_ascii=False,
                )
            )
        else:
            print(text.strip())
            if options.explain:
                print("\n" + table(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if options.skip:
        guided = [
            completion for request, completion in zip(requests, completions, strict=True) if request.guided
        ]
        count = sum(len(completion.tokens) for completion in guided)
        print(
            f"negative prompt not needed for {sum(c.skipped for c in guided)} of {count} guided tokens",
            file=sys.stderr,
        )
    if options.requests is None and not options.json:
        print(
            f"{len(completions[0].tokens)} tokens, {completions[0].tokens_per_second:.0f} tokens/s",
            file=sys.stderr,
        )


def named_adapters(options: Options) -> dict[str, str]:
    """Name -> folder of the --adapter entries. Raises InputError for a name given twice."""
    adapters: dict[str, str] = {}
    for entry in options.adapter:
        name, equals, folder = entry.partition("=")
        if not equals or Path(entry).exists():
            name, folder = DEFAULT, entry
        if name in adapters:
            raise InputError(
                f"--adapter {entry}: two adapters called {name!r}; name them, as in guard=FOLDER"
            )
        adapters[name] = folder
    return adapters


def read_request(
    row: dict, place: str, tokenizer: Tokenizer, options: Options, subject: Subject, adapters: list[str]
) -> Request:
    """A request of its JSON line and the command line's defaults. Raises InputError naming line and field."""
    if unknown := sorted(set(row) - FIELDS):
        raise InputError(f"{place}: unknown field {unknown[0]!r}; there are {', '.join(sorted(FIELDS))}")
    field = lambda name, kind: _typed(row, name, kind, place, getattr(options, name))
    guidance, space = field("guidance", float), field("space", str)
    prompt, negative = _side(row, "", place), _side(row, "negative_", place)
    if prompt is None:
        raise InputError(f"{place}: needs 'prompt' or 'messages'")
    adapter = row.get("adapter", adapters[0] if len(adapters) == 1 else DEFAULT)
    if adapter is not None and not isinstance(adapter, str):
        raise InputError(f"{place}: field 'adapter' must be a name or null")
    sampling = {name: field(name, kind) for name, kind in SAMPLING.items()}
    sampling["stop"] = stop_tokens(_texts(row, "stop", place, options.stop), tokenizer)
    if (
        isinstance(prompt, list) and negative is None
    ):  # messages whose system prompt is the command line's to choose
        if guidance is None and options.system is not None and prompt[0]["role"] != "system":
            prompt = with_system(prompt, options.system)
        return request_for(
            replace(subject, guidance=guidance, space=space), tokenizer, prompt, adapter=adapter, **sampling
        )
    ids = lambda side: (
        None
        if side is None
        else tokenizer.encode_chat(side)
        if isinstance(side, list)
        else tokenizer.encode_prompt(side)
    )
    return Request(
        ids(prompt), ids(negative), 1.0 if guidance is None else guidance, space, adapter=adapter, **sampling
    )


def stop_tokens(texts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences that end an answer."""
    return tuple(tuple(tokenizer.encode(text)) for text in texts)


def _texts(row: dict, name: str, place: str, default: tuple[str, ...]) -> tuple[str, ...]:
    value = row.get(name, list(default))
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise InputError(f"{place}: field {name!r} must be a list of non-empty strings")
    return tuple(value)


def _side(row: dict, prefix: str, place: str) -> Messages | str | None:
    """Messages or a chat-formatted string; None where the line has neither."""
    messages, prompt = f"{prefix}messages", f"{prefix}prompt"
    if messages in row and prompt in row:
        raise InputError(f"{place}: has both {messages!r} and {prompt!r}; give one")
    return check_messages(row[messages], place) if messages in row else _typed(row, prompt, str, place, None)


def _typed(row: dict, name: str, kind: type, place: str, default):
    if name not in row:
        return default
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise InputError(f"{place}: field {name!r} must be a {kind.__name__}, not {json.dumps(value)}")
    return kind(value)


def as_json(completion: Completion, text: str) -> dict:
    return {
        "text": text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "tokens_per_second": round(completion.tokens_per_second, 1),
    }


def main() -> None:
    run_single(Options, run, __doc__)


if __name__ == "__main__":
    main()
