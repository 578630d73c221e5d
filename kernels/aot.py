"""Compiles the kernels for a GPU that need not be present; prints registers, shared memory and spills.

Run it: python -m cfgsafe.kernels.aot 86        (80: A100, 86: A40, 90: H100 and H200)
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import guidance, head

# Argument -> its type. Arguments that are missing here are int32 numbers.
TYPES = dict.fromkeys(("positive", "negative", "seed", "step", "tokens"), "*i64")
TYPES |= dict.fromkeys(("histograms", "targets"), "*i64") | {"bounds": "*u32"}
TYPES |= dict.fromkeys(("space", "top_k"), "*i32")
TYPES |= dict.fromkeys(
    ("guidance", "alpha", "temperature", "top_p", "records", "scores", "logprobs"), "*fp32"
)
VOCABULARY = 128256
# The launcher tells the compiler which numbers are multiples of 16; so are these, and all addresses.
MULTIPLES = ("V", "C", "stride_r", "hidden_r", "weight_v")
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}  # of logits, hidden states and weights


def kernels(dtype: str) -> list[tuple[str, ASTSource, dict[str, int]]]:
    """Each kernel as the launcher calls it for Llama-3.1, in each of its forms, with its options."""
    block, parts = guidance.block_size(VOCABULARY), triton.cdiv(VOCABULARY, head.BLOCK_V)
    sizes = {"BLOCK": block, "PARTS": triton.next_power_of_2(triton.cdiv(VOCABULARY, block)), "stride_v": 1}
    sizes |= {"BLOCK_V": head.BLOCK_V, "BLOCK_C": head.block_c(DTYPES[dtype]), "hidden_c": 1, "weight_c": 1}
    forms: list[tuple] = [
        ("", guidance.normalise_parts, {}),
        ("", guidance.choose_tokens, {}),
        ("", head.head_parts, {}),
        (" after head_parts", guidance.choose_tokens, {"PARTS": triton.next_power_of_2(parts)}),
    ]  # name, kernel, form
    for truncates in (False, True):
        name = " top-k, top-p" if truncates else ""
        forms.append((name, guidance.score_parts, {"TRUNCATES": truncates}))
    for (kind, name), level in product(enumerate((" top-k", " top-p")), range(guidance.LEVELS.value)):
        for kernel in (guidance.count_digits, guidance.narrow):
            forms.append((f"{name} level {level}", kernel, {"KIND": kind, "LEVEL": level}))
    forms.append((" top-k, top-p", guidance.draw_parts, {}))
    sources = []
    for name, kernel, form in forms:
        values = sizes | form
        constants = {argument: values[argument] for argument in kernel.arg_names if argument in values}
        types = TYPES | dict.fromkeys(("logits", "hidden", "weight"), dtype)
        types |= dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        aligned = {}
        for number, (argument, type_) in enumerate(signature.items()):
            if type_.startswith("*") or argument in MULTIPLES:
                aligned[(number,)] = [["tt.divisibility", 16]]
        options = {"num_warps": guidance.WARPS}
        if kernel is head.head_parts:
            options = {"num_warps": head.WARPS, "num_stages": head.STAGES}
        sources.append((kernel.__name__ + name, ASTSource(kernel, signature, constants, aligned), options))
    return sources


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of stack (spills) and of local memory, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    for dtype in DTYPES:
        for name, source, options in kernels(dtype):
            compiled = triton.compile(source, target=target, options=options)
            used = resources(compiled.asm["cubin"])
            usage = f"{used['REG']} registers, {compiled.metadata.shared} bytes shared"
            spills = used["STACK"] + used["LOCAL"]
            print(f"sm_{capability} {dtype[1:]} {name}: {usage}, spills {spills} bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]))
