"""The memory of a training step, by formula, and how many blocks to recompute so that it fits.

Source: counted from cfgsafe.llama and cfgsafe.lora: what autograd keeps of a block with frozen
weights. In bytes per token, with e bytes per activation, hidden size C, MLP size F, H heads and K kv
heads of dimension D, and rank R:

    8 C             input of both norms, float32
    3 C e           input of q, k, v; of gate, up; of o
    4 F e           gate, silu(gate), up, and their product, the input of down
    2 (H + K) D e   queries and attention's output; keys and values
    28 R            inner products of the adapters
    4 H             normaliser of the softmax

A recomputed block keeps only its input, C e; the backward restores one such block at a time. While a
block is differentiated, two float32 tensors of the MLP's width exist, or one chunk of logits.
tests/test_memory.py compares the formula with measured peaks; they agree within 10 %.

Run it: python -m cfgsafe.bench memory
"""

from dataclasses import dataclass

import torch
from torch import nn

from cfgsafe.blue.batches import Pair
from cfgsafe.blue.options import Options
from cfgsafe.llama import Llama, LlamaConfig
from cfgsafe.logprobs import LOGIT_BYTES
from cfgsafe.lora import adapter_parameters
from cfgsafe.parallel import World

SPARE = 0.05  # fraction of the GPU left for fragmentation and libraries


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step."""

    kept: int  # activations, from the forward until the backward reads them
    working: int  # temporary tensors
    adapter: int  # weights, gradients and two moments, float32

    @property
    def total(self) -> int:
        """The peak above the weights of the frozen base model."""
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
) -> StepMemory:
    """Memory of a step over `slots` tokens, padding included, that reads `reads` log-probabilities.

    adapter     number of trained parameters
    activation  bytes of one activation, 2 in bfloat16
    recomputed  number of blocks to recompute; these are the first ones
    logits      bytes of a chunk of logits
    """
    C, F, e = config.hidden_size, config.intermediate_size, activation
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    token_bytes = 8 * C + 3 * C * e + 4 * F * e + 2 * (H + K) * D * e + 28 * rank + 4 * H
    block_bytes = slots * token_bytes
    input_bytes = slots * C * e
    whole = config.num_hidden_layers - recomputed
    # Blocks that are kept whole come last, so the backward has freed them before it restores a
    # recomputed block. A restored block adds to the peak only if no block is kept whole.
    restored = 1 if recomputed and not whole else 0
    blocks_bytes = (whole + restored) * block_bytes + recomputed * input_bytes
    norm_bytes = slots * 8 * C  # the last norm
    head_bytes = 2 * reads * C * e  # the hidden states that the loss reads, and their slopes
    mlp_bytes = 2 * 4 * F * slots
    return StepMemory(
        kept=blocks_bytes + norm_bytes + head_bytes,
        working=max(mlp_bytes, logits),
        adapter=4 * 4 * adapter,  # four float32 numbers a parameter
    )


def recomputed(model: Llama, pairs: list[Pair], options: Options, world: World) -> int:
    """How many blocks to recompute: --recompute, or as few as the GPU's free memory allows; 0 on a CPU."""
    longest = 0  # tokens of a pair
    for pair in pairs:
        shared = pair.rejected.start if options.share_prefix else 0
        longest = max(longest, pair.tokens - shared)
    slots = longest * -(-options.batch_size // world.size)  # pairs of one process, rounded up
    return blocks_to_recompute(
        model, slots, list(adapter_parameters(model).values()), options.recompute, world
    )


def blocks_to_recompute(
    model: Llama, slots: int, parameters: list[nn.Parameter], wanted: int | None, world: World
) -> int:
    """The same for a stage's largest batch, of `slots` tokens, and its adapter; `wanted` is --recompute."""
    layers = model.config.num_hidden_layers
    if wanted is not None:
        return min(wanted, layers)
    if not world.device.startswith("cuda"):
        return 0
    free, everything = torch.cuda.mem_get_info(world.device)
    limit = torch.cuda.get_per_process_memory_fraction(world.device) * everything
    unused = limit - torch.cuda.memory_allocated(world.device)
    room = min(free, unused) - SPARE * everything
    for blocks in range(layers):
        step = step_bytes(
            model.config,
            slots=slots,
            reads=slots,
            adapter=sum(parameter.numel() for parameter in parameters),
            rank=max(min(parameter.shape) for parameter in parameters),
            activation=model.dtype.itemsize,
            recomputed=blocks,
        )
        if step.total <= room:
            return blocks
    return layers
