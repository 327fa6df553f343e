"""regard's operators in PyTorch's own operations: what runs where regard does not, such as ONNX.

Each is the operator's reference, in a form that asks nothing of the sizes, so that one trace serves them all. Memory is
therefore the reference's: N x M weights a head for k-NN and multipole attention, N x N distances for density peaks.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from regard.ops._selection import kept_above_kth, raised
from regard.ops.clustering.kmeans import assign_at_once, lloyd, spread_over_grid, start_tokens
from regard.ops.clustering.reference import density_peaks_reference
from regard.ops.knn.call import KNNCall
from regard.ops.knn.lists import knn_lists_reference
from regard.ops.knn.reference import knn_attention_reference
from regard.ops.multipole.call import MultipoleCall
from regard.ops.multipole.reference import multipole_attention_reference
from regard.ops.neighborhood.call import NeighborhoodCall
from regard.ops.neighborhood.reference import neighborhood_attention_reference
from regard.ops.routed import BlockOrder
from regard.ops.routed.arranging import block_sums_reference
from regard.ops.routed.call import RoutedCall
from regard.ops.routed.proxies import ProxyCall, proxy_lists
from regard.ops.routed.reference import attend_blocks, key_blocks

__all__ = ["DECOMPOSITIONS", "decomposed", "operators_left"]


_LARGEST, _TRIED = 10_000, 100  # sizes beyond the smallest, and how many of them are tried, for a condition on them


def _kept(scores: Tensor, topk: int) -> Tensor:
    if isinstance(topk, int) and topk == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return kept_above_kth(scores, topk)


def _heads_last(output: Tensor) -> Tensor:
    """(B, H, N, D) laid out as the operators do it: what follows may rely on it."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _knn(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, topk: int, is_causal: bool, scale: float
) -> tuple[Tensor, ...]:
    call = KNNCall(query, key, value, attn_mask, topk, 0.0, is_causal, scale)
    output = _heads_last(knn_attention_reference(call, _kept))
    # The rest is for the backward, which an exported program does not have.
    state = query.new_zeros(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))
    return output, state, state.clone(), query.new_zeros(query.shape[:-1], dtype=torch.int32)


def _knn_lists(query: Tensor, key: Tensor, visible: Tensor | None, topk: int) -> Tensor:
    return knn_lists_reference(query, key, visible, topk, kept=_kept)


def _knn_blocks(*operands: Any) -> Tensor:
    return _heads_last(knn_attention_reference(KNNCall.of_blocks_operands(*operands), _kept))


def _multipole(*operands: Any) -> Tensor:
    return _heads_last(multipole_attention_reference(MultipoleCall(*operands), _kept))


def _neighborhood(*operands: Any) -> Tensor:
    return _heads_last(neighborhood_attention_reference(NeighborhoodCall.of_operands(*operands)))


def _routed(*operands: Any) -> Tensor:
    call = RoutedCall(*operands)
    output = attend_blocks(call, key_blocks(call), slice(None), slice(None)).flatten(2, 3)
    # Not a slice, whose strides would depend on whether the last block is whole.
    tokens = torch.arange(call.query.shape[2], device=output.device)
    return _heads_last(output.index_select(2, tokens).to(call.query.dtype))


def _proxy_blocks(*operands: Any) -> Tensor:
    return proxy_lists(ProxyCall(*operands))


