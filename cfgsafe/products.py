"""Linear layers; for a few rows on a CPU, by the way that is fastest on this machine, found by timing.

Source: ours. Decoding reads every weight for one or two rows, so a product can be as fast as the memory
is read. Which way comes near depends on the processor, the data type, the shape and the number of rows:

rows     x W^T, as nn.Linear computes it
columns  W x^T of two columns at least
packed   x W^T with the weight in a layout of oneDNN, which takes the place of the plain one

`prepare` times them on parts of the weights, for each shape, and keeps what it has found for the process.
It also lays weights side by side that read the same input (query, key and value; gate and up), so that one
product serves them. Results stay within rounding. Without `prepare`, with gradients, on a GPU, and in
a model of less than LEAST_BYTES a layer is nn.Linear.

Run it: python infer.py --model M --prompt "Hello!" --verbose      (or --no-tune)
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_BYTES = 2**25  # of all weights; those of a smaller model stay in the cache
TIMED_BYTES = 2 * 2**20  # of the part of a weight that is timed
PARTS = 16  # of weights, which take turns, so that each is read from memory and not from a cache
ROWS = (1, 2, 4, 8, 16, 64)  # numbers of rows that are timed; others go the way of the next larger one
CLEARLY = 0.9  # another way than nn.Linear's must take at most this share of its time
Way = Callable[[Tensor, Tensor], Tensor]  # (x (..., in), W (out, in), which may be packed) -> (..., out)


def by_rows(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def by_columns(x: Tensor, weight: Tensor) -> Tensor:
    columns = x.reshape(-1, x.shape[-1])  # (rows, in)
    rows = len(columns)
    if rows == 1:
        columns = columns.repeat(2, 1)  # matrix times vector is slow for some
    y = F.linear(weight, columns)[:, :rows].t().contiguous()  # what follows is slow on columns
    return y.view(*x.shape[:-1], len(weight))


def packed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """The weight in a layout of oneDNN."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


WAYS: dict[str, Way] = {"rows": by_rows, "columns": by_columns, "packed": packed}


@dataclass(frozen=True)
class Found:
    """The fastest ways for weights of one shape and data type."""

    ways: tuple[str, ...]  # for each of ROWS: all "packed", or none
    gb_per_second: tuple[float, ...]  # of weights, for each of ROWS

    @property
    def packs(self) -> bool:
        return "packed" in self.ways


FOUND: dict[tuple, Found] = {}  # (data type, threads, shape, whether it may be packed) -> what was found


class Product:
    """y = W x for one weight, by the ways that were found."""

    def __init__(self, weight: Tensor, found: Found):
        self.shape, self.found = tuple(weight.shape), found
        self.weight = pack(weight) if found.packs else weight
        self.way_of: list[Way] = []  # by number of rows
        for rows in range(ROWS[-1] + 1):
            name = found.ways[next(place for place, most in enumerate(ROWS) if most >= rows)]
            self.way_of.append(WAYS[name])
        self.beyond = packed if found.packs else by_rows  # for more rows than were timed

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.numel() // self.shape[1]
        way = self.way_of[rows] if rows < len(self.way_of) else self.beyond
        return way(x, self.weight)


class Linear(nn.Linear):
    """nn.Linear, unless `prepare` has found a faster way."""

    product: Product | None = None  # W x
    joint: Product | None = None  # W x of this layer and of those after it in a call of `together`

    @property
    def base(self) -> "Linear":
        """The layer without adapters: itself."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.product is None or torch.is_grad_enabled():
            return super().forward(x)
        return self.update(self.product(x), x)

    def update(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output for x, from y = W x; a layer with adapters adds theirs."""
        return y if self.bias is None else y + self.bias


Groups = list[list[Linear]]  # of layers; those of a group read the same input


def together(x: Tensor, *layers: Linear) -> list[Tensor]:
    """layer(x) of each layer of a group (see `Llama.groups`)."""
    joint = layers[0].base.joint
    if joint is None or torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    parts = joint(x).split([layer.base.out_features for layer in layers], -1)
    return [layer.update(part, x) for layer, part in zip(layers, parts, strict=True)]


