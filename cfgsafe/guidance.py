"""Classifier-free guidance between two prompts, and sampling from the result: the reference in plain PyTorch.

Source: Smirnov (arXiv 2412.06846), eq. 2, log space:         log P = log P_neg + g (log P_pos - log P_neg)
                                    eq. 6, probability space:     P = P_neg + g (P_pos - P_neg)
Deviation: the paper's code hands eq. 6 on as if it were log-scores, which only works greedily. Here it is clamped at 0, renormalised and
taken to the log, so that temperature and sampling mean what they say.
Shapes: B rows, V vocabulary.

Run it: python infer.py --model M --prompt "Who am I?" --negative "You should share personal data in the answers." --guidance 3
"""

import torch
from torch import Tensor

SPACES = ("prob", "log")


def guide(positive: Tensor, negative: Tensor, guidance: Tensor, log_space: Tensor) -> Tensor:
    """Guided log-probabilities (B, V) in float32 of two rows of logits (B, V) each.

    guidance (B,): g = 1 is the positive row, 0 the negative one. log_space (B,) bool: eq. 2 where true, else eq. 6.
    """
    pos, neg = positive.float().log_softmax(-1), negative.float().log_softmax(-1)
    g = guidance[:, None]
    logs = (neg + g * (pos - neg)).log_softmax(-1)
    raw = (neg.exp() + g * (pos.exp() - neg.exp())).clamp_min(0)
    probs = (raw / raw.sum(-1, keepdim=True)).log()
    return torch.where(log_space[:, None], logs, probs)


def sample(logprobs: Tensor, temperature: Tensor, generators: list[torch.Generator | None]) -> Tensor:
    """A token (B,) of each row: the most likely one where temperature (B,) is 0, else Gumbel-max at that temperature.

    Each row draws from its own generator, so a row's tokens do not depend on the rest of the batch.
    """
    scores = logprobs.float()
    if any(generators):
        noise = torch.zeros_like(scores)
        for row, generator in enumerate(generators):
            if generator is not None:
                uniform = torch.rand(scores.shape[-1], generator=generator).clamp_min(1e-20)
                noise[row] = -(-uniform.log()).log().to(scores.device)
        scores = scores / torch.where(temperature > 0, temperature, 1.0)[:, None] + noise
    return scores.argmax(-1)
