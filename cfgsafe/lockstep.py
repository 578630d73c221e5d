"""The tensors of a decoding batch: rows of the KV cache, the tokens fed to them, the tokens that come out.

Source: static shapes and CUDA graphs after gpt-fast; skipping negative rows is ours, see `certified`.
Rows lie in the order of their requests, the positive row of a pair before the negative one.
Shapes: B requests, n rows, T tokens, C hidden, V vocabulary.

Run it: python -m cfgsafe.bench decode
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cfgsafe.guidance import SPACES, combine, next_tokens
from cfgsafe.kernels.reference import Sampling, widen
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lora import set_adapters
from cfgsafe.request import Request, Running

SLOT_STEP = 64  # attention reads a multiple of these, so that shapes stay the same for a while
STEADY = 4  # steps without a change of the batch before it is captured as a CUDA graph


@dataclass(frozen=True)
class Settings:
    """How the engine computes its tokens."""

    log_path: str = "hidden"  # log space without a mask: combine "hidden" states, or "logits"
    skip: bool = False  # leave out negative rows that provably cannot change the token
    graphs: bool = True  # CUDA graphs on a GPU


class Sampler:
    """Turns the last hidden states of n rows into the next tokens of their B requests.

    A request reaches the head in one of three ways:

    alone       not guided: its positive row
    combined    log space without a mask: one row, g h_pos + (1 - g) h_neg. This is exact: the head
                is linear, so its logits are g z_pos + (1 - g) z_neg. Eq. 2 differs from them by a
                constant, the normalisers, which log-softmax removes. (A mask would need P_pos.)
    paired      any other guided request: both rows, to be guided after the head
    """

    def __init__(self, model: Llama, states: list[Running], settings: Settings):
        requests = [state.request for state in states]
        positive: list[int] = []  # each request's positive row
        partner: list[int] = []  # the row to combine it with, or the same row: no change
        coefficient: list[float] = []  # the g of that combination
        paired: list[int] = []  # negative rows that go through the head
        negative: list[int] = []  # each request's negative row among the logits, -1 for none
        row = 0
        for request in requests:
            combined = request.guided and _combines(request, settings)
            positive.append(row)
            partner.append(row + 1 if combined else row)
            coefficient.append(request.guidance if combined else 1.0)
            if request.guided and not combined:
                negative.append(len(requests) + len(paired))
                paired.append(row + 1)
            else:
                negative.append(-1)
            row += len(request.rows)
        floats = partial(torch.tensor, dtype=torch.float32, device=model.device)
        ints = partial(torch.tensor, dtype=torch.int32, device=model.device)
        longs = partial(torch.tensor, dtype=torch.long, device=model.device)
        self.model = model
        self.positive = longs(positive)  # (B,)
        self.partner = longs(partner) if partner != positive else None  # (B,)
        self.coefficient = floats(coefficient)  # (B,)
        self.paired = longs(paired)  # (number of pairs,)
        self.sampling = Sampling(
            positive=torch.arange(len(requests), device=model.device),
            negative=longs(negative),
            guidance=floats([request.guidance for request in requests]),
            space=ints([SPACES.index(request.space) for request in requests]),
            alpha=floats([request.alpha for request in requests]),
            temperature=floats([request.temperature for request in requests]),
            top_k=ints([request.top_k for request in requests]),
            top_p=floats([request.top_p for request in requests]),
            seed=longs([request.seed for request in requests]),
            step=longs([len(state.completion.tokens) for state in states]),
            truncates=any(r.temperature > 0 and (r.top_k > 0 or r.top_p < 1) for r in requests),
            draws=any(request.temperature > 0 for request in requests),
            guides=len(paired) > 0,
            masks=any(request.alpha > 0 for request in requests),
        )

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states (n, C): tokens (B,), -1 if none is possible; log-probabilities (B,)."""
        states = hidden[self.positive]  # (B, C)
        if self.partner is not None:
            states = combine(states, hidden[self.partner], self.coefficient)
        if len(self.paired):
            states = torch.cat((states, hidden[self.paired]))
        return next_tokens(self.model.head(states), self.sampling)


def _combines(request: Request, settings: Settings) -> bool:
    return request.space == "log" and request.alpha == 0 and settings.log_path == "hidden"


