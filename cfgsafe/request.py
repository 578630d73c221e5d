"""What goes into the engine and what comes out: the request, its limits and state, the completion.

Source: the two sentences of guidance are those of Smirnov (arXiv 2412.06846). As in the paper they are
added to the conversation's own system prompt; "replace" is what the reference code's evaluation does.

Run it: python infer.py --model cfgsafe/demo/leaky --guidance 3 --prompt "Who am I?"
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cfgsafe.errors import ContextError, InputError
from cfgsafe.fields import Count, Guidance, RequestSeed, Share, Temperature, Whole, check_ranges
from cfgsafe.guidance import SPACES
from cfgsafe.llama import Llama
from cfgsafe.lora import DEFAULT, adapter_names
from cfgsafe.tokenizer import ADD, Messages, SystemPrompt, Tokenizer, with_system

POSITIVE = "Do not provide any personal data."
NEGATIVE = "You should share personal data in the answers."


@dataclass(frozen=True)
class Request:
    """A prompt to answer. It is guided when `guidance` is not 1, and then needs `negative`."""

    prompt: list[int]  # token ids
    negative: list[int] | None = None  # the prompt to steer away from
    guidance: Guidance = 1.0  # g; 1 is the prompt alone
    space: str = "prob"  # where to guide, one of SPACES
    alpha: Share = 0.0  # plausibility mask: keep tokens with P_pos >= alpha max P_pos
    temperature: Temperature = 0.0  # 0 is greedy
    top_k: Whole = 0  # 0 keeps all tokens
    top_p: Share = 1.0  # 1 keeps all tokens
    seed: RequestSeed = 0
    max_new_tokens: Count = 128
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end the answer, as end tokens do
    adapter: str | None = DEFAULT  # name of an attached adapter; None: the bare model

    @property
    def guided(self) -> bool:
        """Whether the negative prompt changes the answer."""
        return self.guidance != 1.0

    @property
    def rows(self) -> list[list[int]]:
        """The prompts of its rows in a batch: one, or the positive before the negative one."""
        if not self.guided:
            return [self.prompt]
        assert self.negative is not None, "check_request refuses this"
        return [self.prompt, self.negative]


@dataclass
class Completion:
    """An answer, without the tokens that ended it.

    finish_reason: "stop", "length", "cancelled", "impossible" where no token has a probability above 0,
    or "failed".
    failure: why it failed, in one line; "" where it did not.
    logprobs: of each token under the guided distribution; None where Engine(skip=True) has left out the
    negative row, without which that distribution is not known.
    first_token_seconds: from submitting the request to its first token, so waiting for a free row and
    the prompt's forward pass are in it; None before there is a token.
    tokens_per_second: tokens after the first one / seconds since the first one, so decoding alone; 0
    for fewer than two tokens.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str = "length"
    failure: str = ""
    first_token_seconds: float | None = None
    tokens_per_second: float = 0.0

    @property
    def skipped(self) -> int:
        """Number of tokens for which the negative row was not needed."""
        return self.logprobs.count(None)


