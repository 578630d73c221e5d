"""The memory of an ORPO step over the paper's rows on Llama-3.1-8B, by the formula of cfgsafe.blue.memory.

Run it: python -m cfgsafe.bench memory
"""

from dataclasses import dataclass

from cfgsafe.bench.shapes import base_parameters, llama_8b
from cfgsafe.blue.memory import step_bytes
from cfgsafe.kernels.results import show
from cfgsafe.llama import LlamaConfig

GIB = 2**30
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Options:
    """Peak memory of a training step of Llama-3.1-8B in bfloat16, by formula, with more and more blocks recomputed."""

    pairs: int = 2
    """Pairs a step."""
    prompt: int = 1900
    """Tokens of a prompt."""
    answer: int = 148
    """Tokens of each answer."""
    rank: int = 16
    """LoRA rank."""
    csv: str | None = None
    """File to add the rows to."""


def adapter_parameters(config: LlamaConfig, rank: int) -> int:
    """Weights of an adapter of `rank` on the seven linear layers of each block."""
    C, F, H, K = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    query, key = H * config.head_dim, K * config.head_dim
    return rank * config.num_hidden_layers * (2 * (C + query) + 2 * (C + key) + 3 * (C + F))


def run(options: Options) -> None:
    config = llama_8b()
    weights = 2 * base_parameters(config)
    rows = []
    for recomputed in (0, 8, 16, 24, 32):
        for share in (True, False):
            tokens = options.pairs * (
                options.prompt + 2 * options.answer if share else 2 * (options.prompt + options.answer)
            )
            reads = options.pairs * (options.prompt - 1 + 2 * options.answer)
            adapter = adapter_parameters(config, options.rank)
            step = step_bytes(
                config,
                slots=tokens,
                reads=reads,
                adapter=adapter,
                rank=options.rank,
                activation=2,
                recomputed=recomputed,
            )
            row = {"recomputed": recomputed, "shared": share, "tokens": tokens, "weights": weights / GIB}
            row |= {name: getattr(step, name) / GIB for name in ("kept", "working", "adapter")}
            rows.append(row | {"total": (weights + step.total) / GIB})
    columns = {
        "recomputed": "{recomputed}",
        "shared prefix": "{shared}",
        "tokens": "{tokens}",
        "weights GiB": "{weights:.2f}",
    }
    columns |= {f"{name} GiB": f"{{{name}:.2f}}" for name in ("kept", "working", "adapter", "total")}
    show(rows, columns, "cpu", options.csv)
