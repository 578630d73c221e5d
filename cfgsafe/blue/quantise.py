"""Write a checkpoint whose linear layers hold only what 8 or 4 bits can hold.

Source: the rounding of cfgsafe/quantise.py. Rounding is known to bring unlearnt text back (Zhang
et al., arXiv 2410.16454; arXiv 2605.02196): an update that is smaller than half a step is rounded
away. So the model that is served with few bits must be asked, not the one that was trained.

An adapter is merged first, as `train.py merge` does. The rounded numbers are written in the data
type of the base, so that every command can ask the checkpoint; it is as large as before.
Embeddings, output head and norms stay as they are: in GGUF, too, they have more bits than the
rest.

Run it: python train.py quantise --model cfgsafe/demo/leaky --adapter runs/orpo/epoch-3 --out runs/int4
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from cfgsafe.blue.merge import updates_of, warn
from cfgsafe.checkpoint import empty_model, rewrite_checkpoint
from cfgsafe.hub import resolve
from cfgsafe.lora import HEAD, linear_layers, merged
from cfgsafe.outputs import Folder, InputPath
from cfgsafe.quantise import Bits, quantised


@dataclass
class Options:
    """Write a checkpoint whose weights are rounded to 8 or 4 bits."""

    model: InputPath
    """Checkpoint folder or hub id."""
    out: Annotated[str, Folder(("*",))]
    """Folder to write the rounded checkpoint to."""
    adapter: InputPath | None = None
    """PEFT folder or hub id of a LoRA adapter to merge before rounding."""
    bits: Bits = 4
    """Bits of a weight: 8 as in GGUF's Q8_0, 4 as in Q4_0."""


def run(options: Options) -> None:
    base = resolve(options.model)
    skeleton, _ = empty_model(base)
    linear = {f"{path}.weight" for path in linear_layers(skeleton) if path != HEAD}
    updates = updates_of(base, options.adapter) if options.adapter else {}

    def change(name: str, weight: Tensor) -> Tensor:
        if name in updates:
            weight = merged(weight, updates[name])
        return quantised(weight, options.bits) if name in linear else weight

    count = rewrite_checkpoint(base, options.out, change)
    print(f"{options.out}: {count} tensors, {len(linear)} of them rounded to {options.bits} bits")
    if options.adapter:
        warn(options.adapter)
