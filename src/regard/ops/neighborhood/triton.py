"""Neighborhood attention in Triton: launches the kernels of triton_forward.py, triton_backward.py and triton_bias.py.

A tile of queries that is compact in the grid meets, tile after tile, the box of keys that holds its windows: products
on tensor cores, the windows a mask from coordinates, an online softmax. Nothing is gathered into memory, no buffer
holds queries times keys, and no float is added atomically: two runs agree bit for bit. Not yet measured on a GPU.
"""

import functools
import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.ops._arguments import heads_last
from regard.ops._triton import Config, first_that_fits, padded
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.triton_backward import key_gradients, query_gradients
from regard.ops.neighborhood.triton_bias import bias_gradients
from regard.ops.neighborhood.triton_forward import attend_tiles
from regard.ops.neighborhood.triton_rows import LOG2_E
from regard.ops.neighborhood.triton_windows import AXES, fill_tables
from regard.ops.neighborhood.windows import BORDERS, Axis, Pattern

__all__ = ["backward", "configurations", "forward", "shared_memory", "tables_of", "tile_shape"]

Three = tuple[int, int, int]
_FUSED = {"enable_fp_fusion": True}  # the default is not the same in all versions of Triton


def configurations(dtype: torch.dtype, dim: int) -> list[Config]:
    """Block sizes for a dtype and the larger of both head dims, the best first (so far by reckoning, not by timing)."""
    tile = padded(dim)
    if dtype == torch.float32:  # products without tensor cores: operands and sums lie in registers
        if tile <= 64:
            return [Config.of(4, 2, ROWS=32, OTHERS=32), Config.of(4, 1, ROWS=32, OTHERS=16)]
        if tile <= 128:
            return [Config.of(8, 2, ROWS=32, OTHERS=32), Config.of(4, 1, ROWS=16, OTHERS=16)]
        return [Config.of(8, 1, ROWS=16, OTHERS=16)]
    if tile <= 128:
        return [Config.of(4 if tile <= 64 else 8, 2, ROWS=64, OTHERS=32), Config.of(4, 1, ROWS=32, OTHERS=32)]
    return [Config.of(8, 2, ROWS=32, OTHERS=32), Config.of(8, 1, ROWS=32, OTHERS=32)]


def shared_memory(config: Config, dtype: torch.dtype, dim: int) -> int:
    """Bytes of shared memory that the hungriest kernel needs under a config, from above: two tiles that stay, two a
    stage in flight, one that is cleaned, and two of weights on their way from sums to operands."""
    rows, others = config["ROWS"], config["OTHERS"]
    tiles = padded(dim) * (2 * rows + (2 * config.num_stages + 1) * others) + 2 * rows * others
    return dtype.itemsize * tiles + 4096


def _config(call: NeighborhoodCall) -> Config:
    dim, dtype = max(call.query.shape[3], call.value.shape[3]), call.query.dtype
    return first_that_fits(
        configurations(dtype, dim), lambda config: shared_memory(config, dtype, dim), call.query.device
    )


