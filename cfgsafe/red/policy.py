"""The attacker as a policy over prompts: drawing them, and their log-probability with its gradient.

Source: Lee et al. (arXiv 2405.18540): from `least` to `most` tokens after a fixed beginning.
Deviations from their code: the same rules hold when a prompt is drawn, scored and replayed. Before
`least` tokens the end token has probability 0. After `most` tokens the prompt ends by itself: there
is no end token to draw, so none counts in the log-probability. Dropout is always off.
Shapes: N prompts, T tokens, W tokens after the beginning, V vocabulary, C hidden.

Run it: python -m pytest tests/test_policy.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cfgsafe.llama import KVCache, Llama
from cfgsafe.logprobs import token_logprobs
from cfgsafe.lora import adapter_parameters, set_adapters

UNREAD = -100  # label of a token that bears no loss
WORST = 0.2  # share of the tokens of a prompt that `least_likely` averages

Prompt = tuple[int, ...]  # tokens, without the end token


@dataclass(frozen=True)
class Rules:
    """A prompt is `start`, then `least` to `most` tokens, none of them `banned`, then `end`."""

    start: Prompt
    end: int
    least: int = 5
    most: int = 20
    banned: Prompt = ()  # control tokens, for example

    def block(self, logits: Tensor, place: int) -> Tensor:
        """Logits (N, V) of token number `place`, from 0, with -inf for the tokens not allowed there."""
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[list(self.banned)] = True
        blocked[self.end] = place < self.least
        return logits.masked_fill(blocked, -torch.inf)

    def allow(self, prompt: Prompt) -> bool:
        """Whether the policy could draw `prompt`."""
        return self.least <= len(prompt) <= self.most and not {self.end, *self.banned} & set(prompt)


class Fluency(NamedTuple):
    """How likely the reference finds a prompt."""

    log_reference: float  # sum of the log-probabilities of its tokens, drawn end included
    least_likely: float  # mean of the lowest WORST of them, at least one


@dataclass(frozen=True)
class Attacker:
    """A policy and the reference that it started from: adapters of one model, None for none."""

    model: Llama
    rules: Rules
    decode: Callable[[Prompt], str]  # tokens -> the text that the target reads
    policy: str | None
    reference: str | None

    def parameters(self) -> dict[str, Tensor]:
        """The weights of the policy's adapter by name; none where the policy is the bare model."""
        return {} if self.policy is None else {**adapter_parameters(self.model, self.policy)}

    def draw(self, temperatures: Tensor, generator: torch.Generator) -> list[Prompt]:
        """Draw prompts from the policy, as the function `draw` does."""
        set_adapters(self.model, [self.policy])
        return draw(self.model, self.rules, temperatures, generator)

    def log_policy(self, prompts: list[Prompt]) -> Tensor:
        """log pi of each prompt, (N,), with its gradient."""
        set_adapters(self.model, [self.policy])
        return log_probability(self.model, self.rules, prompts)

    @torch.no_grad()
    def fluency(self, prompts: list[Prompt]) -> list[Fluency]:
        """How likely the reference finds each prompt."""
        set_adapters(self.model, [self.reference])
        found = []
        rows = zip(*token_log_probabilities(self.model, self.rules, prompts), strict=True)
        for log_probs, real in rows:
            tokens = log_probs[real]
            worst = tokens.sort().values[: max(1, round(WORST * len(tokens)))]
            found.append(Fluency(tokens.sum().item(), worst.mean().item()))
        return found


@torch.no_grad()
def draw(model: Llama, rules: Rules, temperatures: Tensor, generator: torch.Generator) -> list[Prompt]:
    """Draw N prompts, one at each of `temperatures` (N,)."""
    N, device = len(temperatures), model.device
    cache = KVCache.empty(model.config, N, len(rules.start) + rules.most, device=device, dtype=model.dtype)
    hidden = model(torch.tensor([rules.start] * N, device=device), cache=cache)[:, -1]  # (N, C)
    drawn: list[list[int]] = [[] for _ in range(N)]
    alive = [True] * N
    for place in range(rules.most):
        logits = rules.block(model.head(hidden).float(), place) / temperatures.to(device)[:, None]
        tokens = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].tolist()
        for row, token in enumerate(tokens):
            alive[row] = alive[row] and token != rules.end
            if alive[row]:
                drawn[row].append(token)
        if place + 1 == rules.most or not any(alive):
            break
        positions = torch.full((N, 1), len(rules.start) + place, device=device)
        hidden = model(torch.tensor(tokens, device=device)[:, None], positions, cache)[:, -1]
    return [tuple(tokens) for tokens in drawn]


def labelled(rules: Rules, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) of beginning, prompt, end and padding, and their labels (N, T).

    Labels are prompt and end token, else UNREAD. A prompt of `most` tokens or more has no end token.
    """
    drawn = [(*prompt, rules.end) if len(prompt) < rules.most else prompt for prompt in prompts]
    width = max(map(len, drawn))
    rows, labels = [], []
    for tokens in drawn:
        padding = width - len(tokens)
        rows.append([*rules.start, *tokens] + [0] * padding)
        labels.append([UNREAD] * len(rules.start) + [*tokens] + [UNREAD] * padding)
    return torch.tensor(rows), torch.tensor(labels)


def token_log_probabilities(model: Llama, rules: Rules, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, W) float32 of the tokens after the beginning, with their gradient.

    The second tensor, (N, W) bool, says which tokens are real, not padding; the others have 0.
    """
    rows, labels = labelled(rules, prompts)
    rows, first = rows.to(model.device), len(rules.start)
    real = (labels[:, first:] != UNREAD).to(model.device)
    hidden = model(rows)[:, first - 1 : -1]  # (N, W, C); each predicts the token after it
    log_probs = []
    for place in range(real.shape[1]):  # one place at a time, so that no (N, W, V) tensor exists
        logits = rules.block(model.head(hidden[:, place]).float(), place)
        log_probs.append(token_logprobs(logits, rows[:, first + place]))
    return torch.where(real, torch.stack(log_probs, 1), 0.0), real


def log_probability(model: Llama, rules: Rules, prompts: list[Prompt]) -> Tensor:
    """log pi of each prompt, (N,) float32, with its gradient; a drawn end token is included."""
    return token_log_probabilities(model, rules, prompts)[0].sum(1)
