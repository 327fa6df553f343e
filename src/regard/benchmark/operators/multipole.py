"""Multipole attention beside dense attention. The time includes the clustering of the keys."""

import dataclasses

from regard.benchmark.entry import Case, Entry, square_side
from regard.benchmark.gates import check_multipole
from regard.benchmark.peers import SDPA


def _case(tokens: int, quick: bool = False) -> Case:
    """With a near field that grows with the image. One prefix token before a square image, as in a ViT."""
    side = square_side(tokens - 1)
    options = {"num_clusters": None, "near": 0.1, "num_prefix_tokens": 1, "grid_size": [side, side]}
    return Case(tokens, series="near 0.1", options=options, quick=quick)


def _fast_case(tokens: int) -> Case:
    """With as many clusters near at every size, and without iterations of k-means."""
    case = _case(tokens)
    return dataclasses.replace(case, series="12 near", options={**case.options, "near": 12, "iterations": 0})


ENTRY = Entry(
    name="multipole",
    operator="multipole_attention",
    cases=(
        _case(1025, quick=True),
        _case(4097, quick=True),
        _case(16385),
        _fast_case(1025),
        _fast_case(4097),
        _fast_case(16385),
    ),
    gate=lambda case, tensors, backward: check_multipole(**tensors, options=case.options, backward=backward),
    peers=(SDPA,),
    approximates=True,
)
