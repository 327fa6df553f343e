"""Neighborhood attention beside dense attention, the unfold formulation, compiled FlexAttention and natten."""

import math

from regard.benchmark.entry import Case, Entry
from regard.benchmark.gates import check_kernel
from regard.benchmark.peers import SDPA
from regard.benchmark.peers_local import FLEX_NEIGHBORHOOD, NATTEN, UNFOLD
from regard.ops import neighborhood_attention


def _case(grid: tuple[int, ...], kernel: int | tuple[int, ...], quick: bool = False) -> Case:
    """Four heads of 32, as in the second stage of NAT-Mini and -Tiny."""
    window = [kernel] * len(grid) if isinstance(kernel, int) else list(kernel)
    options = {"grid_size": list(grid), "kernel_size": window}
    series = f"window {'x'.join(map(str, window))}"
    return Case(math.prod(grid), heads=4, head_dim=32, series=series, options=options, quick=quick)


ENTRY = Entry(
    name="neighborhood",
    operator="neighborhood_attention",
    cases=(
        _case((28, 28), 7),
        _case((56, 56), 7, quick=True),
        _case((112, 112), 7),
        _case((56, 56), 13),
        _case((16, 32, 32), (5, 7, 7)),
    ),
    gate=lambda case, tensors, backward: check_kernel(
        neighborhood_attention, tensors, options=case.options, formulations=[UNFOLD.make(case)], backward=backward
    ),
    peers=(SDPA, UNFOLD, FLEX_NEIGHBORHOOD, NATTEN),
)
