"""The tensors of a decoding batch: rows of the KV cache, what each is fed, and how rows become the next tokens of requests.

Source: static shapes and CUDA graphs after gpt-fast; skipping of negative rows that cannot change the token: our own, see `certified`.
Rows lie in the order of their requests, the positive one of a pair before the negative one.
Shapes: B requests, n rows, C hidden, V vocabulary.

Run it: python -m cfgsafe.bench decode
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.guidance import combine, next_tokens
from cfgsafe.kernels.reference import SPACES, Sampling, widen
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lora import set_adapters

SLOT_STEP = 64  # attention reads a multiple of these, so that shapes stay for a while
PREFILL_TOKENS = 8192  # in one forward, padding included
PREFIX_LEAST = 16  # tokens that must be shared to compute them once
PREFIXES = 8  # kept
STEADY = 4  # steps a batch must stay before it is captured


@dataclass(frozen=True)
class Settings:
    """How the engine computes what it computes."""

    log_path: str = (
        "hidden"  # log space without a mask: combine hidden states before the head, or "logits" after it
    )
    skip: bool = False  # leave out negative rows that provably cannot change the token
    graphs: bool = True  # CUDA graphs on a GPU


class Choice:
    """From the last hidden states of rows to the next tokens of their requests."""

    def __init__(self, model: Llama, states: list, settings: Settings):
        requests = [state.request for state in states]
        tensor = lambda values, dtype: torch.tensor(values, dtype=dtype, device=model.device)
        rows, at = [], 0
        for request in requests:
            rows.append(at)
            at += len(request.rows)
        before = [
            r.guided and r.space == "log" and r.alpha == 0 and settings.log_path == "hidden" for r in requests
        ]
        after = [r.guided and not b for r, b in zip(requests, before, strict=True)]
        self.model = model
        self.positive = tensor(rows, torch.long)
        self.other = (
            tensor([row + b for row, b in zip(rows, before, strict=True)], torch.long)
            if any(before)
            else None
        )
        self.g = tensor(
            [r.guidance if b else 1.0 for r, b in zip(requests, before, strict=True)], torch.float32
        )
        self.negative = tensor([row + 1 for row, a in zip(rows, after, strict=True) if a], torch.long)
        places = iter(range(len(requests), 2 * len(requests)))
        self.sampling = Sampling(
            positive=torch.arange(len(requests), device=model.device),
            negative=tensor([next(places) if a else -1 for a in after], torch.long),
            guidance=tensor([r.guidance for r in requests], torch.float32),
            space=tensor([SPACES.index(r.space) for r in requests], torch.int32),
            alpha=tensor([r.alpha for r in requests], torch.float32),
            temperature=tensor([r.temperature for r in requests], torch.float32),
            top_k=tensor([r.top_k for r in requests], torch.int32),
            top_p=tensor([r.top_p for r in requests], torch.float32),
            seed=tensor([r.seed for r in requests], torch.long),
            step=tensor([len(state.completion.tokens) for state in states], torch.long),
            truncates=any(r.temperature > 0 and (r.top_k > 0 or r.top_p < 1) for r in requests),
            draws=any(r.temperature > 0 for r in requests),
            guides=any(after),
            masks=any(r.alpha > 0 for r in requests),
        )

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,), -1 where none is possible, and their log-probabilities (B,), from last hidden states (n, C)."""
        states = hidden[self.positive]
        if self.other is not None:
            states = combine(states, hidden[self.other], self.g)
        if len(self.negative):
            states = torch.cat((states, hidden[self.negative]))
        return next_tokens(self.model.head(states), self.sampling)


