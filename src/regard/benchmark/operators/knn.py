"""k-NN attention beside dense attention and the published formulation."""

from regard.benchmark.entry import Case, Entry
from regard.benchmark.gate import check_knn
from regard.benchmark.peers import PUBLISHED_KNN, SDPA


def _case(tokens: int, part: int, batch: int = 1, quick: bool = False) -> Case:
    return Case(tokens, batch, series=f"k = N/{part}", options={"topk": 1 / part}, quick=quick)


ENTRY = Entry(
    name="knn",
    operator="knn_attention",
    cases=(
        _case(196, 2, batch=8),
        _case(1024, 2),
        _case(4096, 2),
        _case(1024, 16, quick=True),
        _case(4096, 16, quick=True),
    ),
    gate=lambda case, tensors, backward: check_knn(**tensors, **case.options, backward=backward, units=1),
    peers=(SDPA, PUBLISHED_KNN),
)
