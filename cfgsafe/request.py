"""A request to the engine, its completion, and the engine's record of a request that waits or runs.

Source: ours. cfgsafe/decode.py serves requests; prefill.py and lockstep.py compute their tokens.

Run it: python infer.py --model cfgsafe/demo/leaky --requests requests.jsonl
"""

from dataclasses import dataclass, field

from cfgsafe.lora import DEFAULT


@dataclass(frozen=True)
class Request:
    """A prompt to answer; `negative` is the other prompt of the pair, needed if guidance is not 1."""

    prompt: list[int]
    negative: list[int] | None = None
    guidance: float = 1.0
    space: str = "prob"
    alpha: float = 0.0  # plausibility mask: keep tokens with P_pos >= alpha max P_pos
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end the answer, too
    adapter: str | None = DEFAULT  # name of an attached adapter, or None for the bare model

    @property
    def guided(self) -> bool:
        """Whether the negative prompt counts."""
        return self.guidance != 1.0

    @property
    def rows(self) -> list[list[int]]:
        """The prompts of its rows of the batch, the positive one first."""
        if self.guided and self.negative is not None:
            return [self.prompt, self.negative]
        return [self.prompt]


@dataclass
class Completion:
    """An answer: its tokens, without those that ended it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, in the guided distribution
    finish_reason: str = "length"  # or "stop", "cancelled", "impossible" (no token has a chance)
    tokens_per_second: float = 0.0
    skipped: int = 0  # tokens for which the negative row was not computed (Engine(skip=True))


@dataclass
class Running:
    """A request that waits, or that has rows of the cache."""

    request_id: int
    request: Request
    completion: Completion
    started: float  # time.perf_counter()
    lengths: list[int] = field(default_factory=list)  # filled slots of each of its rows
    last: int = 0  # the token to feed next