class Batch:
    """The running requests, for as long as none joins or leaves."""

    def __init__(self, model: Llama, cache: KVCache, running: list[Running], settings: Settings):
        self.model, self.cache, self.running, self.settings = model, cache, running, settings
        self.sampler = Sampler(model, running, settings)
        owners, positions = [], []  # of each row: its request, and the position it is fed next
        for number, state in enumerate(running):
            owners += [number] * len(state.lengths)
            positions += state.lengths
        tensor = partial(torch.tensor, device=model.device)
        self.owner = tensor(owners)  # (n,)
        self.positions = tensor(positions)[:, None]  # (n, 1)
        self.tokens = tensor([state.last for state in running])  # (B,)
        wide = torch.promote_types(model.dtype, torch.float32)
        self.logprobs = torch.zeros(len(running), device=model.device, dtype=wide)  # (B,)
        set_adapters(model, [running[owner].request.adapter for owner in owners])
        self.shares = dict(model.shares)
        self.slots = self.steps = 0
        self.view = cache  # the part of the cache that attention reads
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> tuple[list[int], list[float]]:
        """Feed each request its last token; returns the next tokens and their log-probabilities."""
        self.model.shares.update(self.shares)
        self._make_room()
        if self.settings.skip:
            return self._step_skipping()
        graphs = self.settings.graphs and self.tokens.is_cuda
        if graphs and self.graph is None and self.steps >= STEADY:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._advance()
        if self.graph is None:
            self._advance()
        else:
            self.graph.replay()
        self.steps += 1
        for state in self.running:
            state.lengths = [length + 1 for length in state.lengths]
        return self.tokens.tolist(), self.logprobs.tolist()

    def _make_room(self) -> None:
        """Let attention read enough slots for this step; new shapes need a new CUDA graph."""
        needed = 0
        for state in self.running:
            longest = max(map(len, state.request.rows))
            needed = max(needed, longest + len(state.completion.tokens))
        if needed > self.slots:
            rounded_up = -(-needed // SLOT_STEP) * SLOT_STEP
            self.slots = min(rounded_up, self.cache.keys.shape[3])
            self.view = self.cache.part(len(self.owner), self.slots)
            self.graph, self.steps = None, 0

    def _advance(self) -> None:
        """One step on the device alone. Its results stay there, where the next step reads them."""
        fed = self.tokens.clamp(min=0)[self.owner][:, None]  # (n, 1)
        hidden = self.model(fed, self.positions, self.view)[:, 0]  # (n, C)
        tokens, logprobs = self.sampler(hidden)
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        self.positions.add_(1)
        self.sampler.sampling.step.add_(1)

    def _step_skipping(self) -> tuple[list[int], list[float]]:
        """One step that computes only the negative rows that can change a token.

        All positive rows are computed first. A row that is `certified` to decide the token also takes
        the place of its negative row: a pair of equal rows gives the token of the positive row. The other
        negative rows then catch up on all the tokens that they have missed.
        """
        model, running, firsts = self.model, self.running, self.sampler.positive
        tensor = partial(torch.tensor, device=model.device)
        last = tensor([state.last for state in running])[:, None]  # (B, 1)
        at = tensor([state.lengths[0] for state in running])[:, None]  # (B, 1)
        hidden = torch.zeros(
            len(self.owner), model.config.hidden_size, device=model.device, dtype=model.dtype
        )
        hidden[firsts] = self._forward(last, at, firsts)[:, 0]  # (n, C)
        guided = [number for number, state in enumerate(running) if state.request.guided]
        if guided:
            rows = firsts[guided]
            hidden[rows + 1] = hidden[rows]
            requests = [running[number].request for number in guided]
            sure = certified(model.head(hidden[rows]), requests)
            behind = []
            for number, skipped in zip(guided, sure.tolist(), strict=True):
                running[number].completion.skipped += skipped
                if not skipped:
                    behind.append(number)
            if behind:
                self._catch_up(behind, hidden)
        for state in running:
            state.lengths[0] += 1
        tokens, logprobs = self.sampler(hidden)
        self.sampler.sampling.step.add_(1)
        return tokens.tolist(), logprobs.tolist()

    def _catch_up(self, numbers: list[int], hidden: Tensor) -> None:
        """Feed the negative rows of requests `numbers` all missed tokens; set their `hidden` states."""
        device = hidden.device
        rows = self.sampler.positive[numbers] + 1
        starts, missed = [], []
        for number in numbers:
            state = self.running[number]
            known = state.lengths[1] - len(state.request.rows[1])  # tokens of the answer
            starts.append(state.lengths[1])
            missed.append(state.completion.tokens[known:])
            state.lengths[1] += len(missed[-1])
        width = max(map(len, missed))
        # Padding feeds the last token again, at its own position, which changes nothing.
        padded = [tokens + tokens[-1:] * (width - len(tokens)) for tokens in missed]
        last = torch.tensor([len(tokens) - 1 for tokens in missed], device=device)
        offsets = torch.minimum(torch.arange(width, device=device), last[:, None])  # (rows, T)
        positions = torch.tensor(starts, device=device)[:, None] + offsets
        states = self._forward(torch.tensor(padded, device=device), positions, rows)  # (rows, T, C)
        hidden[rows] = states[torch.arange(len(rows), device=device), last]

    def _forward(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of some rows alone, under their own adapters."""
        owners = self.owner[rows].tolist()
        set_adapters(self.model, [self.running[owner].request.adapter for owner in owners])
        return self.model(tokens, positions, self.cache.part(len(self.owner), self.slots, rows))


def certified(logits: Tensor, requests: list[Request]) -> Tensor:
    """Whether the positive row's logits (B, V) alone decide the token of guided requests, (B,) bool.

    This is certain, whatever the negative row says, in two cases:

    Mask: the second best token has P_pos < alpha max P_pos, so that one token alone is plausible.

    Greedy decoding in probability space, g > 0: the best token a beats every other token b by
        g (P_pos(a) - P_pos(b)) + (1 - g) (P_neg(a) - P_neg(b)) >= g lead - |g - 1|,
    because two probabilities differ by at most 1. So a lead above |g - 1| / g is enough.
    """
    tensor = partial(torch.tensor, device=logits.device)
    g = tensor([request.guidance for request in requests])
    alpha = tensor([request.alpha for request in requests])
    greedy = tensor([request.space == "prob" and request.temperature == 0 for request in requests])
    best, second = widen(logits).softmax(-1).topk(2, -1).values.unbind(-1)  # (B,) each
    needed = torch.where(g > 0, (g - 1).abs() / g, torch.inf)
    rounding = 1e-5  # more than the rounding of both probabilities
    alone = second < alpha * best
    return alone | (greedy & (best - second > needed + rounding))