class Batch:
    """The running requests, as long as none joins or leaves."""

    def __init__(self, model: Llama, cache: KVCache, running: list, settings: Settings):
        self.model, self.cache, self.running, self.settings = model, cache, running, settings
        self.choice = Choice(model, running, settings)
        owners = [number for number, state in enumerate(running) for _ in state.lengths]
        self.owner = torch.tensor(owners, device=model.device)
        self.tokens = torch.tensor([state.last for state in running], device=model.device)
        self.logprobs = torch.zeros(
            len(running), device=model.device, dtype=widen(torch.empty(0, dtype=model.dtype)).dtype
        )
        self.positions = torch.tensor(
            [length for state in running for length in state.lengths], device=model.device
        )[:, None]
        set_adapters(model, [running[owner].request.adapter for owner in owners])
        self.shares = dict(model.shares)
        self.slots = self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> tuple[list[int], list[float]]:
        """Feed each request its last token; returns the next ones and their log-probabilities."""
        self.model.shares.update(self.shares)
        needed = max(
            len(ids) + len(state.completion.tokens) for state in self.running for ids in state.request.rows
        )
        if needed > self.slots:
            self.slots = min(-(-needed // SLOT_STEP) * SLOT_STEP, self.cache.keys.shape[3])
            self.view, self.graph, self.steps = self.cache.part(len(self.owner), self.slots), None, 0
        if self.settings.skip:
            return self._step_skipping()
        if self.graph is None and self.steps >= STEADY and self.settings.graphs and self.tokens.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._advance()
        self.graph.replay() if self.graph else self._advance()
        self.steps += 1
        for state in self.running:
            state.lengths = [length + 1 for length in state.lengths]
        return self.tokens.tolist(), self.logprobs.tolist()

    def _advance(self) -> None:
        """One step on the device alone; what it leaves there is what the next one starts from."""
        fed = self.tokens.clamp(min=0)[self.owner][:, None]
        tokens, logprobs = self.choice(self.model(fed, self.positions, self.view)[:, 0])
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        self.positions.add_(1)
        self.choice.sampling.step.add_(1)

    def _step_skipping(self) -> tuple[list[int], list[float]]:
        """Positive rows first; of the negative ones those that may matter, which then catch up on all tokens they have missed."""
        model, running, firsts = self.model, self.running, self.choice.positive
        device = model.device
        last = torch.tensor([state.last for state in running], device=device)[:, None]
        at = torch.tensor([state.lengths[0] for state in running], device=device)[:, None]
        hidden = torch.zeros(len(self.owner), model.config.hidden_size, device=device, dtype=model.dtype)
        hidden[firsts] = self._forward(last, at, firsts)[:, 0]
        guided = [number for number, state in enumerate(running) if state.request.guided]
        if guided:
            sure = certified(
                model.head(hidden[firsts[guided]]), [running[number].request for number in guided]
            ).tolist()
            hidden[firsts[guided] + 1] = hidden[
                firsts[guided]
            ]  # where it is sure, the positive row alone gives the same token
            asked = [number for number, yes in zip(guided, sure, strict=True) if not yes]
            for number, yes in zip(guided, sure, strict=True):
                running[number].completion.skipped += yes
            if asked:
                self._catch_up(asked, hidden)
        for state in running:
            state.lengths[0] += 1
        tokens, logprobs = self.choice(hidden)
        self.choice.sampling.step.add_(1)
        return tokens.tolist(), logprobs.tolist()

    def _catch_up(self, numbers: list[int], hidden: Tensor) -> None:
        """Feed the negative rows of requests `numbers` what they lack, and put their last hidden states into `hidden`."""
        states = [self.running[number] for number in numbers]
        missed = [
            state.completion.tokens[state.lengths[1] - len(state.request.negative) :] for state in states
        ]
        width = max(map(len, missed))
        rows = self.choice.positive[numbers] + 1
        fed = torch.tensor(
            [tokens + tokens[-1:] * (width - len(tokens)) for tokens in missed], device=rows.device
        )
        starts = torch.tensor([state.lengths[1] for state in states], device=rows.device)[:, None]
        last = torch.tensor([len(tokens) - 1 for tokens in missed], device=rows.device)
        positions = starts + torch.minimum(
            torch.arange(width, device=rows.device), last[:, None]
        )  # padding writes the last token again
        hidden[rows] = self._forward(fed, positions, rows)[torch.arange(len(rows), device=rows.device), last]
        for state, tokens in zip(states, missed, strict=True):
            state.lengths[1] += len(tokens)

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        set_adapters(self.model, [self.running[owner].request.adapter for owner in self.owner[rows].tolist()])
        return self.model(tokens, positions, self.cache.part(len(self.owner), self.slots, rows))


def certified(logits: Tensor, requests: list) -> Tensor:
    """Whether the positive row's logits (B, V) alone decide the token of each guided request, (B,) bool.

    With a plausibility mask: when one token alone is plausible. Greedy in probability space, g > 0: g P_pos + (1 - g) P_neg of the best
    token exceeds that of any other when the lead of P_pos is above |g - 1| / g, because P_neg differs by at most 1.
    """
    top = widen(logits).softmax(-1).topk(2, -1).values
    tensor = lambda values: torch.tensor(values, device=logits.device)
    g = tensor([request.guidance for request in requests])
    bound = torch.where(g > 0, (g - 1).abs() / g, torch.inf)
    greedy = tensor([request.space == "prob" and request.temperature == 0 for request in requests])
    alone = top[:, 1] < tensor([request.alpha for request in requests]) * top[:, 0]
    return alone | (greedy & (top[:, 0] - top[:, 1] > bound + 1e-5))  # more than rounding


class Prefill:
    """Fills the rows of joining requests; beginnings that several prompts share are computed once and kept for those to come."""

    def __init__(self, model: Llama, cache: KVCache, settings: Settings):
        self.model, self.cache, self.settings = model, cache, settings
        self.prefixes: dict[tuple, tuple[list[int], KVCache]] = {}
        self.computed = 0  # tokens, padding left out

    def __call__(self, states: list, first_row: int) -> tuple[list[int], list[float]]:
        """Fill the rows of `states` from `first_row` on; returns their first tokens and log-probabilities."""
        rows = [
            (state.request.adapter, side, ids)
            for state in states
            for side, ids in enumerate(state.request.rows)
        ]
        prefixes = self._prefixes(rows)
        hidden = torch.empty(
            len(rows), self.model.config.hidden_size, device=self.model.device, dtype=self.model.dtype
        )
        groups: dict[tuple | None, list[int]] = {}
        for number, key in enumerate(prefixes):
            groups.setdefault(key, []).append(number)
        for key, numbers in groups.items():
            shared, source = self.prefixes[key] if key else ([], None)
            while numbers:
                width = max(len(rows[number][2]) for number in numbers) - len(shared)
                some, numbers = (
                    numbers[: max(1, PREFILL_TOKENS // width)],
                    numbers[max(1, PREFILL_TOKENS // width) :],
                )
                hidden[some] = self._fill(
                    [rows[number] for number in some], [first_row + number for number in some], shared, source
                )
        set_adapters(self.model, None)
        tokens, logprobs = Choice(self.model, states, self.settings)(hidden)
        return tokens.tolist(), logprobs.tolist()

    def _fill(
        self, rows: list[tuple], targets: list[int], shared: list[int], source: KVCache | None
    ) -> Tensor:
        """Compute prompts after their `shared` beginning and store them in rows `targets`; last hidden states (rows, C)."""
        model, p = self.model, len(shared)
        rest = [ids[p:] for _, _, ids in rows]
        width = max(map(len, rest))
        self.computed += sum(map(len, rest))
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rest], device=model.device)
        scratch = KVCache.empty(model.config, len(rows), p + width, device=model.device, dtype=model.dtype)
        for row in range(len(rows)) if source else ():
            scratch.copy(row, source, 0, p)
        set_adapters(model, [adapter for adapter, _, _ in rows])
        positions = torch.arange(p, p + width, device=model.device).expand_as(tokens) if source else None
        hidden = model(tokens, positions, scratch)
        for row, (target, ids) in enumerate(zip(targets, rest, strict=True)):
            self.cache.copy(target, scratch, row, p + len(ids))
        return hidden[
            torch.arange(len(rows), device=model.device),
            torch.tensor([len(ids) - 1 for ids in rest], device=model.device),
        ]

    def _prefixes(self, rows: list[tuple]) -> list[tuple | None]:
        """For each row (adapter, side of the pair, ids) the key of the stored beginning it can start from, or None."""
        together: dict[tuple, list[list[int]]] = {}
        keys = [(adapter, side, *ids[:PREFIX_LEAST]) for adapter, side, ids in rows]
        for key, (_, _, ids) in zip(keys, rows, strict=True):
            together.setdefault(key, []).append(ids)
        for key, prompts in together.items():
            known = self.prefixes.get(key, ([], None))[0]
            shared = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
            if (
                len(prompts) > 1
                and len(shared) >= PREFIX_LEAST
                and (not known or shared[: len(known)] != known)
            ):
                cache = KVCache.empty(
                    self.model.config, 1, len(shared), device=self.model.device, dtype=self.model.dtype
                )
                set_adapters(self.model, [key[0]])
                self.model(torch.tensor([shared], device=self.model.device), cache=cache)
                self.computed += len(shared)
                self.prefixes[key] = (shared, cache)
        found = []
        for key, (_, _, ids) in zip(keys, rows, strict=True):
            shared = self.prefixes[key][0] if key in self.prefixes else None
            found.append(key if shared and len(ids) > len(shared) and ids[: len(shared)] == shared else None)
        used = set(found)
        for key in [key for key in self.prefixes if key not in used][: max(0, len(self.prefixes) - PREFIXES)]:
            del self.prefixes[key]  # the oldest that nobody needs now
        return found
