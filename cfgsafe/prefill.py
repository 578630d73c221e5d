"""Computes prompts into the KV cache, apart from the decoding steps; a shared beginning only once.

Source: ours. It is exact: the keys and values of a token depend on the tokens up to it alone.
Shapes: n prompts, T tokens, C hidden.

Run it: python -m cfgsafe.bench decode
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.llama import KVCache, Llama
from cfgsafe.lockstep import Results, Sampler, Settings
from cfgsafe.lora import set_adapters
from cfgsafe.request import Running

PREFILL_TOKENS = 8192  # most tokens of one forward, padding included
PREFIX_LEAST = 16  # fewest shared tokens that are computed once for several prompts
PREFIXES = 8  # prefixes beyond this number are dropped, the oldest first, unless a prompt uses them now
Key = tuple[str | int | None, ...]  # adapter, side of the pair, first PREFIX_LEAST tokens


@dataclass(frozen=True)
class Prompt:
    """One row to fill."""

    adapter: str | None
    side: int  # 0: the positive row of its request, 1: the negative one
    ids: list[int]

    @property
    def key(self) -> Key:
        """Equal for the prompts that may share a prefix."""
        return (self.adapter, self.side, *self.ids[:PREFIX_LEAST])


@dataclass(frozen=True)
class Prefix:
    """A beginning that several prompts share, and its keys and values."""

    ids: list[int]
    cache: KVCache

    def begins(self, prompt: Prompt) -> bool:
        """Whether the prompt starts with this prefix and is longer."""
        return len(prompt.ids) > len(self.ids) and prompt.ids[: len(self.ids)] == self.ids


class Prefill:
    """Fills the rows of joining requests; keeps the beginnings that prompts share for later ones."""

    def __init__(self, model: Llama, cache: KVCache, settings: Settings):
        self.model, self.cache, self.settings = model, cache, settings
        self.prefixes: dict[Key, Prefix] = {}
        self.computed = 0  # tokens, without padding

    def __call__(self, states: list[Running]) -> Results:
        """Fill the rows of `states`; returns their first tokens and the log-probabilities."""
        model = self.model
        prompts: list[Prompt] = []
        targets: list[int] = []  # of each prompt: its row of the cache
        places: list[list[int]] = []  # of each request: the numbers of its prompts
        for state in states:
            places.append([])
            for side, ids in enumerate(state.request.rows):
                places[-1].append(len(prompts))
                prompts.append(Prompt(state.request.adapter, side, list(ids)))
            targets += state.rows
        self._compute_prefixes(prompts)
        groups: dict[Key | None, list[int]] = {}  # the prompts that start from the same prefix
        for number, prompt in enumerate(prompts):
            prefix = self.prefixes.get(prompt.key)
            key = prompt.key if prefix and prefix.begins(prompt) else None
            groups.setdefault(key, []).append(number)
        self._forget_prefixes(set(groups))
        shape = (len(prompts), model.config.hidden_size)
        hidden = torch.empty(shape, device=model.device, dtype=model.dtype)
        for key, numbers in groups.items():
            prefix = None if key is None else self.prefixes[key]
            shared = 0 if prefix is None else len(prefix.ids)
            while numbers:
                width = max(len(prompts[number].ids) for number in numbers) - shared
                count = max(1, PREFILL_TOKENS // width)
                some, numbers = numbers[:count], numbers[count:]
                rows = [targets[number] for number in some]
                hidden[some] = self._fill([prompts[number] for number in some], rows, prefix)
        tokens, logprobs = Sampler(model, states, places, self.settings)(hidden)
        return tokens.tolist(), logprobs.tolist()

    def _fill(self, prompts: list[Prompt], targets: list[int], prefix: Prefix | None) -> Tensor:
        """Compute prompts after their prefix into rows `targets`; returns last hidden states (rows, C)."""
        model, device, n = self.model, self.model.device, len(prompts)
        p = 0 if prefix is None else len(prefix.ids)
        rest = [prompt.ids[p:] for prompt in prompts]
        lengths = [len(ids) for ids in rest]
        width = max(lengths)
        self.computed += sum(lengths)
        padded = [ids + [0] * (width - len(ids)) for ids in rest]
        tokens = torch.tensor(padded, device=device)  # (rows, T)
        scratch = KVCache.empty(model.config, n, p + width, device=device, dtype=model.dtype)
        positions = None
        if prefix is not None:
            for row in range(n):
                scratch.copy(row, prefix.cache, 0, p)
            positions = torch.arange(p, p + width, device=device).expand_as(tokens)
        set_adapters(model, [prompt.adapter for prompt in prompts])
        hidden = model(tokens, positions, scratch)  # (rows, T, C)
        for row, (target, length) in enumerate(zip(targets, lengths, strict=True)):
            self.cache.copy(target, scratch, row, p + length)
        last = torch.tensor(lengths, device=device) - 1
        return hidden[torch.arange(n, device=device), last]

    def _compute_prefixes(self, prompts: list[Prompt]) -> None:
        """Compute and keep the beginnings that several of the prompts share."""
        model = self.model
        together: dict[Key, list[Prompt]] = {}
        for prompt in prompts:
            together.setdefault(prompt.key, []).append(prompt)
        for key, group in together.items():
            every = [prompt.ids for prompt in group]
            most = min(map(len, every)) - 1  # a prompt's last hidden state is needed
            shared = list(os.path.commonprefix(every))[:most]
            known = self.prefixes.get(key)
            serves = known is not None and shared[: len(known.ids)] == known.ids
            if serves or len(group) == 1 or len(shared) < PREFIX_LEAST:
                continue
            size = len(shared)
            cache = KVCache.empty(model.config, 1, size, device=model.device, dtype=model.dtype)
            set_adapters(model, [group[0].adapter])
            model(torch.tensor([shared], device=model.device), cache=cache)
            self.computed += size
            self.prefixes[key] = Prefix(shared, cache)

    def _forget_prefixes(self, used: set[Key | None]) -> None:
        """Drop the oldest prefixes that no prompt uses now, until PREFIXES are left."""
        unused = [key for key in self.prefixes if key not in used]
        for key in unused[: max(0, len(self.prefixes) - PREFIXES)]:
            del self.prefixes[key]
