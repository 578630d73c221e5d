"""The attacker as a policy over prompts: sampling, and the log-probability of a prompt with its gradient.

Source: Lee et al. (arXiv 2405.18540): at least `least` and at most `most` tokens after a fixed beginning.
Deviations from their code: the same rules hold when a prompt is drawn, scored and replayed. Before `least` tokens the end has no
probability; the end that `most` forces is no choice and counts nothing. Dropout is off in both.
Shapes: N prompts, T tokens, V vocabulary.

Run it: python -m pytest tests/test_policy.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cfgsafe.llama import KVCache, Llama
from cfgsafe.logprobs import token_logprobs


@dataclass(frozen=True)
class Rules:
    """What a prompt may be: after `start`, from `least` to `most` tokens, none of `banned`, then `end`."""

    start: tuple[int, ...]
    end: int
    least: int = 5
    most: int = 20
    banned: tuple[int, ...] = ()  # control tokens, say

    def block(self, logits: Tensor, place: int) -> Tensor:
        """Logits (N, V) of the token at `place` (0 the first) without what may not stand there."""
        blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        blocked[list(self.banned)] = True
        blocked[self.end] = place < self.least
        return logits.masked_fill(blocked, -torch.inf)


@torch.no_grad()
def draw(model: Llama, rules: Rules, temperatures: Tensor, generator: torch.Generator) -> list[tuple[int, ...]]:
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


def log_probability(model: Llama, rules: Rules, prompts: list[tuple[int, ...]]) -> Tensor:
    """log pi of each prompt, (N,) float32, its end included where it was chosen; carries the gradient."""
    device = model.device
    chosen = [[*prompt, rules.end] if len(prompt) < rules.most else list(prompt) for prompt in prompts]
    width = max(map(len, chosen))
    rows = torch.tensor([[*rules.start, *tokens] + [0] * (width - len(tokens)) for tokens in chosen], device=device)
    hidden = model(rows)[:, len(rules.start) - 1 : -1]  # (N, width, C), each predicts the token after it
    real = torch.tensor([[place < len(tokens) for place in range(width)] for tokens in chosen], device=device)
    total = torch.zeros(len(prompts), device=device)
    for place in range(width):  # one place at a time: no (N, width, V) tensor
        logits = rules.block(model.head(hidden[:, place]).float(), place)
        logprob = token_logprobs(logits, rows[:, len(rules.start) + place])
        total = total + torch.where(real[:, place], logprob, 0.0)
    return total
