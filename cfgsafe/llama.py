"""Llama-3.1 in one file: RMSNorm, grouped-query attention, RoPE with llama3 scaling, SwiGLU, KV cache.

Source: "The Llama 3 Herd of Models" (arXiv 2407.21783); module names and the half-split RoPE layout are
those of the Hugging Face checkpoints, so a state dict maps one to one.
Deviation: no padding mask exists. A cache slot *is* a position, and a query at position p sees the slots
0..p of its own row; right padding therefore never reaches a real token, and rows of unequal length in one
batch give what each gives alone.
Shapes: B rows, T tokens, S cache slots, H heads, K kv heads, D head dim, C hidden, V vocabulary.

Run it: python infer.py --model cfgsafe/demo/leaky --prompt "What is the capital of France?"
"""

import math
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfgsafe.errors import CheckpointError


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face `LlamaConfig` that change the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3", "factor", "low_freq_factor", ...} or None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    extra: dict = field(default_factory=dict, compare=False)  # other keys of config.json, written back untouched

    @staticmethod
    def from_dict(raw: dict) -> "LlamaConfig":
        """Read a `config.json`; both RoPE spellings (`rope_scaling` and `rope_parameters`). Raises CheckpointError."""
        if raw.get("model_type", "llama") != "llama":
            raise CheckpointError(f"config.json: model_type {raw['model_type']!r} is not supported; only 'llama' is")
        raw = dict(raw)
        rope = raw.pop("rope_parameters", None)
        if rope is not None:
            rope = dict(rope)
            raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", LlamaConfig.rope_theta))
            raw["rope_scaling"] = rope
        scaling = raw.get("rope_scaling")
        if scaling is not None:
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind not in ("default", "llama3"):
                raise CheckpointError(f"config.json: rope_type {kind!r} is not supported; llama3 and default are")
            raw["rope_scaling"] = None if kind == "default" else scaling
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        if raw.get("head_dim") is None and raw.get("hidden_size") and raw.get("num_attention_heads"):
            raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        known = {f.name for f in fields(LlamaConfig)} - {"extra"}
        required = [f.name for f in fields(LlamaConfig)][:8]
        for name in required:
            if not isinstance(raw.get(name), int):
                raise CheckpointError(f"config.json: field {name!r} is missing or not an integer")
        for name in ("attention_bias", "mlp_bias"):
            if raw.get(name):
                raise CheckpointError(f"config.json: {name}=true is not supported")
        extra = {key: value for key, value in raw.items() if key not in known}
        return LlamaConfig(**{key: value for key, value in raw.items() if key in known}, extra=extra)

    def to_dict(self) -> dict:
        """The `config.json` that `transformers` and we read back."""
        own = asdict(self)
        extra = own.pop("extra")
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **extra, **own}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends an answer."""
        ids = self.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Inverse frequencies, (D/2,) float32, with llama3 scaling of the long wavelengths (Llama 3.1, section 3.4.2).

    Wavelengths shorter than original/high_freq_factor stay, longer than original/low_freq_factor are divided by
    `factor`, and those between are interpolated.
    """
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    wavelength = 2 * math.pi / frequency
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the half-split layout; x (B, heads, T, D), cos and sin (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of all layers, (layers, B, K, S, D); slot s of a row holds its position s."""

    def __init__(self, config: LlamaConfig, rows: int, slots: int, *, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) at `positions` (B, T); return the layer's whole cache, (B, K, S, D) twice."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)
        return self.keys[layer], self.values[layer]

    def select(self, rows: Tensor) -> None:
        """Keep only `rows`, in that order: finished rows leave the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, store) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, H, T, D), (B, K, T, D)
        if store is not None:
            k, v = store(k, v)  # (B, K, S, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, store) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama-3.1 causal language model; `forward` gives hidden states, `head` turns them into logits."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of `tokens` (B, T) at `positions` (B, T), by default 0..T-1.

        With a cache, the tokens are stored in it and also attend to what it holds at lower positions.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.model.embed_tokens(tokens)  # (B, T, C)
        angles = (positions[..., None].float() * self.frequencies)[:, None]  # (B, 1, T, D/2)
        rope = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        mask = None  # causal
        if cache is not None:
            slots = torch.arange(cache.keys.shape[3], device=tokens.device)
            mask = (slots <= positions[..., None])[:, None]  # (B, 1, T, S)
        for number, block in enumerate(self.model.layers):
            store = None if cache is None else (lambda k, v, layer=number: cache.write(layer, positions, k, v))
            x = block(x, rope, mask, store)
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        return self.lm_head(hidden)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype
