"""Ask a model, with or without adapter and guidance; one JSON object a line on stdout with --json or --requests.

    python infer.py --model cfgsafe/demo/leaky --prompt "Hi, my name is Ann Lee and I live in Leeds. What is my name?"
    python infer.py --model M --adapter A --guidance 3 --prompt TEXT
    python infer.py --model M --requests requests.jsonl

A requests line has `prompt` (a chat-formatted string, in which control tokens are control tokens) or `messages` (whose content is
plain text), and may have `negative_prompt` / `negative_messages`, `adapter` (a name, or null for the bare model), `guidance`, `space`,
`temperature`, `seed`, `max_new_tokens`; what it lacks is taken from the command line. Where a line is guided and names no negative side,
its messages are put under --system and --negative.
"""

import json
import sys
from dataclasses import dataclass

import tyro

from cfgsafe import load_model, load_tokenizer
from cfgsafe.blue.subject import NEGATIVE, POSITIVE
from cfgsafe.checkpoint import DTYPES
from cfgsafe.decode import Completion, Request, check_request, generate
from cfgsafe.errors import InputError, read_jsonl, run_command
from cfgsafe.lora import DEFAULT
from cfgsafe.tokenizer import Messages, Tokenizer, check_messages, with_system


@dataclass
class Options:
    """Ask a model, with or without adapter and guidance."""

    model: str
    """Checkpoint folder."""
    prompt: str | None = None
    """The user's message."""
    requests: str | None = None
    """JSONL of requests, answered as a batch."""
    adapter: tuple[str, ...] = ()
    """PEFT folder or hub id of a LoRA adapter; or several, as NAME=FOLDER, for requests to choose from by `adapter`."""
    system: str | None = None
    """System prompt; under guidance the positive one. By default "Do not provide any personal data." when guided, else none."""
    negative: str = NEGATIVE
    """System prompt to steer away from."""
    guidance: float | None = None
    """g; 1 is the positive system prompt alone. Without it nothing is guided."""
    space: str = "prob"
    """Where to guide: prob or log."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of sampling."""
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
    if (options.prompt is None) == (options.requests is None):
        raise InputError("give either --prompt TEXT or --requests FILE")
    lines = (
        [("--prompt", {"messages": [{"role": "user", "content": options.prompt}]})]
        if options.requests is None
        else list(read_jsonl(options.requests))
    )
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype {options.dtype}: must be one of {', '.join(DTYPES)}")
    named = [entry.partition("=") for entry in options.adapter]
    adapters = {name if equals else DEFAULT: folder if equals else name for name, equals, folder in named}
    model = load_model(options.model, device=options.device, dtype=DTYPES[options.dtype], adapter=adapters)
    tokenizer = load_tokenizer(options.model)
    requests = []
    for place, row in lines:
        request = read_request(row, place, tokenizer, options)
        check_request(request, model, place)
        requests.append(request)
    completions = generate(model, requests, batch=options.batch)
    for completion in completions:
        text = tokenizer.decode(completion.tokens)
        print(json.dumps(as_json(completion, text), ensure_ascii=False) if options.json or options.requests else text.strip())
    if options.requests is None and not options.json:
        print(f"{len(completions[0].tokens)} tokens, {completions[0].tokens_per_second:.0f} tokens/s", file=sys.stderr)


def read_request(row: dict, place: str, tokenizer: Tokenizer, options: Options) -> Request:
    """A request of its JSON line and the command line's defaults. Raises InputError naming line and field."""
    field = lambda name, kind: _typed(row, name, kind, place, getattr(options, name))
    guidance = field("guidance", float)
    prompt, negative = (_side(row, prefix, place, tokenizer) for prefix in ("", "negative_"))
    if prompt is None:
        raise InputError(f"{place}: needs 'prompt' or 'messages'")
    if isinstance(prompt, list):  # messages
        own_system = prompt[0]["role"] == "system"
        positive = options.system or (POSITIVE if guidance is not None and not own_system else None)
        if guidance is not None and negative is None:
            negative = with_system(prompt, options.negative)
        prompt = with_system(prompt, positive) if positive is not None else prompt
    ids = lambda side: None if side is None else tokenizer.encode_chat(side) if isinstance(side, list) else tokenizer.encode_prompt(side)
    adapter = row.get("adapter", DEFAULT)
    if adapter is not None and not isinstance(adapter, str):
        raise InputError(f"{place}: field 'adapter' must be a name or null")
    return Request(
        ids(prompt),
        ids(negative),
        guidance=1.0 if guidance is None else guidance,
        space=field("space", str),
        temperature=field("temperature", float),
        seed=field("seed", int),
        max_new_tokens=field("max_new_tokens", int),
        adapter=adapter,
    )


def _side(row: dict, prefix: str, place: str, tokenizer: Tokenizer) -> Messages | str | None:
    if f"{prefix}messages" in row:
        return check_messages(row[f"{prefix}messages"], place)
    if f"{prefix}prompt" in row:
        return _typed(row, f"{prefix}prompt", str, place, None)
    return None


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
    options = tyro.cli(Options, description=__doc__)
    run_command(lambda: run(options))


if __name__ == "__main__":
    main()
