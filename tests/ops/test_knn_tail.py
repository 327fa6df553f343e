"""A sampled tail: its identities, its distribution, its gradients, and how its sample is drawn again."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import HALVES, LAYOUTS, Largest, Shape, inputs, tells_the_slow_path_once, within_budget
from torch.utils.checkpoint import checkpoint

import regard
from regard import knn_attention
from regard.ops import tail_samples_for
from regard.ops.knn import streamed
from regard.ops.knn.api import _bind
from regard.ops.knn.blocks_op import knn_attention_blocks_op
from regard.ops.knn.reference import knn_attention_reference, logits
from regard.ops.knn.tail import QUERIES_PER_ORDER, orders_of_rows, seed_tensor

pytestmark = pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")

GROUPED = Shape(heads=4, key_heads=2, queries=40, keys=40)
KINDS = ("none", "bool", "row", "per_head")


def sampled(*tensors, topk=7, num_samples=5, seed: int | None = 3, **options):
    return knn_attention(*tensors, topk=topk, tail="sample", num_samples=num_samples, seed=seed, **options)


def reference(*tensors, topk=7, num_samples=5, seed=3, **options):
    return knn_attention_reference(
        _bind(*tensors, topk=topk, tail="sample", num_samples=num_samples, seed=seed, **options)[0]
    )


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


def weights_of(query, key, **options):
    """(B, H, N, M) weights, read off identity values."""
    keys = key.shape[2]
    return sampled(query, key, torch.eye(keys, dtype=key.dtype).expand(*key.shape[:2], keys, keys), **options)


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", [33, 100])
def test_the_whole_tail_is_dense_attention(kind: str, causal: bool, num_samples: int) -> None:
    query, key, value = (t.double() for t in inputs(GROUPED, exact=False))
    options = {"attn_mask": mask_of(kind), "is_causal": causal, "enable_gqa": True}
    want = knn_attention(query, key, value, topk=1.0, **options)
    torch.testing.assert_close(sampled(query, key, value, num_samples=num_samples, **options), want)


def test_no_samples_is_the_dropped_tail() -> None:
    tensors = inputs(GROUPED, exact=False)
    found = sampled(*tensors, num_samples=0, enable_gqa=True)
    assert torch.equal(found, knn_attention(*tensors, topk=7, enable_gqa=True))


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_its_kept_keys_and_its_weighted_sample(kind: str, causal: bool, metric: str) -> None:
    """The definition, row by row: as many samples as asked for or as there are, and the softmax of raised logits."""
    query, key, _ = (t.double() for t in inputs(GROUPED, exact=False))
    options = {"topk": 7, "attn_mask": mask_of(kind), "is_causal": causal, "enable_gqa": True, "metric": metric}
    scores = logits(_bind(query, key, key, **options)[0])
    eye = torch.eye(40).double().expand(2, 2, 40, 40)
    kept = knn_attention(query, key, eye, **options) > 0.0
    weights = weights_of(query, key, **options)
    counted = weights > 0.0
    tail = (scores > -math.inf) & ~kept
    assert (counted >= kept).all() and (tail >= (counted & ~kept)).all()
    size = tail.sum(-1, keepdim=True)
    drawn = size.clamp(max=5)
    assert torch.equal((counted & tail).sum(-1, keepdim=True), drawn)
    raised = scores + torch.where(tail, (size / drawn.clamp(min=1)).log(), 0.0)
    want = raised.masked_fill(~counted, -math.inf).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(weights, want)


# ---- distribution ----------------------------------------------------------------------------------------------------


def test_every_set_of_the_tail_is_as_likely() -> None:
    """Each key alone and each pair of keys, over many heads, which draw independently: chi-square within 5 sigma."""
    heads, keys, topk, drawn = 4000, 12, 2, 3
    query = torch.ones(1, heads, 1, 8).double()
    key = torch.arange(keys, 0, -1).double()[:, None].expand(1, heads, keys, 8) / 80
    chosen = (weights_of(query, key, topk=topk, num_samples=drawn)[0, :, 0] > 0.0).double()
    assert (chosen[:, :topk] == 1.0).all() and (chosen.sum(-1) == topk + drawn).all()
    counts = chosen[:, topk:].mT @ chosen[:, topk:]
    tail = keys - topk
    for found, p in (
        (counts.diagonal(), drawn / tail),
        (counts[*torch.triu_indices(tail, tail, 1)], drawn * (drawn - 1) / tail / (tail - 1)),
    ):
        z = (found - heads * p) / math.sqrt(heads * p * (1 - p))
        assert z.abs().max() < 5.0 and 0.5 < z.square().mean() < 2.0


@pytest.mark.parametrize("drawn", [4, 16])
def test_numerator_and_denominator_are_unbiased_with_the_variance_of_a_simple_sample(drawn: int) -> None:
    """The mean of many draws is dense attention's, within 5 standard errors; the variance falls as 1 / num_samples,
    but for what sampling without repeats saves: (m^2 / l) (1 - l / m) times the tail's variance.
    """
    heads, keys, topk = 6000, 40, 8
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, 16, generator=g).double() for n in (1, keys))
    value = torch.randn(keys, generator=g).double()
    scores = (query @ key.mT * 0.25)[0]
    weights = weights_of(
        query.expand(1, heads, 1, 16), key.expand(1, heads, keys, 16), topk=topk, num_samples=drawn, seed=drawn
    )[0, :, 0]
    best = scores.argmax()
    denominator = scores[best].exp() / weights[:, best]  # the best key is always kept
    numerator = weights @ value * denominator
    tail = torch.ones(keys, dtype=torch.bool)
    tail[scores.topk(topk).indices] = False
    m = int(tail.sum())
    for found, terms in ((denominator, scores.exp()), (numerator, scores.exp() * value)):
        variance = m**2 / drawn * (1 - drawn / m) * terms[tail].var()
        assert (found.mean() - terms.sum()).abs() < 5.0 * (variance / heads).sqrt()
        assert 0.9 < found.var() / variance < 1.1


def test_the_bound_holds_for_the_worst_data() -> None:
    """Half of the tail as large as the k-th logit, half of it nothing: the widest range that the bound allows for."""
    heads, keys, topk, eps, delta = 2000, 300, 30, 0.3, 0.05
    needed = tail_samples_for(keys, topk, eps=eps, delta=delta)
    assert 0 < needed < keys - topk
    key = torch.zeros(keys, 8).double()
    key[topk::2] = -100.0
    weights = weights_of(
        torch.ones(1, heads, 1, 8).double(), key.expand(1, heads, keys, 8), topk=topk, num_samples=needed
    )
    whole = float((key[:, 0] == 0.0).sum())
    error = (1.0 / weights[0, :, 0, 0] / whole - 1.0).abs()
    assert error.max() > 0.0 and (error > eps).double().mean() <= delta


def test_samples_that_a_bound_asks_for() -> None:
    by_hand = (270 / 30) ** 2 * math.log(2 / 0.05) / (2 * 0.3**2)
    assert tail_samples_for(300, 30, eps=0.3, delta=0.05) == math.ceil(by_hand * 271 / (by_hand + 270))
    assert tail_samples_for(300, 30, eps=1e-6, delta=0.05) == 270  # without repeats never more than the tail
    assert tail_samples_for(30, 30, eps=0.1, delta=0.1) == tail_samples_for(30, 99, eps=0.1, delta=0.1) == 0
    for wrong in ({"eps": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"keys": 0}, {"topk": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tail_samples_for(**({"keys": 9, "topk": 3, "eps": 0.1, "delta": 0.1} | wrong))


# ---- gradients and blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_autograds_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some queries at a time, causal, grouped heads: output and all gradients as the reference's, and second ones."""
    shape = Shape(heads=4, key_heads=2, queries=150, keys=150)
    tensors = [t.double().requires_grad_() for t in inputs(shape, exact=False)]
    mask = mask_of(kind, shape)
    if mask is not None and mask.is_floating_point():
        tensors.append(mask.requires_grad_())
    grad = torch.randn(2, 4, 150, 16, generator=torch.Generator().manual_seed(2)).double()

    def twice(attend):
        output = attend(*tensors[:3], attn_mask=mask, is_causal=True, enable_gqa=True)
        first = torch.autograd.grad(output, tensors, grad, create_graph=True)
        return output, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    monkeypatch.setattr(streamed, "_BLOCK", 2 * 4 * 150 * 11)  # pieces of 11 queries: orders begin within them
    for found, expected in zip(twice(sampled), twice(reference), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    """Exact products: every dtype keeps and draws the same keys."""
    tensors = [LAYOUTS[layout](t) for t in inputs(Shape(dim=64, value_dim=24), dtype=dtype)]
    exact = reference(*(t.double() for t in tensors))
    plain = reference(*(t.contiguous() for t in tensors))
    within_budget(sampled(*tensors), [plain], exact)


def test_memory_stays_below_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BLOCK", 1 << 14)
    tensors = [t.requires_grad_() for t in inputs(Shape(1, 1, 1, 600, 600, 8, 8), exact=False)]
    with Largest() as largest:
        sampled(*tensors, is_causal=True).sum().backward()
    assert largest.elements <= 1 << 15 < 600 * 600


# ---- the draw --------------------------------------------------------------------------------------------------------


def test_an_order_depends_on_seed_head_and_block_of_queries() -> None:
    rows = 2 * QUERIES_PER_ORDER + 1
    order = orders_of_rows(torch.tensor(5), 3, 0, rows, 30)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(30).expand(3, rows, 30))
    assert torch.equal(order[:, 1:QUERIES_PER_ORDER], order[:, :1].expand(-1, QUERIES_PER_ORDER - 1, -1))
    distinct = {tuple(o.tolist()) for seed in (5, 6, 5 << 32) for o in drawn_of(seed)}
    assert len(distinct) == 3 * 3 * 3
    assert torch.equal(orders_of_rows(torch.tensor(5), 3, 70, 90, 30), order[:, 70:90])


