"""multipole_attention(tolerance=...): the bound holds for any input, is not empty, and grows the near field by need."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS
from multipole_cases import attend, call_of, in_float64
from torch import Tensor

import regard
from regard import Multipole, multipole_attention
from regard.ops import only_backend
from regard.ops._selection import kept_by_stable_sort
from regard.ops.multipole.reference import far_field, multipole_attention_reference, near_clusters

on_backends = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(seed: int, spread: float, *, clusters: int = 12, each: int = 7, rows: int = 40, dim: int = 12):
    """Query, key and value, keys in groups of `each` with a deviation between `spread` and `spread` / 100."""
    middles = normal(1, 2, clusters, 1, dim, seed=seed)
    spreads = spread * torch.logspace(0, -2, clusters)[:, None, None]
    key = (middles + spreads * normal(1, 2, clusters, each, dim, seed=seed + 1)).flatten(2, 3)
    return normal(1, 2, rows, dim, seed=seed + 2), key, normal(1, 2, clusters * each, dim, seed=seed + 3)


def grouped_call(seed: int, spread: float, near: int, tolerance: float, **sizes):
    tensors = grouped(seed, spread, **sizes)
    groups = torch.arange(tensors[1].shape[2]) // sizes.get("each", 7)
    assignment = groups.expand(1, 2, -1).contiguous()
    call = call_of(tensors, [1] * (int(groups.max()) + 1), near, far="centroid", assignment=assignment)
    return dataclasses.replace(call, tolerance=tolerance)


def near_of(call) -> Tensor:
    call = in_float64(call)
    return near_clusters(call, far_field(call), call.grouped(call.query), kept_by_stable_sort)[1]


def largest_distance(value: Tensor) -> Tensor:
    """(B, H, 1): between two values of a head."""
    return torch.cdist(value, value).amax(dim=(-2, -1)).unsqueeze(-1)


@pytest.mark.parametrize(
    ("backend", "dtype"), [*((one, torch.float32) for one in BACKENDS), ("pytorch", torch.float64)]
)
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_the_bound_holds(backend, dtype, tolerance, factor):
    """Whatever the clusters: here those of k-means in noise, the worst case."""
    query, key, value = (normal(2, 4, 61, 8, seed=s, dtype=dtype) for s in (1, 2, 3))
    key, value = key[:, :2], 5.0 * value[:, :2]
    visible = torch.rand(2, 1, 1, 61, generator=torch.Generator().manual_seed(4)) < 0.8
    visible[..., 0] = True
    with only_backend(backend):
        found = multipole_attention(
            factor * query,
            key,
            value,
            num_clusters=13,
            near=1,
            num_prefix_tokens=2,
            attn_mask=visible,
            enable_gqa=True,
            tolerance=tolerance,
        )
    dense = F.scaled_dot_product_attention(
        factor * query.double(), key.double(), value.double(), attn_mask=visible, enable_gqa=True
    )
    distance = largest_distance(value.double()).repeat_interleave(2, dim=1)
    error = (found.double() - dense).norm(dim=-1)
    rounding = 1e-4 if dtype == torch.float32 else 1e-12
    assert (error <= tolerance * distance + rounding).all()
    assert tolerance == 0.0 or error.max() > 10 * rounding, "nothing was left far: the case tells nothing"


@on_backends
def test_keys_alike_need_no_near_cluster(backend):
    call = grouped_call(0, 0.0, 0, 0.0)
    key = (4.0 * call.key[:, :, ::7]).round().repeat_interleave(7, dim=2)  # whole numbers: their means are exact
    call = dataclasses.replace(call, key=key)
    assert not near_of(call).any()
    dense = F.scaled_dot_product_attention(call.query, key, call.value)
    torch.testing.assert_close(attend(call, backend), dense, rtol=1e-5, atol=1e-5)


@on_backends
@pytest.mark.parametrize("near", [0, 3])
def test_a_wide_tolerance_changes_nothing(backend, near):
    call = grouped_call(1, 0.5, near, 1e30)
    assert torch.equal(attend(call, backend), attend(dataclasses.replace(call, tolerance=math.inf), backend))


@pytest.mark.parametrize("near", [0, 3])
def test_a_narrower_tolerance_resolves_more(near):
    shares = []
    for tolerance in (1e30, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 0.0):
        call = grouped_call(2, 0.3, near, tolerance)
        resolved = near_of(call)
        assert (resolved.sum(-1) >= near).all()
        shares.append(resolved.double().mean().item())
    assert shares == sorted(shares)
    assert shares[0] == near / 12 and shares[-1] == 1.0
    assert len(set(shares)) > 4, "every tolerance has a near field of its own"


def test_tight_clusters_stay_far():
    """The bound is of use: with a tolerance of a hundredth most clusters need not be resolved."""
    share = near_of(grouped_call(3, 0.02, 0, 0.01)).double().mean().item()
    assert 0.0 < share < 0.3


def error_of(call, row: Tensor, cluster: int) -> float:
    """m min(1, x) exp(x) over the mass of all clusters, by plain arithmetic."""
    groups = call.assignment[0, 0]
    masses, worst = [], 0.0
    for c in range(call.num_clusters):
        keys = call.key[0, 0, groups == c].double()
        mean = keys.mean(dim=0)
        mass = len(keys) * math.exp(call.scale * float(row.double() @ mean))
        masses.append(mass)
        if c == cluster:
            reach = call.scale * float(row.double().norm()) * float((keys - mean).norm(dim=-1).max())
            worst = mass * min(1.0, reach) * math.exp(reach)
    return worst / sum(masses)


def test_those_that_err_most_are_resolved_and_no_more():
    call = grouped_call(4, 0.4, 2, 0.05, rows=6)
    by_rank = near_of(dataclasses.replace(call, tolerance=math.inf))
    resolved = near_of(call)
    for r in range(6):
        row = call.query[0, 0, r]
        errors = {c: error_of(call, row, c) for c in range(12) if not by_rank[0, 0, r, c]}
        expected = set(range(12)) - set(errors)
        left = sorted(errors, key=errors.__getitem__)
        while sum(errors[c] for c in left) > 0.05:
            expected.add(left.pop())
        assert set(resolved[0, 0, r].nonzero().flatten().tolist()) == expected


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no kernels")
@pytest.mark.parametrize("near", [0, 2])
@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-3, 0.0])
@pytest.mark.parametrize("dim", [12, 64])
def test_the_kernel_resolves_what_the_reference_does(near, tolerance, dim):
    """Forward and backward; a cluster more or less would differ by far more than rounding."""
    call = grouped_call(5, 0.3, near, tolerance, rows=300, dim=dim)
    leaves = [t.detach().double().requires_grad_() for t in (call.query, call.key, call.value)]
    exact = multipole_attention_reference(
        dataclasses.replace(call, query=leaves[0], key=leaves[1], value=leaves[2]), kept_by_stable_sort
    )
    grad = normal(*exact.shape, seed=9)
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    own = [t.detach().clone().requires_grad_() for t in (call.query, call.key, call.value)]
    found = attend(dataclasses.replace(call, query=own[0], key=own[1], value=own[2]), "cpu")
    for one, other in zip((found, *torch.autograd.grad(found, own, grad)), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 * other.abs().max().item())


def test_gradients_in_float64():
    call = in_float64(grouped_call(6, 0.3, 1, 0.05, clusters=5, each=3, rows=4, dim=3))
    leaves = [t.requires_grad_() for t in (call.query, call.key, call.value)]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(dataclasses.replace(call, query=query, key=key, value=value), "pytorch")

    assert torch.autograd.gradcheck(run, leaves)


@on_backends
def test_compiled(backend):
    tensors = (normal(1, 2, 50, 8, seed=s) for s in (1, 2, 3))
    query, key, value = tensors

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return multipole_attention(q, k, v, num_clusters=10, near=1, tolerance=0.1)

    with only_backend(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query, key, value), run(query, key, value))


def test_as_a_mechanism():
    mechanism = regard.parse_mechanism("multipole(near=0, tolerance=0.1)")
    assert mechanism == Multipole(near=0, tolerance=0.1)
    query, key, value = (normal(1, 2, 36, 8, seed=s) for s in (1, 2, 3))
    expected = multipole_attention(query, key, value, num_clusters=24, near=0, tolerance=0.1, grid_size=(6, 6))
    assert torch.equal(mechanism.attend(query, key, value), expected)
    layer = mechanism.attn_layer()(16, 2)
    assert layer.mechanism == mechanism


def test_not_a_number_spreads_and_nothing_more():
    call = grouped_call(7, 0.3, 1, 0.1)
    query = call.query.clone()
    query[0, 0, 3] = math.nan
    found = attend(dataclasses.replace(call, query=query))
    assert found[0, 0, 3].isnan().all()
    clean = attend(call)
    assert torch.equal(found[0, 1], clean[0, 1]) and torch.equal(found[0, 0, 4:], clean[0, 0, 4:])


def test_an_image_of_one_patch_and_of_none():
    for keys in (0, 1):
        query, key, value = (normal(1, 2, 1 + keys, 8, seed=s) for s in (1, 2, 3))
        found = multipole_attention(query, key, value, num_clusters=None, near=0, num_prefix_tokens=1, tolerance=0.0)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tolerance": -0.1}, ValueError, "tolerance: expected a number of at least 0"),
        ({"tolerance": math.nan}, ValueError, "tolerance: expected a number of at least 0"),
        ({"tolerance": math.inf}, ValueError, "None for no bound"),
        ({"tolerance": "small"}, TypeError, "tolerance: expected a number or None, got str"),
        ({"tolerance": True}, TypeError, "tolerance: expected a number or None, got bool"),
        ({"tolerance": 0.1, "far": "gaussian"}, ValueError, "far='gaussian' has no bound"),
    ],
)
def test_bad_input(options, error, says):
    tensors = [normal(1, 1, 9, 4)] * 3
    with pytest.raises(error, match=says):
        multipole_attention(*tensors, num_clusters=3, near=1, **options)
    with pytest.raises(error, match=says):
        Multipole(**options)
