"""The divergence of a model from a teacher, token by token, without a (tokens x vocabulary) tensor.

Source: distillation by forward KL, Hinton et al. (arXiv 1503.02531). For a token with the teacher's
probabilities P and the student's Q = softmax(W h),
    KL(P || Q) = sum_v P_v (log P_v - log Q_v),        d KL / d h = (Q - P) W,
a row of C numbers, because the teacher is fixed. With a frozen head W the forward stores these rows, as
cfgsafe/logprobs.py does for a single target, and the backward only scales them. This is exact, and both
distributions exist a chunk at a time, in float32.
Prior art: adapters distilled from guidance, for images (arXiv 2503.07274); Divergence Decoding (arXiv
2605.31293), the nearest for text.
Shapes: N tokens, C hidden, V vocabulary.

Run it: python train.py distil --help
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfgsafe.kernels.reference import log_probabilities
from cfgsafe.llama import Llama
from cfgsafe.logprobs import LOGIT_BYTES
from cfgsafe.lora import set_adapters

COPY_BYTES = 64  # of a word of the vocabulary: both rows of the teacher, their mixture, and the student
Teacher = Callable[[slice], Tensor]  # log-probabilities (n, V) of the n tokens of a slice


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of each row, from log-probabilities (n, V); a word with P = 0 counts nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(1)


def head_divergence(
    model: Llama, adapter: str, hidden: Tensor, teacher: Teacher, logit_bytes: int | None = None
) -> Tensor:
    """KL(teacher || student) of N tokens, (N,) float32; the student has final hidden states `hidden` (N, C).

    `adapter` is the student's, and is set when this returns. A head that carries adapters gets gradients too:
    its chunks are then computed again in the backward.
    """
    head = model.lm_head
    logit_bytes = logit_bytes or LOGIT_BYTES.get(hidden.device.type, LOGIT_BYTES["cuda"])
    rows = max(1, logit_bytes // (COPY_BYTES * model.config.vocab_size))
    if isinstance(head, nn.Linear) and not head.weight.requires_grad:
        found = _FrozenHead.apply(hidden, head.weight, teacher, rows)
        set_adapters(model, [adapter])
        return found

    def score(h: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            log_p = teacher(part)
        set_adapters(model, [adapter])
        return divergence(log_p, log_probabilities(model.head(h)))

    parts = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
    return torch.cat([checkpoint(score, hidden[part], part, use_reentrant=False) for part in parts])


class _FrozenHead(torch.autograd.Function):
    """KL(teacher || softmax(hidden @ weight.T)), hidden (N, C), weight (V, C), `rows` tokens at a time."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, teacher: Teacher, rows: int) -> Tensor:
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, C), d KL / d h
        found = []
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            log_p = teacher(part)  # (rows, V)
            log_q = log_probabilities(hidden[part] @ weight.T)
            found.append(divergence(log_p, log_q))
            if slopes is not None:
                slopes[part] = (log_q.exp_() - log_p.exp_()).to(weight.dtype) @ weight
            del log_p, log_q  # before the next chunk comes
        ctx.save_for_backward(slopes)
        return torch.cat(found)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (slopes,) = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None
