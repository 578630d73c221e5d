"""The tensors of a decoding batch: rows of the KV cache, the tokens fed to them, the tokens that come out.

Source: static shapes and CUDA graphs after gpt-fast; skipping negative rows is ours, see `certified`.
A step changes nothing but the batch itself and slots of the cache that are not in use yet. So after one
that failed, a new batch of the same requests, or of some of them, computes the same tokens.
Shapes: B requests, n rows, T tokens, C hidden, V vocabulary.

Run it: python -m cfgsafe.bench decode
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cfgsafe.guidance import SPACES, combine, head_tokens
from cfgsafe.kernels.reference import Sampling, widen
from cfgsafe.llama import KVCache, Llama
from cfgsafe.lora import set_adapters
from cfgsafe.request import Request, Running

SLOT_STEP = 64  # attention reads a multiple of these, so that shapes stay the same for a while
STEADY = 4  # steps without a change of the batch before it is captured as a CUDA graph
LEAST_TEMPERATURE = 1e-30  # up to here, scores divided by it could overflow: greedy
# Next token of each request, negative ones as in kernels/reference.py; its log-probability, or None as in
# request.Completion.
Results = tuple[list[int], list[float | None]]


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

    places[b] are the numbers of request b's rows among the n. An adapter can sit on the head, so the rows
    that reach it have the adapters of their requests, too.
    """

    def __init__(self, model: Llama, states: list[Running], places: list[list[int]], settings: Settings):
        requests = [state.request for state in states]
        positive: list[int] = []  # each request's positive row
        partner: list[int] = []  # the row to combine it with, or the same row: no change
        coefficient: list[float] = []  # the g of that combination
        paired: list[int] = []  # negative rows that go through the head
        negative: list[int] = []  # each request's negative row among the logits, -1 for none
        adapters = [request.adapter for request in requests]  # of each row that goes through the head
        for request, rows in zip(requests, places, strict=True):
            combined = request.guided and _combines(request, settings)
            positive.append(rows[0])
            partner.append(rows[-1] if combined else rows[0])
            coefficient.append(request.guidance if combined else 1.0)
            if request.guided and not combined:
                negative.append(len(requests) + len(paired))
                paired.append(rows[1])
                adapters.append(request.adapter)
            else:
                negative.append(-1)
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
            temperature=F.threshold(
                floats([request.temperature for request in requests]), LEAST_TEMPERATURE, 0.0
            ),
            top_k=ints([request.top_k for request in requests]),
            top_p=floats([request.top_p for request in requests]),
            seed=longs([request.seed for request in requests]),
            step=longs([len(state.completion.tokens) for state in states]),
            truncates=any(r.temperature > 0 and (r.top_k > 0 or r.top_p < 1) for r in requests),
            draws=any(request.temperature > 0 for request in requests),
            guides=len(paired) > 0,
            masks=any(request.alpha > 0 for request in requests),
        )
        set_adapters(model, adapters)
        self.shares = dict(model.shares)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """From hidden states (n, C): tokens and log-probabilities (B,), as `head_tokens` gives them."""
        states = hidden[self.positive]  # (B, C)
        if self.partner is not None:
            states = combine(states, hidden[self.partner], self.coefficient)
        if len(self.paired):
            states = torch.cat((states, hidden[self.paired]))
        self.model.shares.update(self.shares)
        return head_tokens(self.model, states, self.sampling)


def _combines(request: Request, settings: Settings) -> bool:
    return request.space == "log" and request.alpha == 0 and settings.log_path == "hidden"


