"""The simulator's windows are those that neighborhood_attention computes with."""

import itertools

import pytest
import torch

from regard.benchmark.peers_local import unfold_neighborhood_attention
from regard.ops import neighborhood_attention
from regard.simulation import NeighborhoodPattern, window_bounds
from regard.simulation.windows import group_lengths

AXES = [
    (length, window, stride, dilation, causal)
    for length, window, dilation, causal in itertools.product((7, 12, 13), (2, 3, 4, 6), (1, 2, 3), (False, True))
    for stride in sorted({1, 2, window})
    if window * dilation <= length
]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_every_query_sees_the_keys_of_its_window(axis):
    length, window, stride, dilation, causal = axis
    alike = torch.zeros(1, 1, length, 8, dtype=torch.float64)  # all logits equal: a key has weight or it is not seen
    values = torch.eye(length, dtype=torch.float64).expand(1, 1, -1, -1)
    options = {"grid_size": [length], "kernel_size": window, "stride": stride, "dilation": dilation}
    seen = neighborhood_attention(alike, alike, values, is_causal=causal, **options)[0, 0] != 0
    expected = torch.zeros(length, length, dtype=torch.bool)
    for token in range(length):
        index, group = divmod(token, dilation)
        tokens = len(range(group, length, dilation))
        start, end = window_bounds(index, tokens, window, stride, causal)
        expected[token, [group + dilation * key for key in range(start, end)]] = True
    assert torch.equal(seen, expected)
    assert sum(tokens * groups for tokens, groups in group_lengths(length, dilation)) == length


def test_the_unfold_formulation_computes_the_same():
    pattern = NeighborhoodPattern((6, 9), (3, 4), (1, 2), (2, 1), (False, True))
    query, key, value = torch.randn(3, 1, 2, 54, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {name: list(getattr(pattern, name)) for name in ("grid_size", "kernel_size", "stride", "dilation")}
    found = neighborhood_attention(query, key, value, is_causal=list(pattern.is_causal), **options)
    torch.testing.assert_close(found, unfold_neighborhood_attention(query, key, value, pattern))
