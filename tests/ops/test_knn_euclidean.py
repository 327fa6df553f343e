"""Keys chosen by Euclidean distance: against the distances themselves, and against the fast version for unit keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    HALVES,
    Largest,
    Shape,
    inputs,
    tells_the_slow_path_once,
    within_budget,
)
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import knn_attention
from regard.ops.knn import streamed
from regard.ops.knn.blocks_op import knn_attention_blocks_op

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")

GROUPED = Shape(heads=4, key_heads=2, queries=40, keys=40)


def mask_of(kind: str, shape: Shape = GROUPED) -> torch.Tensor | None:
    g = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "bool":
        mask = torch.rand(shape.batch, 1, shape.queries, shape.keys, generator=g) > 0.5
        mask[0, :, 3] = False  # a row that sees nothing
        return mask
    size = {"row": (1, 1, 1, shape.keys), "per_head": (1, shape.heads, shape.queries, shape.keys)}[kind]
    return torch.randn(size, generator=g).double()


def by_distances(query, key, value, topk: int, mask=None, causal: bool = False) -> torch.Tensor:
    """The definition: distances of all pairs, the nearest by a full sort, softmax of the scaled products over them.

    A bias b counts as -2 b / scale of squared distance.
    """
    groups, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    squares = (query.unsqueeze(3) - key.unsqueeze(2)).square().sum(dim=-1)
    hidden = torch.zeros(squares.shape, dtype=torch.bool)
    bias = torch.zeros(())
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        bias = mask
    if causal:
        hidden = hidden | ~torch.ones(squares.shape[-2:], dtype=torch.bool).tril()
    order = (squares - 2.0 * bias / scale).masked_fill(hidden, math.inf).sort(dim=-1, stable=True).indices
    kept = torch.zeros_like(hidden).scatter(-1, order[..., :topk], True) & ~hidden
    logits = (query @ key.mT * scale + bias).masked_fill(~kept, -math.inf)
    return logits.softmax(dim=-1).masked_fill(~kept.any(dim=-1, keepdim=True), 0.0) @ value


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "row", "per_head"])
@pytest.mark.parametrize("topk", [1, 7, 35])
def test_keeps_the_nearest_keys(kind: str, causal: bool, topk: int) -> None:
    query, key, value = (t.double() for t in inputs(GROUPED, exact=False))
    mask = mask_of(kind)
    found = knn_attention(
        query, key, value, topk=topk, attn_mask=mask, is_causal=causal, enable_gqa=True, metric="euclidean"
    )
    torch.testing.assert_close(found, by_distances(query, key, value, topk, mask, causal))


def test_other_keys_than_those_of_the_largest_logits() -> None:
    """A query at the origin has equal logits, so the fast version keeps the first keys; nearest are the shortest."""
    query, key, value = (t.double() for t in inputs(Shape(keys=20), exact=False))
    query = torch.zeros_like(query)
    shortest = key.norm(dim=-1).argsort(dim=-1)[..., :5]
    want = value.gather(2, shortest.unsqueeze(-1).expand(-1, -1, -1, 16)).mean(dim=2, keepdim=True).expand_as(query)
    torch.testing.assert_close(knn_attention(query, key, value, topk=5, metric="euclidean"), want)
    assert not torch.allclose(knn_attention(query, key, value, topk=5), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "row", "per_head"])
def test_unit_keys_equal_the_fast_version(kind: str, causal: bool) -> None:
    query, key, value = (t.double() for t in inputs(GROUPED, exact=False))
    options = {"topk": 0.2, "attn_mask": mask_of(kind), "is_causal": causal, "enable_gqa": True}
    fast, slow = (
        [knn_attention(query, k, value, metric=metric, **options) for k in (key, F.normalize(key, dim=-1))]
        for metric in ("dot", "euclidean")
    )
    torch.testing.assert_close(slow[1], fast[1])
    assert not torch.allclose(slow[0], fast[0])


def test_all_keys_is_dense_attention() -> None:
    query, key, value = inputs(GROUPED, exact=False)
    found = knn_attention(query, key, value, topk=1.0, enable_gqa=True, metric="euclidean")
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


def test_ties_go_to_the_lowest_index() -> None:
    query, key, value = inputs(Shape(keys=12), exact=True)
    same = key[:, :, :1].expand_as(key)
    found = knn_attention(query, same, value, topk=5, metric="euclidean")
    torch.testing.assert_close(found, value[:, :, :5].mean(dim=2, keepdim=True).expand_as(found))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dtypes_within_the_budget(dtype: torch.dtype) -> None:
    """Exact products: every implementation keeps the same keys."""
    query, key, value = inputs(Shape(dim=64, value_dim=24), dtype=dtype)
    exact = by_distances(query.double(), key.double(), value.double(), 9)
    found = knn_attention(query, key, value, topk=9, metric="euclidean")
    within_budget(found, [by_distances(query, key, value, 9)], exact)


@pytest.mark.parametrize("kind", ["none", "bool", "row", "per_head"])
def test_blocks_give_autograds_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time, causal, grouped heads: output and all gradients as of the formula; and second ones."""
    tensors = [t.double().requires_grad_() for t in inputs(GROUPED, exact=False)]
    mask = mask_of(kind)
    if mask is not None and mask.is_floating_point():
        tensors.append(mask.requires_grad_())
    grad = torch.randn(2, 4, 40, 16, generator=torch.Generator().manual_seed(2)).double()

    def ours(*t):
        return knn_attention(
            *t[:3], topk=7, attn_mask=mask, is_causal=True, enable_gqa=True, metric="euclidean", scale=0.25
        )

    def twice(attend):
        output = attend(*tensors)
        first = torch.autograd.grad(output, tensors, grad, create_graph=True)
        return output, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    want = twice(lambda *t: by_distances(*t[:3], 7, mask, True))
    monkeypatch.setattr(streamed, "_BLOCK", 2 * 4 * 40 * 11)  # pieces of 11 queries, the last of 7
    for found, expected in zip(twice(ours), want, strict=True):
        torch.testing.assert_close(found, expected)


