"""Density peak clustering beside the published formulation, at the stages of clustr_b2 and beyond."""

from regard.benchmark.entry import Case, Entry, normal_tokens
from regard.benchmark.gates import check_density_peaks
from regard.benchmark.peers import PUBLISHED_DENSITY_PEAKS


def _case(tokens: int, batch: int, channels: int, quick: bool = False) -> Case:
    counts = [tokens // 64, tokens // 16] if tokens > 3136 else [49, min(196, tokens)]
    series = f"C {channels}, M {' and '.join(map(str, counts))}"
    return Case(tokens, batch, 1, channels, series, {"num_clusters": counts}, quick)


ENTRY = Entry(
    name="density_peaks",
    operator="density_peak_clusters",
    cases=(
        _case(784, 4, 64),
        _case(3136, 4, 64, quick=True),
        _case(784, 4, 128),
        _case(196, 4, 256),
        _case(4096, 1, 384),
    ),
    inputs=normal_tokens,
    has_gradient=False,
    gate=lambda case, tensors, backward: check_density_peaks(**tensors, **case.options),
    peers=(PUBLISHED_DENSITY_PEAKS,),
)