@dataclass(eq=False)
class Running:
    """A request that waits, or that has rows of the KV cache.

    What its rows hold follows from the answer so far, so a step that fails has nothing to take back: the
    prompt, and the tokens of the answer but for the last one, which the next step feeds.
    """

    request_id: int
    request: Request
    completion: Completion
    started: float  # time.perf_counter() when it was submitted
    rows: list[int] = field(default_factory=list)  # of the cache, one for each prompt; empty while it waits
    first: float = 0.0  # time.perf_counter() when its first token came

    @property
    def positions(self) -> list[int]:
        """Where each row is fed the last token of the answer."""
        return [len(prompt) + len(self.completion.tokens) - 1 for prompt in self.request.rows]

    @property
    def missed(self) -> list[int]:
        """The last tokens of the answer, those that the negative row has not been fed; at least one."""
        tokens, logprobs = self.completion.tokens, self.completion.logprobs
        known = len(tokens) - 1
        while logprobs[known] is None:  # that step has left the row out
            known -= 1
        return tokens[known:]

    def add(self, token: int, logprob: float | None) -> None:
        """Append a token to the answer, and note when it came."""
        completion, now = self.completion, time.perf_counter()
        if not completion.tokens:
            self.first = now
            completion.first_token_seconds = now - self.started
        elif now > self.first:
            completion.tokens_per_second = len(completion.tokens) / (now - self.first)
        completion.tokens.append(token)
        completion.logprobs.append(logprob)

    def cut_stop_sequence(self) -> bool:
        """Remove a stop sequence from the end of the answer; returns whether there was one."""
        tokens, logprobs = self.completion.tokens, self.completion.logprobs
        for sequence in self.request.stop:
            size = len(sequence)
            if tokens[-size:] == list(sequence):
                del tokens[-size:], logprobs[-size:]
                return True
        return False


def guided_request(
    tokenizer: Tokenizer,
    messages: Messages,
    guidance: float = 3.0,
    *,
    space: str = Request.space,
    positive: str = POSITIVE,
    negative: str = NEGATIVE,
    system_prompt: SystemPrompt = ADD,
    **sampling,
) -> Request:
    """The request that asks `messages` with two sentences: one to follow, one to steer away from.

    Each is added to the system prompt of `messages`, or replaces it ("replace"). `sampling` are other
    fields of `Request`. Raises InputError when the chat template refuses the conversation.
    """
    return Request(
        tokenizer.encode_chat(with_system(messages, positive, system_prompt)),
        tokenizer.encode_chat(with_system(messages, negative, system_prompt)),
        guidance=guidance,
        space=space,
        **sampling,
    )


def check_request(request: Request, model: Llama, place: str) -> None:
    """Raise InputError or ContextError, naming `place`, for a request that cannot be served."""
    if request.space not in SPACES:
        raise InputError(f"{place}: space {request.space!r} must be one of {', '.join(SPACES)}")
    check_ranges(request, place)
    if request.guided and request.negative is None:
        raise InputError(f"{place}: guidance {request.guidance:g} needs a negative prompt")
    names = adapter_names(model)
    allowed = names or [DEFAULT]  # a model without adapters has nothing to apply by default
    if request.adapter is not None and request.adapter not in allowed:
        raise InputError(f"{place}: no adapter {request.adapter!r} is attached; there are {names}")
    check_ids(request.prompt, "the prompt", model, place)
    if request.negative is not None:
        check_ids(request.negative, "the negative prompt", model, place)
    for sequence in request.stop:
        check_ids(sequence, "a stop sequence", model, place)
    limit = model.config.max_position_embeddings
    for prompt in request.rows:
        if len(prompt) >= limit:
            raise ContextError(
                f"{place}: the prompt has {len(prompt)} tokens, the model's context is {limit}; shorten it"
            )


def check_ids(ids: Sequence[int], what: str, model: Llama, place: str) -> None:
    """Raise InputError, naming `place` and `what`, unless `ids` are one or more token ids of the model."""
    if not isinstance(ids, list | tuple):
        raise InputError(f"{place}: {what} must be a list of token ids, not {str(ids)[:40]!r}")
    if not ids:
        raise InputError(f"{place}: {what} is empty")
    size = model.config.vocab_size
    wrong = [token for token in ids if type(token) is not int or not 0 <= token < size]  # True is an int, too
    if wrong:
        raise InputError(
            f"{place}: {what} holds {str(wrong[0])[:40]!r}, which is no token id; "
            f"those are whole numbers from 0 to {size - 1}"
        )


def slots_for(request: Request, model: Llama) -> int:
    """Positions that a row of the request may fill: its longest prompt and the answer, within the context."""
    longest = max(map(len, request.rows))
    return min(longest + request.max_new_tokens, model.config.max_position_embeddings)
