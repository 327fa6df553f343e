"""Routed attention beside dense attention, gather formulations and compiled FlexAttention, as BiFormer-S routes."""

import torch

from regard.benchmark.entry import Case, Entry, normal_attention
from regard.benchmark.gates import check_kernel
from regard.benchmark.peers import SDPA
from regard.benchmark.peers_routed import FLEX_ROUTED, GATHER, PUBLISHED_GATHER
from regard.ops import routed_attention

_TOPK = {2: 1, 4: 4}  # listed regions by heads: those of stages 1 and 2


_REGIONS = 7 * 7


def _case(stage: int, region: int, quick: bool = False) -> Case:
    """Regions of `region` tokens, in region-major order; stage 1 has 2 heads of 32, stage 2 has 4."""
    options = {"query_block": region, "key_block": region}
    series = f"stage {stage}, top {_TOPK[2 * stage]}"
    return Case(_REGIONS * region, heads=2 * stage, head_dim=32, series=series, options=options, quick=quick)


def _inputs(case: Case, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """Normal tokens; each region lists the best regions by the products of mean queries and mean keys of all heads."""
    plain = normal_attention(case, dtype, device)
    # In memory as a projection leaves them, channels last: that is what the published formulation works on.
    tensors = {name: one.transpose(1, 2).contiguous().transpose(1, 2) for name, one in plain.items()}
    region = case.options["query_block"]
    means = [tensors[name].double().unflatten(2, (-1, region)).mean(dim=3) for name in ("query", "key")]
    affinity = torch.einsum("bhqd,bhkd->bqk", *means)
    topk = _TOPK[case.heads]
    return {**tensors, "blocks": affinity.topk(topk, dim=-1).indices.unsqueeze(1)}


ENTRY = Entry(
    name="routed",
    operator="routed_attention",
    # At 224 pixels maps of 56 and 28 tokens a side; at 1024 pixels of 256 and 128, padded to whole regions.
    cases=(_case(1, 8**2), _case(2, 4**2, quick=True), _case(1, 37**2), _case(2, 19**2)),
    inputs=_inputs,
    gate=lambda case, tensors, backward: check_kernel(
        routed_attention, tensors, options=case.options, formulations=[GATHER.make(case)], backward=backward
    ),
    peers=(SDPA, PUBLISHED_GATHER, GATHER, FLEX_ROUTED),
)
