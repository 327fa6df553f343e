"""k-means, two iterations from a spread start, beside Lloyd's iterations in plain PyTorch operations."""

from regard.benchmark.entry import Case, Entry, normal_tokens
from regard.benchmark.gates import check_kmeans
from regard.benchmark.peers import EAGER_KMEANS


def _case(tokens: int, clusters: int, quick: bool = False) -> Case:
    """Six heads of 64 as a batch: what multipole attention clusters."""
    return Case(tokens, 6, 1, 64, "M = 4 sqrt(N)", {"num_clusters": clusters}, quick)


ENTRY = Entry(
    name="kmeans",
    operator="kmeans_clusters",
    cases=(_case(1024, 128, quick=True), _case(4096, 256, quick=True), _case(16384, 512)),
    inputs=normal_tokens,
    has_gradient=False,
    gate=lambda case, tensors, backward: check_kmeans(**tensors, **case.options),
    peers=(EAGER_KMEANS,),
)
