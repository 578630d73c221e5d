"""Several processes as one: DDP or FSDP2 under torchrun, and nothing at all without it.

Source: PyTorch's `torch.distributed`; the environment variables are those that torchrun sets. All
processes read the same data, and each works on its share of every batch. Losses are shares of the
global loss, so that N processes compute what one computes.

Run it: torchrun --nproc-per-node 2 train.py orpo --model M --pairs P --out O --device cuda
"""

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# DDP imports this module, and its functions keep the process group of the moment of import as a default
# argument. Imported after init_process_group, the group would never be freed, and gloo's threads would abort
# the process at its exit.
import torch.distributed.nn
from torch import Tensor, nn

from cfgsafe.errors import InputError
from cfgsafe.llama import Llama
from cfgsafe.products import release


@dataclass(frozen=True)
class World:
    """This process, number `rank` of `size`, and its own `device`."""

    rank: int
    size: int
    device: str

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, in place. All processes must call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone."""
    size = world_size()
    if size == 1:
        yield World(0, 1, device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        gc.collect()  # a DDP wrapper is a reference cycle, and holds the group
        dist.destroy_process_group()


def world_size() -> int:
    """The number of processes. Raises InputError for variables that are not those of torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    numbers = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    for name, value in numbers.items():
        if not re.fullmatch("[0-9]{1,9}", value):
            raise InputError(f"{name}={value}: is no whole number; torchrun sets it, or unset WORLD_SIZE")
    if not int(numbers["RANK"]) < int(size) or "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE={size}: RANK or MASTER_ADDR does not fit; torchrun sets them")
    return int(size)


def wrap(model: Llama, world: World, fsdp: bool) -> nn.Module:
    """The module that the forward of a training step calls: `model` itself, or its DDP wrapper.

    With `fsdp` it is `model`, and its parameters become shards, in place.
    """
    if world.size == 1:
        return model
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    release(model.groups())
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP2 shard (all processes must call it); any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Set `tensor`, which may be an FSDP2 shard, to the full `value`."""
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
