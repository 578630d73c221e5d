"""Several processes as one: DDP or FSDP2 under torchrun, and nothing at all without it.

Source: PyTorch's `torch.distributed`; the environment is the one torchrun sets.
Every process reads the same data and works on its share of each batch. Losses are shares of the global one, so that N
processes equal one.

Run it: torchrun --nproc-per-node 2 train.py orpo --model M --pairs P --out O --device cuda
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfgsafe.llama import Llama


@dataclass(frozen=True)
class World:
    """This process among `size`; `device` is its own."""

    rank: int
    size: int
    device: str

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world torchrun started, or a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
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
        dist.destroy_process_group()


def wrap(model: Llama, world: World, fsdp: bool) -> nn.Module:
    """What the forward of a training step calls: `model` itself, or its DDP wrapper. With `fsdp` its parameters become shards, in place."""
    if world.size == 1:
        return model
    if not fsdp:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of an FSDP2 shard, a collective call; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Set `tensor`, perhaps a shard, to the full `value`."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
