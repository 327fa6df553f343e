"""knn_lists: the keys with the largest products, as lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.ops import explain, only_backend
from regard.ops._selection import kept_by_threshold
from regard.ops.knn.lists import knn_lists, knn_lists_reference


def whole(*shape, low=-2, high=3, seed=0):
    """Small whole numbers: their products are exact in every order of summation, and full of ties."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_hand(query, key, topk, visible=None):
    """Row by row, sorted in Python: largest first, then lowest index."""
    scores = query.double() @ key.double().mT
    lists = torch.full((*query.shape[:-1], topk), -1)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        row = scores[b, h, n].tolist()
        keys = [m for m in range(len(row)) if visible is None or visible[b, m]]
        kept = sorted(sorted(keys, key=lambda m: (-row[m], m))[:topk])
        lists[b, h, n, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return lists


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
@pytest.mark.parametrize(("keys", "topk"), [(1, 1), (7, 3), (40, 40), (40, 39), (197, 50), (300, 5)])
def test_the_largest_with_ties_to_the_lowest_index(backend, keys, topk):
    query, key = whole(2, 3, 5, 4), whole(2, 3, keys, 4, seed=1)
    if backend == "cpu" and explain("knn_lists", query, key, topk=topk).backend != "cpu":
        pytest.skip("the kernels are not built")
    with only_backend(backend):
        assert torch.equal(knn_lists(query, key, topk=topk), by_hand(query, key, topk))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.data())
def test_any_problem_agrees_with_the_reference(seed, keys, data):
    topk = data.draw(st.integers(1, keys))
    query, key = whole(1, 2, 9, 3, seed=seed), whole(1, 2, keys, 3, seed=seed + 1)
    visible = (torch.rand(1, keys, generator=torch.Generator().manual_seed(seed)) < 0.7) if seed % 2 else None
    expected = knn_lists_reference(query, key, visible, topk)
    assert torch.equal(knn_lists(query, key, topk=topk, visible=visible), expected)
    assert torch.equal(knn_lists_reference(query, key, visible, topk, kept=kept_by_threshold), expected)


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
def test_hidden_keys_are_on_no_list(backend):
    query, key = whole(3, 2, 6, 4), whole(3, 2, 20, 4, seed=1)
    visible = torch.zeros(3, 20, dtype=torch.bool)
    visible[1, [2, 3, 19]] = True
    visible[2, 4:] = True
    with only_backend(backend):
        lists = knn_lists(query, key, topk=8, visible=visible)
    assert torch.equal(lists, by_hand(query, key, 8, visible))
    assert (lists[0] == -1).all() and lists[1, 0, 0].tolist() == [2, 3, 19, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    query, key = whole(1, 2, 5, 4), whole(1, 2, 30, 4, seed=1)
    assert torch.equal(knn_lists(query.to(dtype), key.to(dtype), topk=9), by_hand(query, key, 9))


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
def test_expanded_and_strided_operands(backend):
    query, key = whole(4, 5, 2, 3).permute(2, 3, 1, 0), whole(30, 4, seed=1)
    with only_backend(backend):
        lists = knn_lists(query, key.expand(2, 3, -1, -1), topk=9)
    assert torch.equal(lists, by_hand(query, key.expand(2, 3, -1, -1), 9))


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
def test_not_a_number_counts_as_largest(backend):
    query, key = torch.ones(1, 1, 2, 1), torch.arange(12.0).reshape(1, 1, 12, 1)
    key[0, 0, [2, 5], 0] = torch.tensor([float("nan"), float("inf")])
    with only_backend(backend):
        assert knn_lists(query, key, topk=1)[0, 0].tolist() == [[2], [2]]
        assert knn_lists(query, key, topk=3)[0, 0].tolist() == [[2, 5, 11], [2, 5, 11]]


@pytest.mark.parametrize("backend", ["cpu", "pytorch"])
@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3)])
def test_empty(backend, shape):
    with only_backend(backend):
        assert knn_lists(torch.zeros(shape), torch.zeros(*shape[:2], 7, 3), topk=4).shape == (*shape[:3], 4)


def test_compiles_exports_and_maps():
    query, key = whole(2, 2, 5, 3), whole(2, 2, 16, 3, seed=1)
    expected = knn_lists_reference(query, key, None, 4)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k: knn_lists(q, k, topk=4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key), expected)
    mapped = torch.func.vmap(lambda q, k: knn_lists(q, k, topk=4))
    assert torch.equal(mapped(query[None], key[None])[0], expected)
    torch.library.opcheck(torch.ops.regard.knn_lists, (query, key, None, 4))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"topk": 0}, ValueError, "topk: expected 1 to 7 keys, got 0"),
        ({"topk": 8}, ValueError, "topk: expected 1 to 7 keys, got 8"),
        ({"key": torch.zeros(2, 2, 7, 4)}, ValueError, "key: shape"),
        ({"visible": torch.ones(2, 7)}, TypeError, "visible: expected a boolean tensor"),
        ({"visible": torch.ones(2, 6, dtype=torch.bool)}, ValueError, "visible: shape"),
    ],
)
def test_bad_arguments(changes, error, said):
    arguments = {"key": torch.zeros(2, 2, 7, 3), "topk": 2, **changes}
    with pytest.raises(error, match=said):
        knn_lists(torch.zeros(2, 2, 5, 3), **arguments)
