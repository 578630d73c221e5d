"""One variant of `python -m cfgsafe.bench orpo`, in a process of its own; prints its figures as JSON.

Run it: python -m cfgsafe.bench orpo
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

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

BETA = 0.1


def dense_loss(model: Llama, pairs: list[Pair]) -> Tensor:
    """ORPO as the paper writes it: a row for each side, all logits at once, gradients by autograd."""
    batch = collate(pairs, share=False, device=model.device)
    hidden = model(batch.ids, batch.positions).flatten(0, 1)
    logits = model.head(hidden[batch.reads])
    rows = token_logprobs(logits, batch.targets).split(batch.lengths)  # the chosen sides, then the rejected
    means = []
    for row, answer in zip(rows, batch.answers, strict=True):
        means.append(row[-answer:].mean())
    chosen, rejected = torch.stack(means).view(2, -1)
    nll = -torch.cat(rows[: len(pairs)]).mean()
    return orpo(chosen, rejected, nll, BETA).mean()


def main(settings: dict) -> None:
    folder, device, variant = Path(settings["folder"]), settings["device"], settings["variant"]
    measure.cap(device, settings["memory_gib"])
    dtype = DTYPES[settings["dtype"]]
    ceiling = measure.matmul_tflops(device, dtype)
    model = read_model(folder / "model", device=device, dtype=dtype)
    options = Options(
        model="",
        pairs=str(folder / "pairs.jsonl"),
        out="",
        beta=BETA,
        share_prefix=variant == "chunked + shared",
        max_length=settings["prompt"] + settings["answer"],
        max_prompt_length=settings["prompt"],
    )
    tokenizer, context = Tokenizer.load(folder / "model"), model.config.max_position_embeddings
    pairs = read_pairs(options.pairs, tokenizer, context, options)
    torch.manual_seed(0)
    parameters = attach(model.train(), LoRAConfig(settings["rank"]))
    model.recomputed = settings["recompute"]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    world = World(0, 1, device)
    before = measure.start_peak(device, model)
    seconds, losses = [], []
    for start in range(0, len(pairs), settings["pairs"]):
        batch = pairs[start : start + settings["pairs"]]
        started = time.perf_counter()
        if variant == "dense":
            loss = dense_loss(model, batch)
        else:
            loss, _ = batch_loss(model, model, batch, options, None, world)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        measure.synchronize(device)
        seconds.append(time.perf_counter() - started)
    figures = {
        "seconds": seconds[1:],  # the first step warms up
        "loss": losses[0],
        "peak_bytes": measure.peak(device) - before,
        "ceiling": ceiling,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