@functools.lru_cache(maxsize=1024)
def tile_shape(lengths: Three, kernel: Three, prefix: int, rows: int, others: int) -> Three:
    """The box of `rows` tokens that costs least: tiles, times steps of `others` through what a tile sees.

    Args:
        lengths, kernel: the grid and the windows, of rank 3.
        prefix: tokens that all see besides.
    """

    def cost(shape: Three) -> tuple[int, int, int]:
        tiles = math.prod(-(-n // t) for n, t in zip(lengths, shape, strict=True))
        box = math.prod(min(n, t + w - 1) for n, t, w in zip(lengths, shape, kernel, strict=True))
        # Among equals the one that sees least, and then the widest: its tokens are neighbors in memory.
        return tiles * -(-(prefix + box) // others), tiles * box, -shape[2]

    powers = [1 << i for i in range(rows.bit_length())]
    pairs = itertools.product(powers, powers)
    return min(((rows // (y * x), y, x) for y, x in pairs if y * x <= rows), key=cost)


class Tables(NamedTuple):
    """What kernels read of the windows, of a grid of rank 3.

    Args:
        data: int32, the tables of the axes one after the other: 6 rows of `lengths` entries, 3 of `places`.
        lengths: queries along each axis, at least 1. places: of keys.
    """

    data: Tensor
    lengths: tuple[int, int, int]
    places: tuple[int, int, int]


def _margins(axis: Axis, border: str) -> tuple[int, int]:
    """Places before and after each dilation group that windows reach and that count."""
    if border in ("shift", "mask"):
        return 0, 0
    before = axis.kernel_size - 1 if axis.is_causal else axis.kernel_size // 2
    lead = axis.stride - 1 if axis.is_causal else axis.stride // 2
    return before - lead, 0 if axis.is_causal else lead - before + axis.kernel_size - 1


def tables_of(pattern: Pattern, device: torch.device) -> Tables:
    """The tables of a pattern: one launch, nothing read back."""
    axes = [axis._replace(length=max(axis.length, 1)) for axis in pattern.axes()]
    axes = [Axis(1, 1, 1, 1, False)] * (3 - len(axes)) + axes
    margins = [_margins(axis, pattern.border) for axis in axes]
    lengths = tuple(axis.length for axis in axes)
    places = tuple(
        axis.length + min(axis.dilation, axis.length) * sum(margin) for axis, margin in zip(axes, margins, strict=True)
    )
    entries = [6 * n + 3 * p for n, p in zip(lengths, places, strict=True)]
    data = torch.empty(sum(entries), dtype=torch.int32, device=device)
    options = dict(zip(AXES, (int(option) for axis in axes for option in axis), strict=True))
    block = 128
    blocks = -(-max(places) // block)
    fill_tables[(blocks, 3)](data=data, **options, border=BORDERS.index(pattern.border), BLOCK=block, **_FUSED)
    return Tables(data, lengths, places)  # type: ignore[arg-type]


class _Launch:
    """What the kernels of one call are given alike."""

    def __init__(self, call: NeighborhoodCall) -> None:
        self.call = call
        self.tables = tables_of(call.pattern, call.query.device)
        self.rank = len(call.pattern.grid_size)
        self.kernel: Three = ((1, 1) + call.pattern.kernel_size)[-3:]  # type: ignore[assignment]

    def sizes(self, heads: int, rows: int, others: int) -> dict[str, int]:
        """The kernels' SIZES, for tiles of `rows` tokens of so many heads."""
        call, tables, tokens, prefix = self.call, self.tables, self.call.query.shape[2], self.call.num_prefix_tokens
        shape = tile_shape(tables.lengths, self.kernel, prefix, rows, others)
        tiles = math.prod(-(-n // t) for n, t in zip(tables.lengths, shape, strict=True)) if tokens > prefix else 0
        found = {
            "offsets": call.pattern.offsets,
            "heads": heads,
            "groups": call.groups,
            "tokens": tokens,
            "prefix": prefix,
            "prefix_tiles": -(-prefix // rows),
            "tiles": tiles,
        }
        sizes = {"length": tables.lengths, "places": tables.places, "shape": shape, "kernel": self.kernel}
        return found | {f"{name}{axis}": size for name, each in sizes.items() for axis, size in enumerate(each)}

    def arguments(self, **others: Tensor) -> dict[str, Any]:
        """Tensors, their strides and the kernels' constants; `others`: tensors (B, H, N, D) besides the inputs."""
        call = self.call
        dim, value_dim = call.query.shape[3], call.value.shape[3]
        # Booleans as the bytes that they are.
        visible = None if call.visible is None else call.visible.view(torch.uint8)
        tensors = {"query": call.query, "key": call.key, "value": call.value, "visible": visible, **others}
        strides = {f"{name}_strides": None if t is None else t.stride() for name, t in tensors.items()}
        return {
            **tensors,
            **strides,
            "bias": None if call.attn_bias is None else call.attn_bias.contiguous(),
            "tables": self.tables.data,
            "scale": call.scale * LOG2_E.value,
            "RANK": self.rank,
            "DIM": dim,
            "VALUE_DIM": value_dim,
            "DIM_BLOCK": padded(dim),
            "VALUE_BLOCK": padded(value_dim),
        }

    def run(self, kernel: Any, heads: int, arguments: dict[str, Any], warps: int = 1) -> None:
        """A program for each tile of each head; and again, where what they compute is not finite (see triton_rows).

        Args:
            warps: times a config's, for a kernel that holds more sums.
        """
        config = _config(self.call)
        config = replace(config, num_warps=min(8, warps * config.num_warps))
        sizes = self.sizes(heads, config["ROWS"], config["OTHERS"])
        programs = self.call.query.shape[0] * heads * (sizes["prefix_tiles"] + sizes["tiles"])
        prefixed = self.call.num_prefix_tokens > 0
        broken = self.call.query.new_empty(programs, dtype=torch.int32)
        for careful in (False, True):
            options = {"PREFIX": prefixed, "CAREFUL": careful, **config.options(), **_FUSED}
            kernel[(programs,)](broken=broken, **arguments, **sizes, **options)


def _forward(call: NeighborhoodCall) -> Tensor:
    batch, heads, tokens, _ = call.query.shape
    output = heads_last(call.query, (batch, heads, tokens, call.value.shape[3]))
    if output.numel() > 0:
        launch = _Launch(call)
        launch.run(attend_tiles, heads, launch.arguments(output=output))
    return output


def _backward(
    call: NeighborhoodCall, grad_output: Tensor, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value = call.query, call.key, call.value
    grad_query, grad_key, grad_value = (heads_last(like, tuple(like.shape)) for like in (query, key, value))
    bias = call.attn_bias if bias_gradient else None
    if query.numel() == 0:  # keys without queries have no gradient
        empty = (grad_query, grad_key.zero_(), grad_value.zero_())
        return *empty, None if bias is None else torch.zeros_like(bias)
    launch = _Launch(call)
    # Of each row: the softmax's log-sum-exp, times log2(e), and the mean gradient of its weights.
    lse, mean = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    rows = {"lse": lse, "mean": mean}
    arguments = launch.arguments(grad_output=grad_output, grad_query=grad_query)
    launch.run(query_gradients, query.shape[1], arguments | rows)
    arguments = launch.arguments(grad_output=grad_output, grad_key=grad_key, grad_value=grad_value)
    launch.run(key_gradients, key.shape[1], arguments | rows, warps=2)
    grad_bias = None
    if bias is not None:
        arguments = launch.arguments(grad_output=grad_output) | rows
        grad_bias = _bias_gradient(launch, arguments).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _bias_gradient(launch: _Launch, arguments: dict[str, Any]) -> Tensor:
    call = launch.call
    (batch, heads, tokens, dim), offsets = call.query.shape, call.pattern.offsets
    # Lanes are rows: as many as a warp's registers hold of queries and gradients.
    wide = max(arguments["DIM_BLOCK"], arguments["VALUE_BLOCK"])
    rows, entries = 32 if wide <= 64 else 16, min(512, padded(offsets))
    sizes = launch.sizes(heads, rows, 1)
    # As many partial sums as there are tiles, but in no more memory than the queries take.
    span = -(-sizes["tiles"] // max(1, tokens * dim // offsets))
    chunks = -(-sizes["tiles"] // max(1, span))
    partial = call.query.new_empty((chunks, batch, heads, offsets), dtype=torch.float32)
    programs = -(-offsets // entries) * chunks * batch * heads
    if programs > 0:
        blocks = {"ROWS": rows, "ENTRIES": entries, "num_warps": max(1, wide // 64), "num_stages": 1, **_FUSED}
        bias_gradients[(programs,)](**arguments, **sizes, partial=partial, span=span, chunks=chunks, **blocks)
    return partial.sum(dim=(0, 1))


def forward(*operands: Any) -> Tensor:
    """`regard::neighborhood_attention` on the GPU."""
    return _forward(NeighborhoodCall.of_operands(*operands))


def backward(grad_output: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """`regard::neighborhood_attention_backward` on the GPU."""
    call = NeighborhoodCall.of_operands(*operands[:-1])
    *grads, grad_bias = _backward(call, grad_output, bias_gradient=operands[-1])
    return *grads, call.query.new_empty(0) if grad_bias is None else grad_bias
