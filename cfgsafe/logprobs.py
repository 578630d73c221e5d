"""Log-probabilities of tokens under the output head, without a (tokens x vocabulary) tensor.

The loss reaches a hidden state h only through the log-probability of its own token y, and with a frozen head W
    d log p(y) / d h = W[y] - softmax(W h) W,
a row of C numbers. So the forward stores these rows instead of the logits, and the backward only scales them: exact, and the
logits are computed once, a chunk at a time. (Liger's and TRL's losses keep or recompute them.)

Run it: python -m cfgsafe.bench orpo
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfgsafe.llama import Llama

LOGIT_BYTES = {
    "cpu": 128 * 2**20,
    "cuda": 512 * 2**20,
}  # what a chunk of logits and its copies may take: cache on a CPU, bandwidth on a GPU
COPY_BYTES = 8  # a logit in the base's dtype, in float32, and its probability in the base's dtype


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` (...) under `logits` (..., V), at least in float32."""
    return -F.cross_entropy(_wide(logits).flatten(0, -2), targets.flatten(), reduction="none").view_as(
        targets
    )


def head_logprobs(model: Llama, hidden: Tensor, targets: Tensor, logit_bytes: int | None = None) -> Tensor:
    """log p of `targets` (N,) at final hidden states `hidden` (N, C), (N,) float32; at most `logit_bytes` of logits exist at a time.

    A head that is trained, as one with an adapter is, gets its gradients too: its chunks are recomputed in the backward.
    """
    head = model.lm_head
    logit_bytes = logit_bytes or LOGIT_BYTES.get(hidden.device.type, LOGIT_BYTES["cuda"])
    rows = max(1, logit_bytes // (COPY_BYTES * model.config.vocab_size))
    if isinstance(head, nn.Linear) and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden, head.weight, targets, rows)
    score = lambda h, y: token_logprobs(model.head(h), y)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in parts])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # d log p / d h
        parts = []
        for start in range(0, len(targets), rows):
            h, y = hidden[start : start + rows], targets[start : start + rows]
            z = _wide(h @ weight.T)
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
