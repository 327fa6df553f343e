"""k-NN attention on the GPU: launches the Triton kernels for the operators `regard::knn_attention` and its backward.

Selection and gradients are exact and deterministic; memory beyond inputs and outputs is O(N).
"""

from typing import Any

import torch
from torch import Tensor

from regard.ops._arguments import heads_last
from regard.ops._triton import Config, first_that_fits, padded
from regard.ops.knn.triton_backward import keys_kernel, mask_kernel, rows_kernel
from regard.ops.knn.triton_forward import attend_kernel, select_kernel

__all__ = ["backward", "configurations", "forward", "shared_memory"]

State = tuple[Tensor, Tensor, Tensor, Tensor]


def configurations(dtype: torch.dtype, dim: int) -> list[Config]:
    """Block sizes for a dtype and the larger of both head dims, the best first (so far by reckoning, not by timing).

    All kernels of a call share one: the backward's logits are then the forward's (see triton_logits).
    """
    tile = padded(dim)
    if dtype == torch.float32:  # no tensor cores: operands of a whole product lie in registers, and larger tiles spill
        if tile <= 64:
            return [Config.of(ROWS=32, KEYS=32, num_warps=8, num_stages=1), Config.of(ROWS=16, KEYS=16, num_stages=1)]
        return [Config.of(ROWS=16, KEYS=16, num_warps=8, num_stages=1)]
    if tile <= 64:
        return [
            Config.of(ROWS=128, KEYS=64, num_warps=8, num_stages=3),
            Config.of(ROWS=64, KEYS=64, num_warps=4, num_stages=3),
            Config.of(ROWS=64, KEYS=32, num_warps=4, num_stages=2),
        ]
    # Larger tiles spill thousands of bytes a thread before Hopper, where sums lie in registers in another way.
    if tile <= 128:
        return [
            Config.of(ROWS=64, KEYS=64, num_warps=8, num_stages=2),
            Config.of(ROWS=64, KEYS=32, num_warps=4, num_stages=2),
        ]
    return [
        Config.of(ROWS=32, KEYS=32, num_warps=8, num_stages=2),
        Config.of(ROWS=32, KEYS=32, num_warps=4, num_stages=1),
    ]


def shared_memory(config: Config, dtype: torch.dtype, dim: int, *, masked: bool = False) -> int:
    """Bytes of shared memory that the hungriest kernel needs under a config, from above.

    The two tiles that stay, the two of every stage in flight, the weights on their way from sums to operands, and the
    rows' state; and, of the mask, a tile of every stage but the last.
    """
    rows, keys, stages = config["ROWS"], config["KEYS"], max(config.num_stages, 1)
    tiles = 2 * padded(dim) * max(stages * rows + keys, stages * keys + rows)
    of_mask = 4 * rows * keys * max(1, stages - 1) if masked else 0
    return dtype.itemsize * (tiles + rows * keys) + of_mask + 24 * rows + 2048


def _config(query: Tensor, value: Tensor, mask: Tensor | None) -> Config:
    dim, dtype = max(query.shape[-1], value.shape[-1]), query.dtype
    return first_that_fits(
        configurations(dtype, dim),
        lambda config: shared_memory(config, dtype, dim, masked=mask is not None),
        query.device,
    )


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> None:
    if programs:
        kernel[(programs,)](**arguments, **config.options(), enable_fp_fusion=False)


def _strides(name: str, tensor: Tensor | None, last: str = "m") -> dict[str, int]:
    strides = (0,) * 4 if tensor is None else tensor.stride()
    return {f"{name}_{axis}": step for axis, step in zip(("b", "h", *last), strides, strict=True)}


