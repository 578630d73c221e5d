"""Ask a model, with or without adapter and guidance.

    python infer.py --model cfgsafe/demo/leaky --prompt "I am Ann Lee from Leeds. Who am I?"
    python infer.py --model M --adapter A --guidance 3 --prompt TEXT
    python infer.py --model M --adapter A --guidance 3 --prompt TEXT --explain
    python infer.py --model M --adapter A --guidance 3 --chat
    python infer.py --model M --requests requests.jsonl

--explain shows what guidance did to each token. During a --chat, the line /guidance 2 changes the
guidance. With --json or --requests, each answer is one JSON object on one line of stdout.
An answer that fails gets a line on stderr, its reason in the object's `failure`, and exit code 2 at the end.
`cfgsafe/request_lines.py` says what a line of requests may hold; what it leaves out is taken from
the command line. --system is your own system prompt, for --prompt, --chat and lines that have none.
Guidance adds one sentence to it on each side, --positive and --negative, as in `eval.py`; a line that
names its own negative side is taken as it is.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cfgsafe import products
from cfgsafe.chat import chat, terminal_lines, terminal_say
from cfgsafe.cli import run_single
from cfgsafe.decode import BATCH, Completion, generate
from cfgsafe.errors import InputError, Unused
from cfgsafe.explain import explain, table
from cfgsafe.fields import Count, Guidance, RequestSeed, Share, Temperature, Whole
from cfgsafe.files import read_jsonl
from cfgsafe.lora import DEFAULT, adapter_names
from cfgsafe.request import NEGATIVE, POSITIVE, Request, check_request
from cfgsafe.request_lines import NUMBERS, read_request, stop_tokens
from cfgsafe.subject import Subject, load
from cfgsafe.tokenizer import SystemPrompt


@dataclass
class Options:
    """Ask a model, with or without adapter and guidance."""

    model: str
    """Checkpoint folder or hub id."""
    prompt: str | None = None
    """The user's message."""
    requests: str | None = None
    """JSONL file of requests, answered together."""
    chat: bool = False
    """Have a conversation: each line of the input is one message."""
    explain: bool = False
    """Also show each token's probabilities, and the token that would have come without guidance."""
    adapter: tuple[str, ...] = ()
    """PEFT folder or hub id of a LoRA adapter. Or several, each as NAME=FOLDER; each request chooses
    one of them with its field `adapter`."""
    system: str | None = None
    """Your own system prompt, for --prompt, --chat, and lines whose messages have none."""
    positive: str = POSITIVE
    """Guidance: the sentence to follow, in the system prompt."""
    negative: str = NEGATIVE
    """Guidance: the sentence to steer away from, in the system prompt."""
    system_prompt: SystemPrompt = Subject.system_prompt
    """Guidance: add the two sentences to your own system prompt, or replace it by them."""
    guidance: Guidance | None = None
    """Guidance strength g; 1 is the positive sentence alone. Without this option nothing is guided."""
    space: str = Request.space
    """Space in which the two distributions are combined, such as prob or log."""
    alpha: Share = Request.alpha
    """Plausibility mask: keep tokens at least this share as likely as the most likely token of the
    positive prompt; 0 keeps all."""
    temperature: Temperature = Request.temperature
    """Sampling temperature; 0 is greedy."""
    top_k: Whole = Request.top_k
    """Number of most likely tokens to sample from; 0 means all."""
    top_p: Share = Request.top_p
    """Sample from the fewest tokens whose probabilities add up to this share; 1 means all."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer. The tokens of the answer are compared with those of each text alone."""
    seed: RequestSeed = Request.seed
    """Sampling seed."""
    skip: bool = False
    """Skip the forward of the negative prompt where it provably cannot change the token."""
    max_new_tokens: Count = Request.max_new_tokens
    """Largest number of tokens in an answer."""
    json: bool = False
    """Print one JSON object instead of text."""
    batch: Count = BATCH
    """Number of requests decoded together."""
    device: str = Subject.device
    """Torch device."""
    dtype: str = Subject.dtype
    """Data type of the model: float32 or bfloat16."""
    tune: bool = Subject.tune
    """On a CPU, time several ways to multiply a few rows with the weights, and use the fastest."""
    compile: bool = False
    """Compile the decoding step with torch.compile, which takes a while for each new number of rows."""
    verbose: bool = False
    """Show on stderr which ways --tune has found."""

    def unused(self) -> Unused:
        """See `errors.Unused`."""
        if self.device.startswith("cuda"):
            yield "on a GPU", "tune", "verbose"
        if self.requests is not None:  # where a line may guide itself, and sample
            return
        greedy = self.temperature == 0
        if greedy:
            yield "on greedy answers, without --temperature", "top_k", "top_p", "seed"
        if self.chat:  # where /guidance may switch guidance on
            yield "in a --chat", "explain", "json", "skip", "batch"
            return
        yield "on a single request", "batch"
        if self.guidance is None:
            yield "without --guidance", "space", "positive", "negative", "system_prompt", "skip"
        elif self.system_prompt == "replace":
            yield "with --system-prompt replace", "system"
        if self.guidance is None and greedy and not self.explain:
            yield "on greedy answers without --guidance", "alpha"