def drawn_of(seed: int) -> torch.Tensor:
    every = orders_of_rows(torch.tensor(seed), 3, 0, 3 * QUERIES_PER_ORDER, 30)
    return every[:, ::QUERIES_PER_ORDER].flatten(0, 1)


def test_seeds() -> None:
    query, key, value = inputs(Shape(), exact=False)
    first = sampled(query, key, value)
    assert torch.equal(sampled(query, key, value, seed=torch.tensor([3])), first)
    assert not torch.allclose(sampled(query, key, value, seed=4), first)
    assert torch.equal(sampled(query[1:], key[1:], value[1:]), first[1:])  # the images of a batch share it
    drawn = []
    for _ in range(2):
        torch.manual_seed(9)
        drawn.append([sampled(query, key, value, seed=None) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.allclose(*drawn[0])


def test_explaining_draws_nothing() -> None:
    tensors = inputs(Shape(), exact=False)
    before = torch.get_rng_state()
    found = regard.explain(knn_attention, *tensors, topk=3, tail="sample")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.backend == "pytorch" and dict(found.refusals).keys() == {"cpu", "triton"}
    tells_the_slow_path_once(sampled, tensors, "a sampled tail")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant: bool) -> None:
    def attend(*tensors):
        return sampled(*tensors, seed=None)

    grads = []
    for run in (attend, lambda *tensors: checkpoint(attend, *tensors, use_reentrant=reentrant)):
        torch.manual_seed(0)
        tensors = [t.requires_grad_() for t in inputs(Shape(), exact=False)]
        run(*tensors).square().sum().backward()
        grads.append([t.grad for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_it_draws_anew_at_each_call_and_goes_back_the_same_way() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: sampled(*t, seed=None), fullgraph=True, backend="aot_eager")
    tensors = [t.requires_grad_() for t in inputs(Shape(), exact=False)]
    torch.manual_seed(0)
    outputs = [compiled(*tensors) for _ in range(2)]
    assert not torch.allclose(*outputs)
    for output in outputs:  # linear in the value: the gradient under ones are the weights that were used
        (grad,) = torch.autograd.grad(output, tensors[2], torch.ones_like(output), retain_graph=True)
        torch.testing.assert_close((grad * tensors[2]).sum((1, 2, 3)), output.sum((1, 2, 3)))
    torch.manual_seed(0)
    assert torch.equal(compiled(*tensors), outputs[0])


def test_exported_with_a_number_it_is_a_constant_without_one_it_is_drawn_at_each_call() -> None:
    tensors = inputs(Shape(), exact=False)
    for seed, repeats in ((3, True), (None, False)):

        class Layer(torch.nn.Module):
            seed: int | None

            def forward(self, query, key, value):
                return sampled(query, key, value, seed=self.seed)

        Layer.seed = seed
        program = torch.export.export(Layer(), tensors).module()
        assert torch.equal(program(*tensors), program(*tensors)) == repeats
        assert torch.equal(program(*tensors), sampled(*tensors)) == repeats


def test_opcheck() -> None:
    tensors = [t.requires_grad_() for t in inputs(Shape(heads=4, key_heads=2), exact=False)]
    bias, seed = torch.randn(1, 4, 50, 50).requires_grad_(), torch.tensor(1)
    torch.library.opcheck(knn_attention_blocks_op, (*tensors, bias, seed, 9, "dot", 4, True, 0.25))


def test_torch_func_and_dropout() -> None:
    tensors = inputs(Shape(), exact=False)
    torch.testing.assert_close(torch.vmap(sampled)(*tensors), sampled(*tensors))
    torch.manual_seed(0)
    query, key, value = (t[:1, :1, :10] for t in tensors)
    wide = [t.expand(4000, -1, -1, -1) for t in (query, key, value)]
    options = {"topk": 3, "num_samples": 3}
    mean = sampled(*wide, dropout_p=0.3, **options).mean(dim=0, keepdim=True)
    torch.testing.assert_close(mean, sampled(query, key, value, **options), rtol=0.1, atol=0.06)


@pytest.mark.parametrize("size", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
def test_nothing_to_attend(size: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = size
    tensors = [t.requires_grad_() for t in inputs(Shape(batch, heads, heads, queries, keys))]
    output = sampled(*tensors, topk=3)
    assert output.shape == (batch, heads, queries, 16) and (output == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), tensors))


def test_nan_and_infinity_go_where_dense_attention_takes_them() -> None:
    query, key, value = inputs(Shape(), exact=False)
    query[0, 0, 3] = math.nan
    key[1, 1, 4] = math.inf
    found, dense = sampled(query, key, value), F.scaled_dot_product_attention(query, key, value)
    assert found[0, 0, 3].isnan().all() and torch.equal(found[0].isnan(), dense[0].isnan())
    assert found[1, 0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tail": "cut"}, ValueError, "tail: expected one of 'drop', 'sample', got 'cut'"),
        ({"num_samples": -1}, ValueError, "num_samples: expected at least 0, got -1"),
        ({"num_samples": 0.5}, TypeError, "num_samples: expected an int, got float"),
        ({"seed": -1}, ValueError, "seed: expected 0 to"),
        ({"seed": 1 << 63}, ValueError, "seed: expected 0 to"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, an int64 tensor or None, got float"),
        ({"seed": True}, TypeError, "seed: .* got bool"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected an int64 tensor, got torch.float32"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed: expected one element on cpu, got \(2,\) on cpu"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed: expected one element on cpu, got .* on meta"),
    ],
)
def test_bad_arguments(options, error, said) -> None:
    with pytest.raises(error, match=said):
        knn_attention(*inputs(Shape()), **({"topk": 3, "tail": "sample", "seed": 0} | options))


def test_a_seed_of_ones_own_generator() -> None:
    draws = {int(seed_tensor(None, torch.device("cpu"))) for _ in range(5)}
    assert len(draws) == 5 and min(draws) >= 0
