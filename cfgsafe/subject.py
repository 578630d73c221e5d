"""The model under evaluation: checkpoint, adapter and guidance, the same for every measure.

Source: Smirnov (arXiv 2412.06846).
Deviation: in the paper's code the utility path silently ran without guidance; here every measure
gets its requests from `request_for`.

Run it: python eval.py leak --help
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cfgsafe.checkpoint import DTYPES
from cfgsafe.decode import Completion, generate
from cfgsafe.errors import InputError, Unused, at
from cfgsafe.fields import Count, Guidance, Share, check_ranges
from cfgsafe.files import Answer, AnswerLog
from cfgsafe.guidance import SPACES
from cfgsafe.identity import digest_of, identity
from cfgsafe.llama import Llama
from cfgsafe.load import load_model, load_tokenizer
from cfgsafe.outputs import InputPath
from cfgsafe.products import prepare
from cfgsafe.progress import progress
from cfgsafe.request import NEGATIVE, POSITIVE, Request, check_request, guided_request
from cfgsafe.tokenizer import ADD, Messages, SystemPrompt, Tokenizer

ANSWER_TOKENS = (
    256  # longest answer of a measured model, and longest chosen side; the limit of Smirnov's code
)


@dataclass
class Subject:
    """The model under evaluation: its checkpoint, adapter and guidance."""

    model: InputPath
    """Checkpoint folder or hub id."""
    adapter: InputPath | None = None
    """PEFT folder or hub id of a LoRA adapter."""
    guidance: Guidance | None = None
    """Guidance strength g; 1 is the positive sentence alone. Without this option nothing is guided."""
    space: str = Request.space
    """Space in which the two distributions are combined, such as prob or log."""
    alpha: Share = Request.alpha
    """Plausibility mask: keep tokens at least this share as likely as the most likely token of the
    positive prompt; 0 keeps all. Without guidance, greedy answers stay the same."""
    positive: str = POSITIVE
    """Guidance: the sentence to follow, in the system prompt."""
    negative: str = NEGATIVE
    """Guidance: the sentence to steer away from, in the system prompt."""
    system_prompt: SystemPrompt = ADD
    """Guidance: add the two sentences to a conversation's own system prompt, or replace it by them as the
    paper's evaluation code does."""
    batch: Count = 128
    """Largest number of requests decoded or scored together."""
    device: str = "cpu"
    """Torch device."""
    dtype: str = "float32"
    """Data type of the model: float32 or bfloat16."""
    tune: bool = True
    """On a CPU, time several ways to multiply a few rows with the weights, and use the fastest. Which one
    that is can differ from run to run, and with it the rounding."""

    @property
    def guarded(self) -> dict:
        """The guidance as results record it: without it no space; `system_prompt` only where not added to."""
        guarded = {"guidance": self.guidance, "space": None if self.guidance is None else self.space}
        if self.guidance is not None and self.system_prompt != ADD:
            guarded["system_prompt"] = self.system_prompt
        return guarded

    def unused(self) -> Unused:
        """See `errors.Unused`. At g = 1 nothing is refused, so that scripts can sweep g."""
        if self.device.startswith("cuda"):
            yield "on a GPU", "tune"
        if self.guidance is None:
            yield "without --guidance", "space", "positive", "negative", "system_prompt"

    def unused_if_greedy(self) -> Unused:
        """The options that have no effect besides `unused` where all answers are greedy."""
        if self.guidance is None:
            yield "on greedy answers without --guidance", "alpha"


def check(subject: Subject) -> None:
    """Raise InputError naming the option that is out of range; those of a subclass are checked as well."""
    check_ranges(subject)
    for name, value, known in (("dtype", subject.dtype, DTYPES), ("space", subject.space, SPACES)):
        if value not in known:
            raise InputError(f"--{name} {value}: must be one of {', '.join(known)}")