class Batch:
    """Some running requests, for as long as none joins or leaves.

    Its rows have the order of the cache. They are read where they lie if they are the first rows of the
    cache, and are copied to be read if not.
    """

    def __init__(self, model: Llama, cache: KVCache, running: list[Running], settings: Settings):
        self.model, self.cache, self.running, self.settings = model, cache, running, settings
        places: list[list[int]] = []  # of each request: the numbers of its rows in this batch
        rows = sorted(row for state in running for row in state.rows)
        number_of = {row: number for number, row in enumerate(rows)}
        owners, positions = [0] * len(rows), [0] * len(rows)  # of each row: its request, where it is fed next
        for owner, state in enumerate(running):
            places.append([number_of[row] for row in state.rows])
            for number, position in zip(places[-1], state.positions, strict=True):
                owners[number], positions[number] = owner, position
        tensor = partial(torch.tensor, device=model.device)
        self.places = places
        self.sampler = Sampler(model, running, places, settings)
        self.rows = tensor(rows)  # (n,)
        self.gapless = rows == list(range(len(rows)))
        self.owner = tensor(owners)  # (n,)
        self.positions = tensor(positions)[:, None]  # (n, 1)
        self.tokens = tensor([state.completion.tokens[-1] for state in running])  # (B,)
        wide = torch.promote_types(model.dtype, torch.float32)
        self.logprobs = torch.zeros(len(running), device=model.device, dtype=wide)  # (B,)
        set_adapters(model, [running[owner].request.adapter for owner in owners])
        self.shares = dict(model.shares)
        self.slots = self.steps = 0
        self.view = cache  # the part of the cache that attention reads
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> Results:
        """Feed each request its last token; returns the next tokens and their log-probabilities."""
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
            self.view = self.cache.part(len(self.rows) if self.gapless else self.rows, self.slots)
            self.graph, self.steps = None, 0

    def _advance(self) -> None:
        """One step on the device alone. Its results stay there, where the next step reads them."""
        self.model.shares.update(self.shares)
        fed = self.tokens.clamp(min=0)[self.owner][:, None]  # (n, 1)
        hidden = self.model(fed, self.positions, self.view)[:, 0]  # (n, C)
        tokens, logprobs = self.sampler(hidden)
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        self.positions.add_(1)
        self.sampler.sampling.step.add_(1)

    def _step_skipping(self) -> Results:
        """One step that computes only the negative rows that can change a token.

        All positive rows are computed first. A row that is `certified` to decide the token also takes
        the place of its negative row: a pair of equal rows gives the token of the positive row, but not its
        guided log-probability. The other negative rows then catch up on all the tokens that they have missed.
        """
        model, running = self.model, self.running
        hidden = torch.zeros(len(self.rows), model.config.hidden_size, device=model.device, dtype=model.dtype)
        self._feed(list(range(len(running))), 0, hidden)
        guided = [number for number, state in enumerate(running) if state.request.guided]
        skipped: set[int] = set()
        if guided:
            sides = torch.tensor(
                [self.places[number] for number in guided], device=model.device
            )  # (pairs, 2)
            requests = [running[number].request for number in guided]
            hidden[sides[:, 1]] = hidden[sides[:, 0]]
            set_adapters(model, [request.adapter for request in requests])
            sure = certified(model.head(hidden[sides[:, 0]]), requests).tolist()
            skipped = {number for number, certain in zip(guided, sure, strict=True) if certain}
            behind = [number for number in guided if number not in skipped]
            if behind:
                self._feed(behind, 1, hidden)
        tokens, logprobs = self.sampler(hidden)
        self.sampler.sampling.step.add_(1)
        known: list[float | None] = logprobs.tolist()
        for number in skipped:
            known[number] = None
        return tokens.tolist(), known

    def _feed(self, numbers: list[int], side: int, hidden: Tensor) -> None:
        """Feed one side of requests `numbers` all tokens that it lacks; sets its `hidden` states."""
        fed, ends, places = [], [], []
        for number in numbers:
            state = self.running[number]
            fed.append(state.missed if side else state.completion.tokens[-1:])
            ends.append(state.positions[side])
            places.append(self.places[number][side])
        tensor = partial(torch.tensor, device=hidden.device)
        width = max(map(len, fed))
        # Padding feeds the last token again, at its own position, which changes nothing.
        padded = [tokens + tokens[-1:] * (width - len(tokens)) for tokens in fed]
        last = tensor([len(tokens) - 1 for tokens in fed])  # (rows,)
        before = (last[:, None] - torch.arange(width, device=hidden.device)).clamp(min=0)  # (rows, T)
        set_adapters(self.model, [self.running[number].request.adapter for number in numbers])
        view = self.cache.part(self.rows[places], self.slots)
        states = self.model(tensor(padded), tensor(ends)[:, None] - before, view)  # (rows, T, C)
        hidden[places] = states[torch.arange(len(last), device=hidden.device), last]


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
