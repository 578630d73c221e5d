"""Log-probabilities of tokens under the output head, without a (tokens x vocabulary) tensor.

Source: ours. The loss reaches a hidden state h only through the log-probability of its own token y,
and with a frozen head W
    d log p(y) / d h = W[y] - softmax(W h) W,
a row of C numbers. So the forward stores these rows instead of the logits, and the backward only
scales them. This is exact, and the logits are computed once, a chunk at a time.
Deviation: the losses of Liger and TRL keep the logits or recompute them.
Shapes: N tokens, C hidden, V vocabulary.

Run it: python -m cfgsafe.bench orpo
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfgsafe.kernels.reference import widen
from cfgsafe.llama import Llama

# Memory of a chunk of logits and its copies: small enough for a CPU's cache, large enough for a GPU.
LOGIT_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
COPY_BYTES = 8  # of a logit in bfloat16, the same in float32, and its probability in bfloat16


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` (...) under `logits` (..., V), at least in float32."""
    flat = widen(logits).flatten(0, -2)
    return -F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)


def head_logprobs(model: Llama, hidden: Tensor, targets: Tensor, logit_bytes: int | None = None) -> Tensor:
    """log p of `targets` (N,) at final hidden states `hidden` (N, C), (N,) float32.

    At most `logit_bytes` of logits exist at a time. A head that is trained or has an adapter also
    gets gradients: its chunks are then recomputed in the backward.
    """
    head = model.lm_head
    logit_bytes = logit_bytes or LOGIT_BYTES.get(hidden.device.type, LOGIT_BYTES["cuda"])
    rows = max(1, logit_bytes // (COPY_BYTES * model.config.vocab_size))
    if isinstance(head, nn.Linear) and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden, head.weight, targets, rows)

    def score(h: Tensor, y: Tensor) -> Tensor:
        return token_logprobs(model.head(h), y)

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in parts])


class _FrozenHead(torch.autograd.Function):
    """log p of targets (N,) under hidden (N, C) @ weight (V, C).T, `rows` of them at a time."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, C), d log p / d h
        parts = []
        for start in range(0, len(targets), rows):
            h, y = hidden[start : start + rows], targets[start : start + rows]
            z = widen(h @ weight.T)  # (rows, V)
            z -= z.amax(1, keepdim=True)
            at_target = z.gather(1, y[:, None])[:, 0]
            total = z.exp_().sum(1)
            parts.append(at_target - total.log())
            if slopes is not None:
                p = z.div_(total[:, None]).to(weight.dtype)
                slopes[start : start + rows] = weight[y] - p @ weight
                del p
            del z  # before the next chunk comes
        ctx.save_for_backward(slopes)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None