def check_device(device: str) -> None:
    """Raise InputError for a device that is not there, or that holds no numbers."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: cannot be used ({reason})") from None


def load(
    subject: Subject, adapters: Mapping[str, str] | None = None, *, may_pack: bool = False
) -> tuple[Llama, Tokenizer]:
    """The subject's model and tokenizer; `adapters` (name -> folder) replace its adapter.

    `may_pack`: see `products.prepare`.

    Raises CheckpointError and InputError.
    """
    check(subject)
    check_device(subject.device)
    dtype = DTYPES[subject.dtype]
    model = load_model(subject.model, device=subject.device, dtype=dtype, adapter=adapters or subject.adapter)
    if subject.tune:
        prepare(model.groups(), model.model.embed_tokens.weight, may_pack=may_pack)
    return model, load_tokenizer(subject.model)


def request_for(subject: Subject, tokenizer: Tokenizer, messages: Messages, **sampling) -> Request:
    """The request that asks the subject `messages`; `sampling` are other fields of `Request`."""
    sampling = {"alpha": subject.alpha, "space": subject.space, **sampling}
    if subject.guidance is None:
        return Request(tokenizer.encode_chat(messages), **sampling)
    return guided_request(
        tokenizer,
        messages,
        subject.guidance,
        positive=subject.positive,
        negative=subject.negative,
        system_prompt=subject.system_prompt,
        **sampling,
    )


def checked_request(
    subject: Subject, model: Llama, tokenizer: Tokenizer, messages: Messages, place: str, **sampling
) -> Request:
    """`request_for`, if the model can serve it. Raises InputError and ContextError naming `place`."""
    with at(place):
        request = request_for(subject, tokenizer, messages, **sampling)
    check_request(request, model, place)
    return request


def answers(
    subject: Subject,
    model: Llama,
    tokenizer: Tokenizer,
    conversations: list[Messages],
    what: str,
    max_new_tokens: int,
    places: list[str] | None = None,
    kept: Path | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Answer]:
    """Answers of the subject, greedy or at a temperature: conversation i is then drawn from `seed` + i.

    An error names the entry of `places`, or else `what` and a number.

    Each answer is written to the file `kept` as it comes (`AnswerLog`), so that a later call with the
    same requests, and with the same contents of model and adapter, computes only what is missing. One
    that failed, for want of memory perhaps, is asked for again then.
    """
    weights = identity(subject.model, subject.adapter) if kept else ""
    requests, keys = [], []
    for number, messages in enumerate(conversations):
        place = places[number] if places else f"{what} {number + 1}"
        sampling: dict = {"max_new_tokens": max_new_tokens}
        if temperature:
            sampling |= {"temperature": temperature, "seed": seed + number}
        request = checked_request(subject, model, tokenizer, messages, place, **sampling)
        requests.append(request)
        keys.append(digest_of((weights, subject.dtype, request)))
    log, failed = AnswerLog(kept), {}
    todo = [number for number, key in enumerate(keys) if key not in log.known]
    done = len(requests) - len(todo)
    with progress(total=len(requests), initial=done, desc=what) as bar, log:

        def keep(number: int, completion: Completion) -> None:
            bar.update()
            key = keys[todo[number]]
            answer = Answer(tokenizer.decode(completion.tokens), completion.finish_reason)
            if answer.finish_reason == "failed":
                failed[key] = answer
            else:
                log.keep(key, answer)

        asked = [requests[number] for number in todo]
        completions = generate(model, asked, batch=subject.batch, on_completion=keep)
    tell_failures(completions, what)
    every = log.known | failed
    return [every[key] for key in keys]


def complete(model: Llama, requests: list[Request], batch: int, what: str) -> list[Completion]:
    """`decode.generate`, with the progress of `what`, and a line about answers that failed."""
    with progress(total=len(requests), desc=what) as bar:

        def advance(number: int, completion: Completion) -> None:
            bar.update()

        completions = generate(model, requests, batch=batch, on_completion=advance)
    tell_failures(completions, what)
    return completions


def tell_failures(completions: list[Completion], what: str) -> None:
    """Say on stderr how many answers failed, and why the first of them did."""
    failures = [completion.failure for completion in completions if completion.failure]
    if failures:
        many = f"{len(failures)} of {len(completions)} answers failed"
        print(f"warning: {what}: {many}, the first because {failures[0]}", file=sys.stderr)
