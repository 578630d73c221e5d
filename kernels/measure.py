"""Time and memory of this process, with torch alone, so that any environment can run it.

Run it: python -m cfgsafe.bench --help
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


def cap(device: str, gib: float | None) -> None:
    """Let this process use at most `gib` of the GPU, to simulate a smaller one."""
    if gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Seconds that a call takes."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def graphed(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def seconds_as_graph(call: Callable[[], object], calls: int = 20) -> float:
    """Seconds of a call as a CUDA graph, after one that compiles what it needs."""
    call()
    graph = graphed(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    repeat(graph.replay, calls)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def read_gb_per_second(device: str) -> float:
    """The rate in GB/s at which this machine reads a large array: 2 GiB of a GPU, or 1 GiB.

    It is the best of three ways, because none is the fastest everywhere: on CPUs a sum reads slower
    than a product of a matrix and a vector. Three reads are timed together, so that launches hardly
    count.
    """
    side, dtype = (2**15, torch.bfloat16) if device.startswith("cuda") else (2**14, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    flat, vector = matrix.flatten(), matrix[0].clone()
    ways = (matrix.sum, lambda: torch.dot(flat, flat), lambda: matrix @ vector)
    best = float("inf")
    for read in ways:
        for _ in range(5):
            best = min(best, seconds(partial(repeat, read, 3), device))
    return 3 * matrix.nbytes / best / 1e9


def repeat(call: Callable[[], object], times: int) -> None:
    """Call several times."""
    for _ in range(times):
        call()


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """The rate of a large matrix product on this machine in TFLOP/s: the most that can be reached."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        best = min(best, seconds(lambda: a @ b, device))
    return 2 * size**3 / best / 1e12


def start_peak(device: str, model: torch.nn.Module) -> int:
    """Reset the peak; returns the bytes in use: of the GPU's allocator, or on a CPU of the whole process."""
    for parameter in model.parameters():
        parameter.detach().sum()  # reads what is only mapped from a file
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use since `start_peak`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    """A field of /proc/self/status, from kB to bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
