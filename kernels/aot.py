"""Compiles the kernels for a GPU that need not be present; prints registers, shared memory and spills.

Run it: python -m cfgsafe.kernels.aot 86        (80: A100, 86: A40, 90: H100 and H200)
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import guidance

# Argument -> its type. Arguments that are missing here are int32 numbers.
TYPES = dict.fromkeys(("positive", "negative", "seed", "step", "tokens"), "*i64")
TYPES |= dict.fromkeys(("histograms", "targets"), "*i64") | {"bounds": "*u32"}
TYPES |= dict.fromkeys(("space", "top_k"), "*i32")
TYPES |= dict.fromkeys(
    ("guidance", "alpha", "temperature", "top_p", "records", "scores", "logprobs"), "*fp32"
)
VOCABULARY = 128256


def kernels(logits: str) -> list[tuple[str, ASTSource]]:
    """Each kernel as the launcher calls it for Llama-3.1, in each of its forms."""
    block = guidance.block_size(VOCABULARY)
    sizes = {"BLOCK": block, "PARTS": triton.next_power_of_2(triton.cdiv(VOCABULARY, block)), "stride_v": 1}
    forms: list[tuple] = [
        ("", guidance.normalise_parts, {}),
        ("", guidance.choose_tokens, {}),
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
        types = TYPES | {"logits": logits} | dict.fromkeys(constants, "constexpr")
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        sources.append((kernel.__name__ + name, ASTSource(kernel, signature, constants)))
    return sources


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of stack (spills), local and shared memory, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    for logits in ("*bf16", "*fp32"):
        for name, source in kernels(logits):
            compiled = triton.compile(source, target=target, options={"num_warps": guidance.WARPS})
            used = resources(compiled.asm["cubin"])
            usage = f"{used['REG']} registers, {used['SHARED']} bytes shared"
            spills = used["STACK"] + used["LOCAL"]
            print(f"sm_{capability} {logits[1:]} {name}: {usage}, spills {spills} bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]))
