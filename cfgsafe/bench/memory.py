"""The memory of an ORPO step over the paper's rows on Llama-3.1-8B, by the formula of cfgsafe.blue.memory.

Run it: python -m cfgsafe.bench memory
"""

from dataclasses import dataclass

from cfgsafe.bench.shapes import base_parameters, llama_8b
from cfgsafe.blue.memory import step_bytes
from cfgsafe.fields import Count
from cfgsafe.kernels.table import show
from cfgsafe.llama import LlamaConfig
from cfgsafe.outputs import OutputFile

GIB = 2**30
PARTS = ("weights", "kept", "working", "adapter", "total")
COLUMNS = {"recomputed": "{recomputed}", "shared prefix": "{shared}", "tokens": "{tokens}"}
COLUMNS |= {f"{part} GiB": f"{{{part}:.2f}}" for part in PARTS}


@dataclass
class Options:
    """Peak memory of a training step of Llama-3.1-8B in bfloat16, by formula."""

    pairs: Count = 2
    """Pairs in a step."""
    prompt: Count = 1900
    """Tokens of each prompt."""
    answer: Count = 148
    """Tokens of each answer."""
    rank: Count = 16
    """LoRA rank."""
    csv: OutputFile | None = None
    """CSV file to append the rows to."""


def adapter_parameters(config: LlamaConfig, rank: int) -> int:
    """Number of weights of an adapter of `rank` on the seven linear layers of each block."""
    C, F = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    return rank * config.num_hidden_layers * (2 * (C + query) + 2 * (C + key) + 3 * (C + F))


def run(options: Options) -> None:
    config = llama_8b()
    weights = 2 * base_parameters(config)
    rows = []
    for recomputed in (0, 8, 16, 24, 32):
        for shared in (True, False):
            row = {"recomputed": recomputed, "shared": shared}
            rows.append(row | memory(config, options, weights, recomputed, shared))
    show(rows, COLUMNS, "cpu", options.csv)


def memory(config: LlamaConfig, options: Options, weights: int, recomputed: int, shared: bool) -> dict:
    """Tokens of a step and its memory in GiB; `shared`: a prompt is computed once for both answers."""
    prompts = 1 if shared else 2
    tokens = options.pairs * (prompts * options.prompt + 2 * options.answer)
    step = step_bytes(
        config,
        slots=tokens,
        reads=options.pairs * (options.prompt - 1 + 2 * options.answer),
        adapter=adapter_parameters(config, options.rank),
        rank=options.rank,
        activation=2,
        recomputed=recomputed,
    )
    return {
        "tokens": tokens,
        "weights": weights / GIB,
        "kept": step.kept / GIB,
        "working": step.working / GIB,
        "adapter": step.adapter / GIB,
        "total": (weights + step.total) / GIB,
    }