def test_memory_stays_below_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", 1 << 14)
    query, key, value = (t.requires_grad_() for t in inputs(Shape(1, 1, 1, 600, 600, 8, 8), exact=False))
    with Largest() as largest:
        knn_attention(query, key, value, topk=9, metric="euclidean", is_causal=True).sum().backward()
    assert largest.elements <= 1 << 15 < 600 * 600


def test_opcheck() -> None:
    tensors = [t.requires_grad_() for t in inputs(Shape(heads=4, key_heads=2), exact=False)]
    bias = torch.randn(1, 4, 50, 50).requires_grad_()
    torch.library.opcheck(knn_attention_blocks_op, (*tensors, bias, None, 9, "euclidean", 0, True, 0.25))


def test_runs_on_the_pytorch_path_and_says_why() -> None:
    tensors = inputs(Shape(), exact=False)
    found = regard.explain(knn_attention, *tensors, topk=3, metric="euclidean")
    assert found.backend == "pytorch" and dict(found.refusals).keys() == {"cpu", "triton"}
    assert "metric='euclidean'" in dict(found.refusals)["cpu"]
    tells_the_slow_path_once(lambda *t: knn_attention(*t, topk=3, metric="euclidean"), tensors, "nearest in Euclidean")


def test_compiles_as_one_graph_at_any_size() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        lambda *t: knn_attention(*t, topk=0.25, is_causal=True, metric="euclidean"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for queries in (40, 64):
        plain = [t.requires_grad_() for t in inputs(Shape(queries=queries, keys=queries), exact=False)]
        want = knn_attention(*plain, topk=0.25, is_causal=True, metric="euclidean")
        got = compiled(*plain)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(output.square().sum(), plain) for output in (got, want)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1


def test_torch_func_and_dropout() -> None:
    tensors = inputs(Shape(), exact=False)
    want = knn_attention(*tensors, topk=9, metric="euclidean")
    mapped = torch.vmap(lambda *t: knn_attention(*t, topk=9, metric="euclidean"))(*tensors)
    torch.testing.assert_close(mapped, want)
    torch.manual_seed(0)
    wide = [t[:1, :1, :3].expand(4000, -1, -1, -1) for t in tensors]
    mean = knn_attention(*wide, topk=2, metric="euclidean", dropout_p=0.3).mean(dim=0, keepdim=True)
    plain = knn_attention(*(t[:1, :1, :3] for t in tensors), topk=2, metric="euclidean")
    torch.testing.assert_close(mean, plain, rtol=0.1, atol=0.05)


def test_flops_are_the_fast_versions() -> None:
    counts = []
    for metric in ("dot", "euclidean"):
        tensors = [t.requires_grad_() for t in inputs(Shape(), exact=False)]
        with FlopCounterMode(display=False) as counter:
            knn_attention(*tensors, topk=9, metric=metric).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("size", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_nothing_to_attend(size: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = size
    tensors = [t.requires_grad_() for t in inputs(Shape(batch, heads, heads, queries, keys))]
    output = knn_attention(*tensors, topk=3, metric="euclidean")
    assert output.shape == (batch, heads, queries, 16) and (output == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), tensors))


def test_bad_arguments() -> None:
    tensors = inputs(Shape())
    with pytest.raises(ValueError, match="metric: expected one of 'dot', 'euclidean', got 'cosine'"):
        knn_attention(*tensors, topk=3, metric="cosine")
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="scale: .* needs a positive one"):
            knn_attention(*tensors, topk=3, metric="euclidean", scale=scale)
        knn_attention(*tensors, topk=3, scale=scale)
