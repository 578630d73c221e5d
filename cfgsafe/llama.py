"""Llama-3.1 in one file: RMSNorm, grouped-query attention, llama3 RoPE, SwiGLU, KV cache.

Source: "The Llama 3 Herd of Models" (arXiv 2407.21783). Module names and the half-split RoPE layout
are those of the Hugging Face checkpoints, so that a state dict maps one to one.
Deviation: there is no padding mask. A cache slot is a position, and a query at position p sees the
slots 0..p of its own row. Right padding therefore never reaches a real token, and rows of unequal
length in one batch give what each gives alone.
Shapes: B rows, T tokens, S cache slots, H heads, K kv heads, D head dim, C hidden, V vocabulary.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "What is the capital of France?"
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfgsafe.config import LlamaConfig
from cfgsafe.products import Groups, Linear, together


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Inverse frequencies, (D/2,) float32, on the CPU.

    Scaling of type linear divides them by `factor`. Type llama3 (Llama 3.1) keeps wavelengths that
    are shorter than original / high_freq_factor, divides those longer than original /
    low_freq_factor by `factor`, and interpolates between the two.
    """
    # On the CPU, because arithmetic on the meta device imports torch._dynamo.
    even = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu")
    frequency = 1.0 / config.rope_theta ** (even.float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    wavelength = 2 * math.pi / frequency
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the half-split layout: (a, b) becomes (a cos - b sin, b cos + a sin).

    x is (B, heads, T, D), cos and sin (B, 1, T, D); the first half of `sin` has its sign changed.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class KVCache:
    """Keys and values of all layers, (layers, B, K, S, D); slot s of a row holds its position s.

    Attention multiplies slots beyond a row's length by 0, and 0 times NaN is NaN. So such a slot must hold
    finite numbers, and none of an earlier user: `copy` clears the rest of the row.
    """

    def __init__(self, keys: Tensor, values: Tensor, picked: Tensor | None = None):
        self.keys, self.values, self.picked = keys, values, picked
        self.layers = list(zip(keys.unbind(), values.unbind(), strict=True))
        rows = torch.arange(keys.shape[1], device=keys.device) if picked is None else picked
        self.rows = rows[:, None]

    @staticmethod
    def empty(config: LlamaConfig, rows: int, slots: int, *, device, dtype) -> "KVCache":
        """A cache for `rows` rows of `slots` positions, allocated at once."""
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        keys = torch.zeros(shape, device=device, dtype=dtype)
        values = torch.zeros(shape, device=device, dtype=dtype)
        return KVCache(keys, values)

    @staticmethod
    def bytes_a_slot(config: LlamaConfig, dtype: torch.dtype) -> int:
        """Bytes of one position of one row."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def part(self, rows: int | Tensor, slots: int) -> "KVCache":
        """The first `slots` of the first `rows` rows, in the same memory.

        Or of the rows whose numbers are in a tensor (n,): they are copied to be read.
        """
        if isinstance(rows, Tensor):
            return KVCache(self.keys[..., :slots, :], self.values[..., :slots, :], rows)
        return KVCache(self.keys[:, :rows, :, :slots], self.values[:, :rows, :, :slots])

    def copy(self, target: int, source: "KVCache", row: int, slots: int) -> None:
        """Set the first `slots` of row `target` to those of a row of `source`, and clear the others."""
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            mine[:, target, :, :slots] = theirs[:, row, :, :slots]
            mine[:, target, :, slots:] = 0

    def layer(self, number: int, positions: Tensor, *, alone: bool) -> "Slots":
        """The slots of one layer at `positions` (B, T) of the rows; see `Slots.write` for `alone`."""
        return Slots(*self.layers[number], self.rows, positions, self.picked, alone)


class Slots(NamedTuple):
    """Where a layer stores the keys and values of T tokens of each row."""

    keys: Tensor  # (rows of the cache, K, S, D)
    values: Tensor
    rows: Tensor  # (B, 1)
    positions: Tensor  # (B, T)
    picked: Tensor | None  # (B,), where the rows are not all of the cache's
    alone: bool

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D).

        Returns keys and values of all slots of the rows, (B, K, S, D) each; or just k and v if
        `alone`.
        """
        self.keys[self.rows, :, self.positions] = k.transpose(1, 2)
        self.values[self.rows, :, self.positions] = v.transpose(1, 2)
        if self.alone:
            return k, v
        if self.picked is None:
            return self.keys, self.values
        return self.keys[self.picked], self.values[self.picked]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Rounded before it meets the weight, as in Hugging Face's Llama.
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, slots) -> Tensor:
        """Attention of x (B, T, C) over itself, or over the keys and values of its `slots`.

        The last Q tokens attend where the float `mask` (B, 1, G Q, S) says, G = H / K; those before
        them attend to themselves and to the tokens left of them.
        """
        B, T, _ = x.shape
        heads = together(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in heads)
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, H, T, D), (B, K, T, D)
        if slots is not None:
            k, v = slots.write(k, v)  # (B, K, S, D)
        K = k.shape[1]
        G = q.shape[1] // K
        Q = 0 if mask is None else mask.shape[2] // G
        parts = []
        if T > Q:
            causal = slice(0, T - Q)
            q_, k_, v_ = q[:, :, causal], k[:, :, causal], v[:, :, causal]
            out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
            parts.append(out)
        if Q:  # the G query heads of a kv head side by side: keys and values are not copied for each
            q_ = q[:, :, T - Q :].reshape(B, K, G * Q, -1)
            out = F.scaled_dot_product_attention(q_, k, v, attn_mask=mask)
            parts.append(out.view(B, K * G, Q, -1))
        out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = together(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, slots) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, slots)
        return x + self.mlp(self.post_attention_layernorm(x))

    def groups(self) -> Groups:
        """See `Llama.groups`."""
        attention, mlp = self.self_attn, self.mlp
        return [
            [attention.q_proj.base, attention.k_proj.base, attention.v_proj.base],
            [attention.o_proj.base],
            [mlp.gate_proj.base, mlp.up_proj.base],
            [mlp.down_proj.base],
        ]


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        # As nn.Embedding does, which on the meta device imports torch._dynamo.
        drawn = torch.randn(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(drawn, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama-3.1 language model; `forward` gives hidden states, `head` turns them into logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.shares: dict[str, float | Tensor] = {}  # adapter -> its share in each row (cfgsafe.lora)
        self.recomputed = 0  # blocks whose activations the backward computes again
        self.compiled: Callable[..., Tensor] | None = None  # `_blocks`, for steps of decoding
        self.frequencies: Tensor
        frequencies = rope_frequencies(config).to(self.lm_head.weight.device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of tokens (B, T) at positions (B, T), by default 0..T-1.

        A token attends to itself and to the tokens left of it. Two arguments change that:
        `positions` with a `cache`: it attends to all that the cache holds up to its position.
        `mask` (B, 1, Q, T), bool: the last Q tokens attend to the tokens that are True.
        Keys and values are stored in the cache, if there is one.
        """
        fresh = positions is None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        angles = (positions[..., None].float() * self.frequencies)[:, None]  # (B, 1, T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        rope = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        if cache is not None and not fresh:
            every = torch.arange(cache.keys.shape[3], device=tokens.device)
            mask = (every <= positions[..., None])[:, None]  # (B, 1, T, S)
        if mask is not None:  # added to the scores of the G query heads of a kv head
            G = self.config.num_attention_heads // self.config.num_key_value_heads
            mask = mask.repeat(1, 1, G, 1)
            scores = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            mask = scores.masked_fill_(~mask, -math.inf)
        slots: list[Slots | None] = [None] * len(self.model.layers)
        if cache is not None:
            slots = [cache.layer(number, positions, alone=fresh) for number in range(len(slots))]
        blocks = self._blocks
        if self.compiled is not None and tokens.shape[1] == 1:
            blocks = self.compiled
        return blocks(x, rope, mask, slots)

    def _blocks(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, slots: Sequence) -> Tensor:
        """All blocks and the last norm, on x (B, T, C)."""
        for number, block in enumerate(self.model.layers):
            if number < self.recomputed and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, slots[number], use_reentrant=False)
            else:
                x = block(x, rope, mask, slots[number])
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return self.lm_head(hidden)

    def compile_steps(self) -> None:
        """Let torch.compile fuse what lies between the products of a decoding step, for each new shape."""
        self.compiled = torch.compile(self._blocks)

    def groups(self) -> Groups:
        """The linear layers without their adapters; those that read the same input are one group."""
        found = []
        for block in self.model.layers:
            assert isinstance(block, Block)
            found += block.groups()
        return [*found, [self.lm_head.base]]

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a `Llama`, a tied one once; told from a model of one layer."""
    with torch.device("meta"):
        small = Llama(replace(config, num_hidden_layers=1))
    first, shapes = "model.layers.0.", {}
    for name, parameter in small.named_parameters():
        if not name.startswith(first):
            shapes[name] = tuple(parameter.shape)
            continue
        for number in range(config.num_hidden_layers):
            shapes[f"model.layers.{number}.{name.removeprefix(first)}"] = tuple(parameter.shape)
    return shapes