def _shared(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Any:
    """Arguments that all kernels have."""
    kind = 0
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
    strides = (0,) * 4 if mask is None else (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return {
        "query": query,
        "key": key,
        "mask": mask,
        **_strides("query", query, "nd"),
        **_strides("key", key, "md"),
        **dict(zip(("mask_b", "mask_h", "mask_n", "mask_m"), strides, strict=True)),
        "groups": query.shape[1] // key.shape[1] if key.shape[1] else 1,
        "queries": query.shape[2],
        "keys": key.shape[2],
        "scale": scale,
        "DIM": query.shape[3],
        "DIM_BLOCK": padded(query.shape[3]),
        "MASK": kind,
        "CAUSAL": is_causal,
    }


def _with_value(value: Tensor) -> dict[str, Any]:
    return {
        "value": value,
        **_strides("value", value, "md"),
        "VALUE_DIM": value.shape[3],
        "VALUE_BLOCK": padded(value.shape[3]),
    }


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    topk: int,
    is_causal: bool,
    scale: float,
) -> State:
    """output, lse, kth_logit, last_tie, as the operator in op.py returns them; the same arguments."""
    config = _config(query, value, attn_mask)
    batch, heads, queries, _ = query.shape
    output = heads_last(query, (batch, heads, queries, value.shape[3]))
    lse, kth_logit, threshold, largest = (
        query.new_empty((batch, heads, queries), dtype=torch.float32) for _ in range(4)
    )
    last_tie, room = (query.new_empty((batch, heads, queries), dtype=torch.int32) for _ in range(2))
    shared = {**_shared(query, key, value, attn_mask, is_causal, scale), "heads": heads}
    selected = {"threshold": threshold, "room": room, "largest": largest}
    programs = batch * heads * _tiles(queries, config["ROWS"])
    _launch(select_kernel, programs, {**shared, **selected, "topk": topk}, config)
    attended = {
        "output": output,
        "lse": lse,
        "kth_logit": kth_logit,
        "last_tie": last_tie,
        **_with_value(value),
        **_strides("output", output, "nd"),
    }
    _launch(attend_kernel, programs, {**shared, **selected, **attended}, config)
    return output, lse, kth_logit, last_tie


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor,
    kth_logit: Tensor,
    last_tie: Tensor,
    topk: int,
    is_causal: bool,
    scale: float,
    mask_gradient: bool,
) -> State:
    """grad_query, grad_key, grad_value, grad_mask, as the operator in op.py returns them; the same arguments."""
    config = _config(query, value, attn_mask)
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    grad_query, grad_key, grad_value = (heads_last(t, tuple(t.shape)) for t in (query, key, value))
    lse, kth_logit, last_tie = (t.contiguous() for t in (lse, kth_logit, last_tie))
    inverse, delta = torch.empty_like(lse), torch.empty_like(lse)
    shared = {
        **_shared(query, key, value, attn_mask, is_causal, scale),
        **_with_value(value),
        "grad_output": grad_output,
        **_strides("grad", grad_output, "nd"),
        "lse": lse,
        "kth_logit": kth_logit,
        "last_tie": last_tie,
        "inverse": inverse,
        "delta": delta,
    }
    of_rows = {"heads": heads, "grad_query": grad_query, **_strides("out", grad_query, "nd")}
    _launch(rows_kernel, batch * heads * _tiles(queries, config["ROWS"]), {**shared, **of_rows}, config)
    of_keys = {
        "key_heads": key_heads,
        "grad_key": grad_key,
        "grad_value": grad_value,
        **_strides("out_key", grad_key, "md"),
        **_strides("out_value", grad_value, "md"),
    }
    _launch(keys_kernel, batch * key_heads * _tiles(keys, config["KEYS"]), {**shared, **of_keys}, config)
    if not mask_gradient or attn_mask is None:
        return grad_query, grad_key, grad_value, query.new_empty(0)

    sizes = attn_mask.shape
    grad_mask = attn_mask.new_empty(sizes)
    all_rows, all_keys = sizes[2] == 1, sizes[3] == 1
    of_mask = {
        "grad_mask": grad_mask,
        "batches": batch,
        "heads": heads,
        "ALL_BATCHES": sizes[0] == 1,
        "ALL_HEADS": sizes[1] == 1,
        "ALL_ROWS": all_rows,
        "ALL_KEYS": all_keys,
    }
    del shared["MASK"]  # always a float one here
    tiles = (1 if all_rows else _tiles(queries, config["ROWS"])) * (1 if all_keys else _tiles(keys, config["KEYS"]))
    _launch(mask_kernel, sizes[0] * sizes[1] * tiles, {**shared, **of_mask}, config)
    return grad_query, grad_key, grad_value, grad_mask
