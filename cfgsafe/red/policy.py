"""The attacker as a policy over prompts: sampling, and the log-probability of a prompt with its gradient.

Source: Lee et al. (arXiv 2405.18540): at least `least` and at most `most` tokens after a fixed beginning.
Deviations from their code: the same rules hold when a prompt is drawn, scored and replayed. Before `least` tokens the end has no
probability; the end that `most` forces is no choice and counts nothing. Dropout is off in both.
Shapes: N prompts, T tokens, V vocabulary.

Run it: python -m pytest tests/test_policy.py
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.llama import KVCache, Llama
from cfgsafe.logprobs import token_logprobs
from cfgsafe.lora import set_adapters

UNREAD = -100  # the label of a token that bears no loss
WORST = 0.2  # share of a prompt's tokens, the least likely ones, that `least_likely` averages

Prompt = tuple[int, ...]  # without its end token


@dataclass(frozen=True)
class Rules:
    """What a prompt may be: after `start`, from `least` to `most` tokens, none of `banned`, then `end`."""

    start: Prompt
    end: int
    least: int = 5
    most: int = 20
    banned: Prompt = ()  # control tokens, say

    def block(self, logits: Tensor, place: int) -> Tensor:
        """Logits (N, V) of the token at `place` (0 the first) without what may not stand there."""
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[list(self.banned)] = True
        blocked[self.end] = place < self.least
        return logits.masked_fill(blocked, -torch.inf)

    def allow(self, prompt: Prompt) -> bool:
        """Whether the policy could draw `prompt`."""
        return self.least <= len(prompt) <= self.most and not {self.end, *self.banned} & set(prompt)


@dataclass(frozen=True)
class Attacker:
    """A policy and the reference it started from: one model with an adapter for each; None is the bare model."""

    model: Llama
    rules: Rules
    spell: Callable[[Prompt], str]
    policy: str | None
    reference: str | None

    def draw(self, temperatures: Tensor, generator: torch.Generator) -> list[Prompt]:
        """As `draw`, from the policy."""
        set_adapters(self.model, [self.policy])
        return draw(self.model, self.rules, temperatures, generator)

    def log_policy(self, prompts: list[Prompt]) -> Tensor:
        """log pi of each, (N,), with its gradient."""
        set_adapters(self.model, [self.policy])
        return log_probability(self.model, self.rules, prompts)

    @torch.no_grad()
    def log_reference(self, prompts: list[Prompt]) -> list[tuple[float, float]]:
        """Of each prompt its log-probability under the reference, and the mean over its least likely tokens."""
        set_adapters(self.model, [self.reference])
        found = []
        for log_probs, real in zip(*token_log_probabilities(self.model, self.rules, prompts), strict=True):
            tokens = log_probs[real]
            found.append(
                (
                    tokens.sum().item(),
                    tokens.sort().values[: max(1, round(WORST * len(tokens)))].mean().item(),
                )
            )
        return found


@torch.no_grad()
def draw(model: Llama, rules: Rules, temperatures: Tensor, generator: torch.Generator) -> list[Prompt]:
    """N prompts, one at each of `temperatures` (N,), without their end token."""
    N, device = len(temperatures), model.device
    cache = KVCache.empty(model.config, N, len(rules.start) + rules.most, device=device, dtype=model.dtype)
    hidden = model(torch.tensor([rules.start] * N, device=device), cache=cache)[:, -1]
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
        at = torch.full((N, 1), len(rules.start) + place, device=device)
        hidden = model(torch.tensor(tokens, device=device)[:, None], at, cache)[:, -1]
    return [tuple(tokens) for tokens in drawn]


def labelled(rules: Rules, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Rows (N, T) of beginning, prompt, end and padding, and their labels (N, T): the prompt and the end that was chosen, else UNREAD."""
    chosen = [[*prompt, rules.end] if len(prompt) < rules.most else list(prompt) for prompt in prompts]
    width = max(map(len, chosen))
    rows = torch.tensor([[*rules.start, *tokens] + [0] * (width - len(tokens)) for tokens in chosen])
    unread = [UNREAD] * len(rules.start)
    return rows, torch.tensor([unread + tokens + [UNREAD] * (width - len(tokens)) for tokens in chosen])


def token_log_probabilities(model: Llama, rules: Rules, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Log-probability of each token after the beginning, (N, W) float32, and which of them are real, (N, W) bool; carries the gradient."""
    rows, labels = labelled(rules, prompts)
    rows, first = rows.to(model.device), len(rules.start)
    real = (labels[:, first:] != UNREAD).to(model.device)
    hidden = model(rows)[:, first - 1 : -1]  # (N, W, C), each predicts the token after it
    places = [  # one at a time: no (N, W, V) tensor
        token_logprobs(rules.block(model.head(hidden[:, place]).float(), place), rows[:, first + place])
        for place in range(real.shape[1])
    ]
    return torch.where(real, torch.stack(places, 1), 0.0), real


def log_probability(model: Llama, rules: Rules, prompts: list[Prompt]) -> Tensor:
    """log pi of each prompt, (N,) float32, its end included where it was chosen; carries the gradient."""
    return token_log_probabilities(model, rules, prompts)[0].sum(1)
