"""Compiles the guidance kernels for a GPU that need not be here, and prints registers, shared memory and spills of each.

Run it: python -m cfgsafe.kernels.aot 86        (80: A100, 86: A40, 90: H100 and H200)
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import guidance

POINTERS = {
    "positive": "*i64",
    "negative": "*i64",
    "space": "*i32",
    "top_k": "*i32",
    "seed": "*i64",
    "step": "*i64",
    "tokens": "*i64",
}
POINTERS |= dict.fromkeys(
    ("guidance", "alpha", "temperature", "top_p", "records", "scores", "logprobs"), "*fp32"
)
VOCABULARY = 128256


def kernels(logits: str) -> list[tuple[str, ASTSource]]:
    """Each kernel as the launcher calls it for Llama-3.1's vocabulary, with and without top-k and top-p."""
    block = guidance.block_size(VOCABULARY)
    parts = triton.next_power_of_2(triton.cdiv(VOCABULARY, block))
    sources = []
    for truncates in (False, True):
        constants = {"BLOCK": block, "PARTS": parts, "TRUNCATES": truncates, "stride_v": 1}
        for kernel in (guidance.normalise_parts, guidance.score_parts, guidance.choose_tokens):
            names = kernel.arg_names
            fixed = {name: constants[name] for name in names if name in constants}
            signature = {name: "constexpr" if name in fixed else POINTERS.get(name, "i32") for name in names}
            if "logits" in signature:
                signature["logits"] = logits
            sources.append(
                (
                    f"{kernel.__name__}{' top-k, top-p' if truncates else ''}",
                    ASTSource(kernel, signature, fixed),
                )
            )
    return sources


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack (spills) and local memory, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def main(capability: int) -> None:
    for logits in ("*bf16", "*fp32"):
        for name, source in kernels(logits):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
            )
            used = resources(compiled.asm["cubin"])
            spills = used["STACK"] + used["LOCAL"]
            print(
                f"sm_{capability} {logits[1:]} {name}: {used['REG']} registers, {used['SHARED']} bytes shared, spills {spills} bytes"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
