"""One variant of `python -m cfgsafe.bench orpo`, in a process of its own; prints what it measured as a JSON line.

Run it: python -m cfgsafe.bench orpo
"""

import json
import sys
import time
from pathlib import Path

import torch

from cfgsafe.blue.batches import Pair, collate, read_pairs
from cfgsafe.blue.orpo import Options
from cfgsafe.blue.step import batch_loss
from cfgsafe.checkpoint import DTYPES, read_model
from cfgsafe.kernels import measure
from cfgsafe.llama import Llama
from cfgsafe.logprobs import token_logprobs
from cfgsafe.lora import LoRAConfig, attach
from cfgsafe.losses import orpo
from cfgsafe.parallel import World
from cfgsafe.tokenizer import Tokenizer


def dense_loss(model: Llama, pairs: list[Pair]) -> torch.Tensor:
    """ORPO as it is written down: a row a side, all logits at once, gradients by autograd."""
    batch = collate(pairs, share=False, device=model.device)
    hidden = model(batch.ids, batch.positions).flatten(0, 1)
    parts = token_logprobs(model.head(hidden[batch.reads]), batch.targets).split(batch.lengths)
    means = torch.stack(
        [part[-answer:].mean() for part, answer in zip(parts, batch.answers, strict=True)]
    ).view(2, -1)
    nll = -torch.cat(parts[: len(pairs)]).mean()
    return orpo(means[0], means[1], nll, 0.1).mean()


def main(settings: dict) -> None:
    folder, device, variant = Path(settings["folder"]), settings["device"], settings["variant"]
    measure.cap(device, settings["memory_gib"])
    dtype = DTYPES[settings["dtype"]]
    ceiling = measure.matmul_tflops(device, dtype)
    model = read_model(folder / "model", device=device, dtype=dtype)
    options = Options(
        "",
        "",
        "",
        beta=0.1,
        share_prefix=variant == "chunked + shared",
        max_length=settings["prompt"] + settings["answer"],
        max_prompt_length=settings["prompt"],
    )
    tokenizer, context = Tokenizer.load(folder / "model"), model.config.max_position_embeddings
    pairs = read_pairs(str(folder / "pairs.jsonl"), tokenizer, context, options)
    torch.manual_seed(0)
    parameters = attach(model.train(), LoRAConfig(settings["rank"]))
    model.recomputed = settings["recompute"]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    before = measure.start_peak(device, model)
    seconds, losses = [], []
    for start in range(0, len(pairs), settings["pairs"]):
        batch = pairs[start : start + settings["pairs"]]
        started = time.perf_counter()
        loss = (
            dense_loss(model, batch)
            if variant == "dense"
            else batch_loss(model, model, batch, options, None, World(0, 1, device))[0]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        measure.synchronize(device)
        seconds.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "seconds": seconds[1:],
                "loss": losses[0],
                "peak_bytes": measure.peak(device) - before,
                "ceiling": ceiling,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