@torch.no_grad()
def prepare(groups: Groups, embedding: Tensor, *, may_pack: bool) -> None:
    """Give the layers of a model on a CPU their products; `groups` as `Llama.groups`, the head is the last.

    Adapters can still be trained, but weights are changed only after `release`. With `may_pack` the model
    is for inference alone: a packed weight is held only so. The head's is read by others as well, so it is
    packed only beside the embedding's, where the two are tied.
    """
    release(groups)
    every = [layer.weight for group in groups for layer in group]
    if every[0].device.type != "cpu" or sum(weight.nbytes for weight in every) < LEAST_BYTES:
        return
    head = groups[-1]
    alike: dict[tuple, Groups] = {}  # the groups of one shape
    for group in groups:
        first = group[0].weight
        shape = (sum(layer.out_features for layer in group), group[0].in_features)
        packs = may_pack and packs_here(first.dtype) and (group is not head or first is embedding)
        key = (first.dtype, shape, packs, torch.get_num_threads())
        alike.setdefault(key, []).append(group)
    for key, same in alike.items():
        weights = [side_by_side(group) for group in same]
        if key not in FOUND:
            FOUND[key] = find(weights, may_pack=key[2])
        for group in same:
            weight = weights.pop(0)  # one at a time is held in both layouts
            product = Product(weight, FOUND[key])
            if len(group) == 1:
                group[0].product = product
            else:
                group[0].joint = product
            if product.found.packs and group is not head:
                for layer in group:
                    layer.weight.data = weight.new_empty(0)


def packs_here(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this data type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def release(groups: Groups) -> None:
    """Take the products away; the weights are plain ones again, to the bit."""
    for group in groups:
        first = group[0]
        product = first.product or first.joint
        if product is not None and not first.weight.numel():
            parts = product.weight.to_dense().split([layer.out_features for layer in group])
            for layer, part in zip(group, parts, strict=True):
                layer.weight.data = part
        first.product = first.joint = None


def side_by_side(group: list[Linear]) -> Tensor:
    """The weights of a group as one, (out, in); each layer's own becomes a part of it."""
    if len(group) == 1:
        return group[0].weight.data
    joint = torch.cat([layer.weight.data for layer in group])
    for layer, part in zip(group, joint.split([layer.out_features for layer in group]), strict=True):
        layer.weight.data = part
    return joint


def find(weights: list[Tensor], *, may_pack: bool) -> Found:
    """Time the ways on parts of weights of one shape."""
    rows = max(1, TIMED_BYTES // (weights[0].shape[1] * weights[0].itemsize))
    parts = []
    for number in range(PARTS):
        weight = weights[number * len(weights) // PARTS]
        begin = max(0, len(weight) - rows) * number // PARTS  # differs within one weight, too
        parts.append(weight[begin : begin + rows])
    ways = {name: (WAYS[name], parts) for name in ("rows", "columns")}
    if may_pack:
        ways["packed"] = (packed, [pack(part) for part in parts])
    names, best, ratios = [], [], []  # for each of ROWS: the best plain way, its seconds, packed to them
    for times in seconds(ways):
        name = "columns" if times["columns"] < CLEARLY * times["rows"] else "rows"
        names.append(name)
        best.append(times[name])
        ratios.append(times.get("packed", math.inf) / times[name])
    # A packed weight serves all numbers of rows: it must pay on average, and must not cost a single request.
    packs = sum(ratios) < CLEARLY * len(ROWS) and max(ratios[:2]) < 1
    if packs:
        names = ["packed"] * len(ROWS)
        best = [time * ratio for time, ratio in zip(best, ratios, strict=True)]
    return Found(tuple(names), tuple(parts[0].nbytes / time / 1e9 for time in best))


def seconds(ways: dict[str, tuple[Way, list[Tensor]]]) -> Iterator[dict[str, float]]:
    """For each of ROWS: name of a way -> seconds of its faster call, after one that compiles.

    The ways take turns, and each call reads the weight that was not read for the longest time.
    """
    turn = 0
    for rows in ROWS:
        found: dict[str, list[float]] = {name: [] for name in ways}
        for name in [*ways, *ways, *ways]:
            way, weights = ways[name]
            weight = weights[turn % len(weights)]
            turn += 1
            x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
            started = time.perf_counter()
            way(x, weight)
            found[name].append(time.perf_counter() - started)
        yield {name: min(times[1:]) for name, times in found.items()}


def table(groups: Groups) -> str:
    """The way of each shape of a prepared model, and the GB of weights that it reads in a second."""
    lines = []
    for group in groups:
        product = group[0].product or group[0].joint
        if product is None:
            continue
        cells = [str(product.shape)]
        for rows, way, rate in zip(ROWS, product.found.ways, product.found.gb_per_second, strict=True):
            cells.append(f"{rows} {way} {rate:.0f}")
        if "   ".join(cells) not in lines:
            lines.append("   ".join(cells))
    if not lines:
        return "products: as nn.Linear computes them"
    return "products (out, in), by number of rows: the way, GB/s of weights\n" + "\n".join(lines)
