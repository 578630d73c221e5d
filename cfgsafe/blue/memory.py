"""The memory of a training step, by formula, and how many blocks must be recomputed for it to fit.

Source: counted from cfgsafe.llama and cfgsafe.lora: what autograd keeps of a block whose own weights are frozen. Per token of a row, with
e bytes an activation, C hidden, F MLP, H D heads, K D kv heads, R rank:

    8 C             input of both norms, float32
    3 C e           input of q, k, v; of gate, up; of o
    4 F e           gate, silu(gate), up, and their product, the input of down
    2 (H + K) D e   queries, attention's output; keys, values
    28 R + 4 H      the adapters' inner products, the softmax's normaliser

A recomputed block keeps its input, C e, and one such block at a time is whole again. On top come two float32 tensors of the MLP's
width while a block is differentiated, or a chunk of logits. tests/test_memory.py holds it against measured peaks, within 10 %.

Run it: python -m cfgsafe.bench memory
"""

from dataclasses import dataclass

import torch

from cfgsafe.blue.batches import Pair
from cfgsafe.llama import Llama, LlamaConfig
from cfgsafe.logprobs import LOGIT_BYTES
from cfgsafe.lora import adapter_parameters
from cfgsafe.parallel import World

SPARE = 0.05  # of the GPU, for fragmentation and what the libraries take


@dataclass(frozen=True)
class Step:
    """Bytes of one training step."""

    kept: int  # activations until the backward reads them
    working: int  # what comes and goes
    adapter: int  # weights, gradients and two moments, float32

    @property
    def total(self) -> int:
        """The peak above the frozen base's weights."""
        return self.kept + self.working + self.adapter


def step_bytes(
    config: LlamaConfig,
    *,
    slots: int,
    reads: int,
    adapter: int,
    rank: int,
    activation: int,
    recomputed: int,
    logits: int = LOGIT_BYTES["cuda"],
) -> Step:
    """Memory of a step over `slots` tokens of rows, padding included, and `reads` log-probabilities.

    `adapter` is its number of parameters, `activation` the bytes of the base's dtype, `recomputed` the blocks that are.
    """
    C, F, e = config.hidden_size, config.intermediate_size, activation
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = slots * (8 * C + 3 * C * e + 4 * F * e + 2 * (H + K) * D * e + 28 * rank + 4 * H)
    whole = config.num_hidden_layers - recomputed
    kept = whole * block + recomputed * slots * C * e + (block if recomputed else 0) * (whole == 0)
    ends = slots * 8 * C + 2 * reads * C * e  # the last norm; the states the loss reads and their slopes
    return Step(kept + ends, max(8 * F * slots, logits), 16 * adapter)


def recomputed(model: Llama, pairs: list[Pair], options, world: World) -> int:
    """The blocks to recompute: as asked for, else as few as the GPU's free memory allows for the longest pairs; 0 on a CPU."""
    if options.recompute is not None or not world.device.startswith("cuda"):
        return min(options.recompute or 0, model.config.num_hidden_layers)
    free, everything = torch.cuda.mem_get_info(world.device)
    limit = torch.cuda.get_per_process_memory_fraction(
        world.device
    ) * everything - torch.cuda.memory_allocated(world.device)
    room = min(free, limit) - SPARE * everything
    rows = -(-options.batch_size // world.size)
    longest = max(
        len(pair.chosen.ids) + len(pair.rejected.ids) - (pair.rejected.start if options.share_prefix else 0)
        for pair in pairs
    )
    parameters = adapter_parameters(model).values()
    for blocks in range(model.config.num_hidden_layers + 1):
        step = step_bytes(
            model.config,
            slots=rows * longest,
            reads=rows * longest,
            adapter=sum(p.numel() for p in parameters),
            rank=max(min(p.shape) for p in parameters),
            activation=model.dtype.itemsize,
            recomputed=blocks,
        )
        if step.total <= room:
            break
    return blocks