def run(options: Options) -> None:
    modes = (options.prompt is not None, options.requests is not None, options.chat)
    if sum(modes) != 1:
        raise InputError("give one of --prompt TEXT, --requests FILE and --chat")
    if "" in options.stop:
        raise InputError("--stop: an empty text cannot end an answer")
    subject = Subject(
        options.model,
        guidance=options.guidance,
        space=options.space,
        positive=options.positive,
        negative=options.negative,
        system_prompt=options.system_prompt,
        batch=options.batch,
        device=options.device,
        dtype=options.dtype,
        tune=options.tune,
    )
    model, tokenizer = load(subject, named_adapters(options), may_pack=not options.compile)
    if options.compile:
        model.compile_steps()
    if options.verbose:
        print(products.table(model.groups()), file=sys.stderr)
    sampling: dict = {name: getattr(options, name) for name in NUMBERS}
    sampling["stop"] = stop_tokens(options.stop, tokenizer)
    names = adapter_names(model)
    sampling["adapter"] = names[0] if len(names) == 1 else DEFAULT
    if options.chat:
        chat(model, tokenizer, subject, terminal_lines(), terminal_say, options.system, **sampling)
        return

    defaults = Request([], **sampling)
    requests, places = [], []
    for place, row in request_rows(options):
        request = read_request(row, place, tokenizer, subject, defaults, options.system)
        check_request(request, model, place)
        requests.append(request)
        places.append(place)
    completions = generate(model, requests, batch=options.batch, skip=options.skip)
    for request, place, completion in zip(requests, places, completions, strict=True):
        text = tokenizer.decode(completion.tokens)
        if completion.failure:
            print(f"error: {place}: the answer failed: {completion.failure}", file=sys.stderr)
        explains = options.explain and not completion.failure
        rows = explain(model, tokenizer, request, completion) if explains else []
        if options.json or options.requests:
            line = as_json(completion, text)
            if options.explain:
                line["explain"] = rows
            print(json.dumps(line, ensure_ascii=False))
        else:
            print(text.strip())
            if options.explain:
                print("\n" + table(rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    print_statistics(options, requests, completions)
    if any(completion.failure for completion in completions):
        sys.exit(2)


def named_adapters(options: Options) -> dict[str, str]:
    """Name -> folder of --adapter. Raises InputError for a name given twice, or several that none chooses."""
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
    if len(adapters) > 1 and options.requests is None:
        several = " ".join(options.adapter)
        raise InputError(f"--adapter {several}: several are for --requests, where each line chooses one")
    return adapters


def request_rows(options: Options) -> list[tuple[str, dict]]:
    """(place, row) of each line of --requests, or the one row that --prompt stands for."""
    if options.requests is not None:
        return list(read_jsonl(options.requests))
    return [("--prompt", {"messages": [{"role": "user", "content": options.prompt}]})]


def as_json(completion: Completion, text: str) -> dict:
    """The JSON object of an answer; its times are those of `Completion`."""
    first = completion.first_token_seconds
    return {
        "text": text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "failure": completion.failure,
        "first_token_seconds": None if first is None else round(first, 4),
        "tokens_per_second": round(completion.tokens_per_second, 1),
    }


def print_statistics(options: Options, requests: list[Request], completions: list[Completion]) -> None:
    """Print the speed and the number of skipped forwards on stderr."""
    if options.skip:
        tokens = skipped = 0
        for request, completion in zip(requests, completions, strict=True):
            if request.guided:
                tokens += len(completion.tokens)
                skipped += completion.skipped
        print(f"negative prompt not needed for {skipped} of {tokens} guided tokens", file=sys.stderr)
    if options.requests is None and not options.json:
        count, first = len(completions[0].tokens), completions[0].first_token_seconds
        wait = "" if first is None else f", the first after {first:.2f} s"
        then = f", then {completions[0].tokens_per_second:.0f} tokens/s" if count > 1 else ""
        print(f"{count} tokens{wait}{then}", file=sys.stderr)


def main() -> None:
    run_single(Options, run, __doc__)


if __name__ == "__main__":
    main()