def _to_blocks(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    return BlockOrder(*map(tuple, order)).arrange(tokens).contiguous()


def _from_blocks(tokens: Tensor, *order: Sequence[int]) -> Tensor:
    return BlockOrder(*map(tuple, order)).restore(tokens).contiguous()


def _kmeans(
    x: Tensor, mask: Tensor | None, num_clusters: int, iterations: int, grid_size: list[int] | None
) -> tuple[Tensor, Tensor]:
    if mask is None and grid_size is not None and _any_unknown(num_clusters, *grid_size):
        raise NotImplementedError(
            "k-means spreads its start over the grid by a plan made for one size: with a grid_size, grid and "
            f"num_clusters must be constant, got grid {tuple(grid_size)} and {num_clusters} clusters. Export at a "
            "fixed image size (the batch may be dynamic), or without grid_size and with num_clusters an int"
        )
    lead, (tokens, channels) = x.shape[:-2], x.shape[-2:]
    flat = raised(x).reshape(-1, tokens, channels)
    shown = None if mask is None else mask.reshape(-1, tokens)
    if shown is None and grid_size is not None:
        start = _whole_numbers(spread_over_grid(tuple(grid_size), num_clusters), flat.device).expand(flat.shape[0], -1)
    else:
        start = start_tokens(flat, shown, num_clusters, None)
    start = start.unsqueeze(-1).expand(-1, -1, channels)
    assignment, centroids = lloyd(flat, shown, start, iterations, assign_at_once)
    return assignment.reshape(*lead, tokens), centroids.reshape(*lead, num_clusters, channels)


def _whole_numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """(len,) int64: a trace takes no tensor of given numbers, but filled ones; several numbers go into each."""
    base = max(numbers) + 1
    digits = max(1, int(62 * math.log(2) / math.log(max(base, 2))))
    words = [numbers[i : i + digits] for i in range(0, len(numbers), digits)]
    packed = [sum(n * base**i for i, n in enumerate(word)) for word in words]
    held, powers = (
        torch.cat([torch.full((1,), number, dtype=torch.int64, device=device) for number in given])
        for given in (packed, [base**i for i in range(digits)])
    )
    return (held.unsqueeze(1) // powers % base).flatten()[: len(numbers)]


def _squares(x: Tensor) -> Tensor:
    """(B, N, N) squared distances by a product, in float64: as differences they would take B N^2 C entries."""
    x = x.double()
    norms = x.square().sum(dim=-1)
    squares = norms.unsqueeze(2) + norms.unsqueeze(1) - 2.0 * (x @ x.mT)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squares.clamp(min=0.0).masked_fill(own, 0.0)


def _density_peaks(x: Tensor, num_clusters: list[int], neighbors: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    found, centers = density_peaks_reference(x, num_clusters, neighbors=neighbors, mask=mask, squares=_squares)
    return torch.stack(found), centers


def _any_unknown(*sizes: int) -> bool:
    return any(not isinstance(size, int) for size in sizes)


_OPS = torch.ops.regard
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _OPS.knn_attention.default: _knn,
    _OPS.knn_lists.default: _knn_lists,
    _OPS.knn_attention_blocks.default: _knn_blocks,
    _OPS.multipole_attention.default: _multipole,
    _OPS.multipole_attention_blocks.default: _multipole,
    _OPS.neighborhood_attention.default: _neighborhood,
    _OPS.neighborhood_attention_blocks.default: _neighborhood,
    _OPS.routed_attention.default: _routed,
    _OPS.routed_attention_gathered.default: _routed,
    _OPS.proxy_blocks.default: _proxy_blocks,
    _OPS.block_sums.default: block_sums_reference,
    _OPS.to_blocks.default: _to_blocks,
    _OPS.from_blocks.default: _from_blocks,
    _OPS.kmeans.default: _kmeans,
    _OPS.density_peak_clusters.default: _density_peaks,
}


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program without regard's operators: PyTorch's own operations compute what their references do.

    Ties go to the lowest index, as in the reference, whatever the runtime's top-k does with them.

    Raises:
        NotImplementedError: an operator cannot be decomposed at the sizes that are left dynamic; it says which.
    """
    environments = _shape_environments(program)
    before = [len(one.guards) for one in environments]
    with torch.no_grad():
        plain = program.run_decompositions(dict(DECOMPOSITIONS))
    if left := operators_left(plain):
        raise NotImplementedError(f"{', '.join(left)} cannot be decomposed; only forward operators can")
    for environment, count in zip(environments, before, strict=True):
        for guard in environment.guards[count:]:
            if not _holds_always(guard.expr, environment.var_to_range):
                raise NotImplementedError(
                    f"the decomposition holds only where {guard.expr}: a dynamic size is not free in it; fix that size"
                )
    return plain


def operators_left(program: ExportedProgram) -> list[str]:
    """The names of regard's operators that a program calls."""
    found = {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "regard"
    }
    return sorted(found)


def _holds_always(condition: Any, ranges: Mapping[Any, Any]) -> bool:
    """Whether a condition on sizes is true of every size tried: what asks it may be too hard for sympy to prove."""
    symbols = sorted(condition.free_symbols, key=str)
    bounds = []
    for symbol in symbols:
        low, high = int(ranges[symbol].lower), ranges[symbol].upper
        bounds.append((low, int(high) if high.is_finite and high < low + _LARGEST else low + _LARGEST))
    draw = random.Random(0)
    tried = [[low for low, _ in bounds], [high for _, high in bounds]]
    tried += [[draw.randint(*bound) for bound in bounds] for _ in range(_TRIED)]
    return all(condition.subs(dict(zip(symbols, sizes, strict=True))) == True for sizes in tried)  # noqa: E712 (sympy)


def _shape_environments(program: ExportedProgram) -> list[Any]:
    """Where the program's dynamic sizes are known, each once."""
    found: dict[int, Any] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        environment = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        if environment is not None:
            found[id(environment)] = environment
    return list(found.values())
