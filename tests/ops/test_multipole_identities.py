"""What multipole attention must equal, and when: dense attention, its own far field, fewer keys, repeated heads."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, Shape, inputs
from multipole_cases import attend, call_of, even_sizes, random_call

from regard import multipole_attention
from regard.ops import only_backend
from regard.ops.multipole.reference import multipole_attention_reference

FAR = ("centroid", "gaussian")
# The kernel in float32, the PyTorch path in float32 and float64.
KINDS = [(b, torch.float32) for b in BACKENDS] + [("pytorch", torch.float64)]
everywhere = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=[f"{b}-{d}" for b, d in KINDS])
both_far_fields = pytest.mark.parametrize("far", FAR)


def tensors(dtype: torch.dtype, **shape) -> list[torch.Tensor]:
    return list(inputs(Shape(**shape), exact=False, dtype=dtype))


def dense(query, key, value, mask=None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@everywhere
@both_far_fields
@pytest.mark.parametrize("near", [9, 1.0])
@pytest.mark.parametrize("prefix", [0, 3])
def test_all_clusters_near_is_dense_attention(backend, dtype, far: str, near, prefix: int) -> None:
    query, key, value = tensors(dtype, heads=4, queries=37, keys=61, value_dim=24)
    mask = torch.rand(2, 1, 1, 61, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"num_clusters": 9, "near": near, "far": far, "num_prefix_tokens": prefix, "enable_gqa": True}
    with only_backend(backend):
        for shown in (None, mask):
            ours = multipole_attention(query, key, value, attn_mask=shown, **options)
            torch.testing.assert_close(ours, dense(query, key, value, shown))


@everywhere
@both_far_fields
@pytest.mark.parametrize("near", [0, 5, 40])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_cluster_for_each_key_is_dense_attention(backend, dtype, far: str, near: int, prefix: int) -> None:
    query, key, value = tensors(dtype, queries=37, keys=40 + prefix)
    options = {"num_clusters": 40, "near": near, "far": far, "num_prefix_tokens": prefix}
    with only_backend(backend):
        ours = multipole_attention(query, key, value, **options)
    torch.testing.assert_close(ours, dense(query, key, value))


@everywhere
@both_far_fields
@pytest.mark.parametrize("near", [0, 2])
def test_clusters_of_equal_keys_are_dense_attention(backend, dtype, far: str, near: int) -> None:
    """k-means starts in the middle of each run of equal keys, so it finds them."""
    query, key, value = tensors(dtype, queries=30, keys=48)
    key = key[:, :, :8].repeat_interleave(6, dim=2)
    with only_backend(backend):
        ours = multipole_attention(query, key, value, num_clusters=8, near=near, far=far)
    torch.testing.assert_close(ours, dense(query, key, value))


@everywhere
@both_far_fields
def test_prefix_queries_attend_densely(backend, dtype, far: str) -> None:
    query, key, value = tensors(dtype, queries=30, keys=45)
    with only_backend(backend):
        ours = multipole_attention(query, key, value, num_clusters=5, near=1, far=far, num_prefix_tokens=4)
    want = dense(query, key, value)
    torch.testing.assert_close(ours[:, :, :4], want[:, :, :4])
    assert (ours[:, :, 4:] - want[:, :, 4:]).abs().amax(dim=(0, 1, 3)).min() > 1e-3


@everywhere
@both_far_fields
@pytest.mark.parametrize("prefix", [0, 3])
def test_far_field_alone_is_dense_attention_to_means_with_a_bias(backend, dtype, far: str, prefix: int) -> None:
    """near=0: the clusters' means are keys and values, log n (and half the logits' variance) is their bias."""
    sizes = [1, 7, 20, 2, 10]
    call = random_call(Shape(queries=25, value_dim=9), sizes, 0, far=far, prefix=prefix, dtype=dtype)
    one_hot = F.one_hot(call.clusters, len(sizes)).to(dtype)
    count = one_hot.sum(dim=2)
    key, value = call.key[:, :, prefix:], call.value[:, :, prefix:]
    mean_key, mean_value, mean_square = (one_hot.mT @ x / count.unsqueeze(-1) for x in (key, value, key.square()))
    bias = count.log().unsqueeze(2).expand(-1, -1, 25 - prefix, -1)
    query = call.query[:, :, prefix:]
    if far == "gaussian":
        bias = bias + 0.5 * call.scale**2 * query.square() @ (mean_square - mean_key.square()).mT
    keys = torch.cat([call.key[:, :, :prefix], mean_key], dim=2)
    values = torch.cat([call.value[:, :, :prefix], mean_value], dim=2)
    want = dense(query, keys, values, F.pad(bias, (prefix, 0)))
    torch.testing.assert_close(attend(call, backend)[:, :, prefix:], want)


@everywhere
def test_grouped_heads_are_repeated_heads(backend, dtype) -> None:
    call = random_call(Shape(heads=6, queries=30), even_sizes(47, 7), 2, dtype=dtype, prefix=1)
    repeated = dataclasses.replace(
        call,
        key=call.key.repeat_interleave(3, dim=1),
        value=call.value.repeat_interleave(3, dim=1),
        assignment=call.clusters.repeat_interleave(3, dim=1),
    )
    torch.testing.assert_close(attend(call, backend), attend(repeated, backend))


@everywhere
@both_far_fields
@pytest.mark.parametrize("near", [0, 3, 7])
@pytest.mark.parametrize("prefix", [0, 3])
def test_hidden_keys_are_as_if_removed(backend, dtype, far: str, near: int, prefix: int) -> None:
    shape = Shape(batch=1, heads=2, key_heads=1, queries=30)
    call = random_call(shape, even_sizes(60, 7), near, far=far, prefix=prefix, dtype=dtype)
    shown = torch.rand(60 + prefix, generator=torch.Generator().manual_seed(0)) > 0.4
    shown[:prefix] = True
    removed = dataclasses.replace(
        call,
        key=call.key[:, :, shown],
        value=call.value[:, :, shown],
        assignment=call.clusters[:, :, shown[prefix:]].contiguous(),
    )
    hidden = dataclasses.replace(call, visible=shown.expand(1, 1, -1))
    torch.testing.assert_close(attend(hidden, backend), attend(removed, backend))


@everywhere
@pytest.mark.parametrize("near", [0, 2])
def test_what_hidden_keys_hold_is_of_no_account(backend, dtype, near: int) -> None:
    """Nor does it move the clusters of the others: masked padding may hold anything."""
    query, key, value = tensors(dtype, queries=40, keys=40)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"num_clusters": 6, "near": near, "far": "gaussian", "attn_mask": mask}
    with only_backend(backend):
        ours = multipole_attention(query, key, value, **options)
        other = [t.masked_fill(~mask.unsqueeze(-1), 77.0) for t in (key, value)]
        again = multipole_attention(query, *other, **options)
    torch.testing.assert_close(again, ours)


@everywhere
def test_a_mask_that_hides_nothing_changes_nothing(backend, dtype) -> None:
    call = random_call(Shape(queries=30), even_sizes(50, 7), 2, dtype=dtype)
    masked = dataclasses.replace(call, visible=torch.ones(2, 2, 50, dtype=torch.bool))
    assert torch.equal(attend(masked, backend), attend(call, backend))


@everywhere
def test_names_of_clusters_do_not_matter(backend, dtype) -> None:
    call = random_call(Shape(queries=30), even_sizes(50, 7), 2, dtype=dtype)
    names = torch.randperm(9, generator=torch.Generator().manual_seed(0))  # two more of them, both empty
    renamed = dataclasses.replace(call, assignment=names[call.clusters], num_clusters=9)
    torch.testing.assert_close(attend(renamed, backend), attend(call, backend))


@everywhere
def test_queries_are_independent_of_one_another(backend, dtype) -> None:
    call = random_call(Shape(queries=50), even_sizes(50, 7), 2, dtype=dtype)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    ours = attend(call, backend)
    shuffled = attend(dataclasses.replace(call, query=call.query[:, :, order]), backend)
    torch.testing.assert_close(shuffled, ours[:, :, order])
    alone = attend(dataclasses.replace(call, query=call.query[:, :, 7:8]), backend)
    torch.testing.assert_close(alone, ours[:, :, 7:8])


@everywhere
def test_scale_is_a_factor_of_the_logits(backend, dtype) -> None:
    call = random_call(Shape(queries=50), even_sizes(50, 7), 2, dtype=dtype)
    louder = dataclasses.replace(call, query=2.0 * call.query, scale=call.scale / 2.0)
    torch.testing.assert_close(attend(louder, backend), attend(call, backend))
    flat = attend(dataclasses.replace(call, scale=0.0), backend)  # near or far, every key weighs the same
    torch.testing.assert_close(flat, call.value.mean(dim=2, keepdim=True).expand_as(flat))


def clustered_tokens(seed: int) -> list[torch.Tensor]:
    """Tokens of 12 kinds, in runs, each a little unlike the others of its kind: what k-means is for."""
    g = torch.Generator().manual_seed(seed)
    kinds = 1.5 * torch.randn(1, 2, 12, 16, generator=g).repeat_interleave(16, dim=2)
    query, key = (kinds + 0.7 * torch.randn(1, 2, 192, 16, generator=g) for _ in range(2))
    return [t.double() for t in (query, key, torch.randn(1, 2, 192, 16, generator=g))]


@pytest.mark.filterwarnings("ignore::regard.SlowPathWarning")
def test_more_near_clusters_and_the_second_order_lessen_the_error() -> None:
    def error(near: int, far: str, clusters: int = 12) -> float:
        errors = []
        for seed in range(6):
            query, key, value = clustered_tokens(seed)
            ours = multipole_attention(query, key, value, num_clusters=clusters, near=near, far=far)
            want = dense(query, key, value)
            errors.append((ours - want).norm() / want.norm())
        return float(torch.stack(errors).mean())

    for far in FAR:
        errors = [error(near, far) for near in (0, 1, 2, 4, 8, 12)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12
    for near in (0, 1, 2, 4):
        assert error(near, "gaussian") < error(near, "centroid")
    assert error(0, "gaussian", 48) < error(0, "gaussian", 12)


@both_far_fields
def test_narrow_clusters_are_seen_well_from_afar(far: str) -> None:
    """The far field's error falls with the width of the clusters: by its second power, or where the variance is known
    by its fourth, since these clusters are symmetric."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 64, 8, generator=g).double()
    centres = torch.randn(1, 1, 8, 1, 8, generator=g).double()
    value = torch.randn(1, 1, 8, 8, generator=g).double().repeat_interleave(16, dim=2)
    away = torch.linspace(0.5, 1.5, 8)[:, None, None] * torch.cat([torch.eye(8), -torch.eye(8)])
    errors = []
    for width in (0.8, 0.4, 0.2):
        key = (centres + width * away).flatten(2, 3)
        call = call_of((query, key, value), [16] * 8, 0, far=far)
        call = dataclasses.replace(call, assignment=torch.arange(8).repeat_interleave(16)[None, None])
        errors.append(float((multipole_attention_reference(call) - dense(query, key, value)).norm()))
    order = 2 if far == "centroid" else 4
    for wide, narrow in zip(errors, errors[1:], strict=False):
        assert 0.8 * 2**order < wide / narrow < 1.25 * 2**order
