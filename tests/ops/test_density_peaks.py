"""density_peak_clusters: the official grouping, the reference on inputs of every kind, edges and bad input."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import BACKENDS, Largest, far_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.ops import Clusters, density_peak_clusters, merge_tokens, only_backend
from regard.ops.clustering import density_peaks, density_peaks_reference


@pytest.fixture(scope="module", autouse=True, params=BACKENDS)
def backend(request):
    """The kernels, but for float64, or PyTorch's operations alone."""
    with only_backend("pytorch") if request.param == "pytorch" else contextlib.nullcontext():
        yield request.param


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(batch, tokens, channels, seed=0):
    centers = normal(batch, 6, channels, seed=seed) * 3
    which = torch.randint(6, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return centers.gather(1, which[..., None].expand(-1, -1, channels)) + normal(batch, tokens, channels, seed=seed + 1)


def lattice(batch, tokens, channels, levels, seed=0):
    """Small whole numbers: every distance is exact in float32, and most come many times over."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (batch, tokens, channels), generator=generator).float()


def assert_is_reference(x, counts, **options):
    expected, centers = density_peaks_reference(x.double(), counts, **options)
    found = density_peak_clusters(x, counts, **options)
    for one, assignment, count in zip(found, expected, counts, strict=True):
        assert torch.equal(one.centers, centers[:, :count])
        assert torch.equal(one.assignment, assignment)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens" / "density_peaks.npz") as file:
        return {name: torch.from_numpy(array) for name, array in file.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["random", "random784", "mixture"])
def test_official_grouping(golden, name, dtype):
    x = {"random": normal(4, 196, 64), "random784": normal(2, 784, 64, seed=2)}.get(name, golden["mixture_x"])
    weights = (
        golden["mixture_weights"] if name == "mixture" else normal(*x.shape[:2], seed=5, dtype=torch.float64).exp()
    )
    found = density_peak_clusters(x.to(dtype), [49, 196])
    for one, count in zip(found, (49, 196), strict=True):
        assert torch.equal(one.assignment, golden[f"{name}_assignment{count}"].long())
        assert torch.equal(one.centers, golden[f"{name}_centers"][:, :count].long())
        merged = merge_tokens(x.double(), one.assignment, weights, num_clusters=count).flatten()
        some = merged[torch.arange(64) * merged.numel() // 64]
        torch.testing.assert_close(some, golden[f"{name}_merged{count}"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [normal, mixture])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 3), (4, 1), (49, 7), (200, 16)])
def test_equals_the_reference(make, tokens, channels):
    counts = sorted({1, max(1, tokens // 16), max(1, tokens // 4), tokens})
    assert_is_reference(make(3, tokens, channels).double(), counts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_ties_fall_as_in_the_reference(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 60))
    shape = (batch, tokens, data.draw(st.integers(1, 6)))
    x = lattice(*shape, levels=data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 10**6)))
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens)) < data.draw(st.floats(0, 1))
    counts = [data.draw(st.integers(1, tokens)) for _ in range(data.draw(st.integers(1, 3)))]
    assert_is_reference(x + data.draw(st.integers(-50, 50)), counts, neighbors=data.draw(st.integers(1, 8)), mask=mask)


@pytest.mark.parametrize("tile", [64, 4 << 10, 64 << 10])
@pytest.mark.parametrize("make", [mixture, lambda *shape: lattice(*shape, levels=3)])
def test_tiles_of_any_size_give_the_same(monkeypatch, tile, make):
    x = make(3, 130, 5).double()
    whole = density_peak_clusters(x, (9, 40))
    monkeypatch.setattr(density_peaks, "_TILE", tile)
    for one, other in zip(density_peak_clusters(x, (9, 40)), whole, strict=True):
        assert torch.equal(one.assignment, other.assignment) and torch.equal(one.centers, other.centers)


@pytest.mark.parametrize("neighbors", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("tokens", [1, 31, 150])
def test_any_number_of_neighbors(tokens, neighbors):
    assert_is_reference(lattice(2, tokens, 9, 4), [1, tokens], neighbors=neighbors)


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_do_not_matter(batch):
    """Samples are cut into parts where there are fewer than threads; each part has lists of its own."""
    x = lattice(batch, 517, 6, 3)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(density_peak_clusters(x, [7, 40]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one.assignment, two.assignment)
            assert torch.equal(one.centers, two.centers)


def test_equal_tokens_are_at_no_distance(backend):
    x = normal(1, 9, 13).repeat(1, 4, 1)
    space = density_peaks._Space(x, None, 4)
    squares, nearest = density_peaks._neighbors(space)
    if backend == "cpu":  # PyTorch's products and norms are summed in different orders
        assert torch.equal(squares, torch.zeros_like(squares))
    assert torch.equal(nearest.sort(dim=-1).values % 9, (torch.arange(36) % 9)[None, :, None].expand(1, 36, 4))


def test_no_square_matrix_is_ever_made(monkeypatch):
    monkeypatch.setattr(density_peaks, "_TILE", 64 << 10)
    x = mixture(2, 3000, 4)
    with Largest() as seen:
        density_peaks._streamed(x, [46, 187], 5, None)
    assert 10_000 < seen.elements <= 2 * 3000 * (4 + 5 + 1), "at most the neighbours"
    assert seen.elements < 3000**2 / 50


def test_a_far_common_offset_costs_little_precision():
    """Squared distances of about 8 between tokens of squared length 4e6."""
    x = mixture(2, 150, 4)
    far = x + 1000.0
    assert_is_reference(far, [5, 20])


def test_clusters_are_a_partition_with_nested_centers():
    x = mixture(3, 300, 8)
    small, large = density_peak_clusters(x, (20, 80))
    assert isinstance(small, Clusters) and torch.equal(small.centers, large.centers[:, :20])
    for clusters, count in ((small, 20), (large, 80)):
        assert clusters.assignment.dtype == clusters.centers.dtype == torch.int64
        own = clusters.assignment.gather(1, clusters.centers)
        assert torch.equal(own, torch.arange(count).expand(3, -1))
        assert clusters.assignment.min() == 0 and clusters.assignment.max() == count - 1
    alone = density_peak_clusters(x, 20)
    assert torch.equal(alone.assignment, small.assignment) and torch.equal(alone.centers, small.centers)


def test_as_many_clusters_as_tokens():
    assignment, centers = density_peak_clusters(mixture(2, 30, 4), 30)
    assert torch.equal(centers.sort(-1).values, torch.arange(30).expand(2, -1))
    assert torch.equal(assignment.gather(1, centers), torch.arange(30).expand(2, -1))


def test_well_separated_groups_are_found():
    which = torch.arange(90) % 3
    x = (10.0 * torch.eye(3)[which] + 0.1 * normal(90, 3))[None]
    assignment, centers = density_peak_clusters(x, 3)
    assert sorted(which[centers[0]].tolist()) == [0, 1, 2]
    assert torch.equal(which[centers[0]][assignment[0]], which)


def test_all_equal_tokens_and_one_token():
    assignment, centers = density_peak_clusters(torch.full((2, 7, 5), 0.1), 3)
    assert torch.equal(centers, torch.tensor([[0, 1, 2]] * 2))
    assert torch.equal(assignment, torch.tensor([[0, 1, 2, 0, 0, 0, 0]] * 2))
    one = density_peak_clusters(normal(1, 1, 4), 1)
    assert one.assignment.tolist() == one.centers.tolist() == [[0]]


def test_no_images():
    assignment, centers = density_peak_clusters(torch.empty(0, 5, 3), 2)
    assert assignment.shape == (0, 5) and centers.shape == (0, 2)


def test_far_apart_tokens_do_not_underflow():
    """exp(-mean) would be 0 for all of these densities."""
    x = mixture(1, 60, 3).double() * 1e4
    near = density_peak_clusters(x, 6)
    assert_is_reference(x, [6])
    assert len(set(near.centers[0].tolist()) - set(range(6))) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_tokens_that_are_not_finite_stand_aside(bad):
    x = mixture(2, 40, 4)
    spoilt = x.clone()
    spoilt[0, 7, 2] = spoilt[0, 20] = bad
    found, clean = density_peak_clusters(spoilt, 6), density_peak_clusters(x, 6)
    assert torch.equal(found.assignment[1], clean.assignment[1]) and torch.equal(found.centers[1], clean.centers[1])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, [7, 20]] = False
    masked = density_peak_clusters(x, 6, mask=mask)
    assert torch.equal(found.assignment, masked.assignment) and torch.equal(found.centers, masked.centers)
    assert found.assignment[0, [7, 20]].tolist() == [0, 0] and not {7, 20} & set(found.centers[0].tolist())


def test_all_nan():
    assignment, centers = density_peak_clusters(torch.full((1, 6, 2), torch.nan), 3)
    assert torch.equal(centers, torch.tensor([[0, 1, 2]]))
    assert torch.equal(assignment, torch.tensor([[0, 1, 2, 0, 0, 0]]))


def test_masked_tokens_have_no_influence():
    x, mask = mixture(2, 50, 4).double(), torch.rand(2, 50, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[:, 0] = True
    other = torch.where(mask[..., None], x, 100 * normal(2, 50, 4, seed=9).double())
    first, second = (density_peak_clusters(one, 8, mask=mask) for one in (x, other))
    assert torch.equal(first.assignment, second.assignment) and torch.equal(first.centers, second.centers)
    for i in range(2):
        kept = mask[i].nonzero()[:, 0]
        alone = density_peak_clusters(x[i : i + 1, kept], 8)
        assert torch.equal(kept[alone.centers[0]], first.centers[i])
        assert torch.equal(alone.assignment[0], first.assignment[i, kept])


def test_more_clusters_than_tokens_that_take_part():
    mask = torch.tensor([[False, True, False, True]])
    assignment, centers = density_peak_clusters(normal(1, 4, 2), 4, mask=mask)
    assert set(centers[0, :2].tolist()) == {1, 3} and centers[0, 2:].tolist() == [0, 2]
    assert set(assignment[0, [1, 3]].tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x = mixture(2, 100, 8).to(dtype)
    half, single = density_peak_clusters(x, 9), density_peak_clusters(x.float(), 9)
    assert torch.equal(half.assignment, single.assignment) and torch.equal(half.centers, single.centers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(density_peak_clusters(x.float(), 9).assignment, single.assignment)


def test_strides_and_permutation():
    x = mixture(2, 64, 6).double()
    found = density_peak_clusters(x, 8)
    wide = torch.empty(2, 6, 128).double()
    wide[..., ::2] = x.mT
    assert torch.equal(density_peak_clusters(wide[..., ::2].mT, 8).assignment, found.assignment)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    permuted = density_peak_clusters(x[:, order], 8)
    assert torch.equal(permuted.assignment, found.assignment[:, order])
    assert torch.equal(order[permuted.centers], found.centers)


def test_strides_beyond_two_to_the_31_elements():
    x = mixture(2, 64, 6).bfloat16()
    found, want = density_peak_clusters(*far_apart(x), 8), density_peak_clusters(x, 8)
    assert torch.equal(found.assignment, want.assignment)


def test_no_gradient_and_no_change_of_the_input():
    x = mixture(1, 40, 4).requires_grad_()
    before = x.detach().clone()
    found = density_peak_clusters(x, (3, 9))
    assert not any(tensor.requires_grad for one in found for tensor in one)
    assert torch.equal(x.detach(), before)


def test_compiles_with_dynamic_shapes():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def group(x):
        small, large = density_peak_clusters(x, (x.shape[1] // 16, x.shape[1] // 4))
        return small.assignment + 0, large.centers + 0

    for batch, tokens in ((2, 64), (3, 100)):
        x = mixture(batch, tokens, 5)
        small, large = density_peak_clusters(x, (tokens // 16, tokens // 4))
        found = group(x)
        assert torch.equal(found[0], small.assignment) and torch.equal(found[1], large.centers)


def test_opcheck():
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    for given_mask in (None, mask):
        torch.library.opcheck(torch.ops.regard.density_peak_clusters, (mixture(2, 20, 3), [2, 5], 5, given_mask))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch():
    x = mixture(3, 30, 4)
    expected = torch.stack([density_peak_clusters(one[None], 4).assignment for one in x])
    assert torch.equal(torch.vmap(lambda one: density_peak_clusters(one[None], 4).assignment)(x), expected)

    def loss(x):
        return merge_tokens(x, density_peak_clusters(x, 4).assignment, num_clusters=4).square().sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)


def test_flops_count_the_distances():
    with FlopCounterMode(display=False) as counter:
        density_peak_clusters(normal(2, 50, 8), (3, 12))
    assert counter.get_total_flops() == 2 * 2 * 50 * (50 + 12) * 8


def test_exported():
    assert regard.density_peak_clusters is density_peak_clusters


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "said"),
    [
        ((X.tolist(), 2), {}, TypeError, "x: expected a tensor, got list"),
        ((X.long(), 2), {}, TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int64"),
        ((X[0], 2), {}, ValueError, r"x: expected \(batch, tokens, channels\), got shape \(6, 3\)"),
        ((X[..., :0], 2), {}, ValueError, "x: expected"),
        ((X, 0), {}, ValueError, "num_clusters: expected at least 1, got 0"),
        ((X, -1), {}, ValueError, "num_clusters"),
        ((X, 7), {}, ValueError, "num_clusters: 7 clusters of 6 tokens; give at most as many as tokens"),
        ((X, (2, 7)), {}, ValueError, "num_clusters: 7 clusters"),
        ((X[:, :0], 1), {}, ValueError, "num_clusters: 1 clusters of 0 tokens"),
        ((X, ()), {}, ValueError, "num_clusters: expected at least one count"),
        ((X, 2.0), {}, TypeError, "num_clusters: expected an int, got float"),
        ((X, True), {}, TypeError, "num_clusters: expected an int, got bool"),
        ((X, "22"), {}, TypeError, "num_clusters: expected an int, got str"),
        ((X, 2), {"neighbors": 0}, ValueError, "neighbors: expected at least 1, got 0"),
        ((X, 2), {"neighbors": 1.5}, TypeError, "neighbors: expected an int, got float"),
        ((X, 2), {"neighbors": True}, TypeError, "neighbors: expected an int, got bool"),
        ((X, 2), {"mask": torch.ones(2, 6)}, TypeError, "mask: expected a boolean tensor"),
        ((X, 2), {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask: expected shape \(2, 6\)"),
    ],
)
def test_bad_input(arguments, options, error, said):
    with pytest.raises(error, match=said):
        density_peak_clusters(*arguments, **options)
