"""kmeans_clusters: the spread start, Lloyd's iterations step by step, masks, duplicates, and inside PyTorch."""

import math
from itertools import pairwise

import pytest
import torch
from attention_cases import BACKENDS, HALVES, far_apart
from torch.utils.flop_counter import FlopCounterMode

from regard import density_peak_clusters, explain, kmeans_clusters
from regard.ops import only_backend
from regard.ops.clustering.kmeans import spread_over_grid

KINDS = [(b, d) for b in BACKENDS for d in (torch.float32, *HALVES)] + [("pytorch", torch.float64)]
everywhere = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=[f"{b}-{d}" for b, d in KINDS])
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def tokens(batch: int = 2, count: int = 60, channels: int = 8, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def islands(kinds: int = 5, each: int = 12, channels: int = 8, seed: int = 0) -> torch.Tensor:
    """(2, kinds * each, channels): runs of tokens around centres that are far from one another."""
    g = torch.Generator().manual_seed(seed)
    centres = 10.0 * torch.randn(2, kinds, channels, generator=g).repeat_interleave(each, dim=1)
    return centres + torch.randn(centres.shape, generator=g)


def means(x: torch.Tensor, assignment: torch.Tensor, count: int, mask: torch.Tensor | None = None):
    """Means of the clusters (NaN where there is no token), by plain loops."""
    result = torch.full((x.shape[0], count, x.shape[-1]), math.nan, dtype=torch.float64)
    for b in range(x.shape[0]):
        for c in range(count):
            inside = assignment[b] == c
            if mask is not None:
                inside = inside & mask[b]
            if inside.any():
                result[b, c] = x[b, inside].double().mean(dim=0)
    return result


def nearest_up_to_rounding(x: torch.Tensor, centroids: torch.Tensor, assignment: torch.Tensor) -> None:
    """No other centroid is nearer by more than the rounding of |c|^2 - 2 x c, the origin amid the tokens."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x, centroids = x.double(), centroids.double()
    squares = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
    taken = squares.gather(-1, assignment.unsqueeze(-1)).squeeze(-1)
    extent = (x - x.mean(dim=1, keepdim=True)).norm(dim=-1).amax() + x.abs().max() * torch.finfo(compute).eps
    bound = 4 * (x.shape[-1] + 8) * torch.finfo(compute).eps * extent**2
    assert (taken <= squares.amin(dim=-1) + bound).all()


def check_steps(x: torch.Tensor, clusters: int, steps: int = 3, **options) -> None:
    """Each iteration is the one before, its centroids moved to their clusters' means, and all assigned again."""
    mask = options.get("mask")
    before = None
    for iterations in range(steps + 1):
        found = kmeans_clusters(x, clusters, iterations=iterations, **options)
        compute = torch.promote_types(x.dtype, torch.float32)
        assert found.assignment.dtype == torch.int64 and found.centroids.dtype == compute
        assert found.assignment.shape == x.shape[:2] and found.centroids.shape == (x.shape[0], clusters, x.shape[2])
        assert ((found.assignment >= 0) & (found.assignment < clusters)).all()
        nearest_up_to_rounding(x, found.centroids, found.assignment)
        if before is not None:
            moved = means(x, before.assignment, clusters, mask)
            moved = torch.where(moved.isnan(), before.centroids.double(), moved)
            torch.testing.assert_close(found.centroids.double(), moved, rtol=1e-5, atol=1e-5)
        before = found


GRIDS = [(1,), (7,), (64,), (8, 8), (9, 13), (5, 6, 7), (3, 40), (1, 10), (2, 3, 1), (2, 2, 2, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_start_is_as_many_cells_as_asked_for_and_spread_evenly(grid: tuple[int, ...]) -> None:
    """Each cell has a start about as near as the cube that is a start's share is wide; in long grids twice that."""
    cells = math.prod(grid)
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    places = torch.stack(axes, dim=-1).reshape(-1, len(grid)).double()
    factor = 2.0 if max(grid) > 8 * min(grid) and len(grid) > 1 else 1.25
    for count in range(1, cells + 1):
        start = spread_over_grid(grid, count)
        assert len(set(start)) == len(start) == count
        assert set(start) <= set(range(cells))
        farthest = torch.cdist(places, places[list(start)]).amin(dim=1).max()
        assert farthest <= factor * (cells / count) ** (1 / len(grid))


@on_backends
@pytest.mark.parametrize("grid", [(60,), (6, 10), (3, 4, 5)])
def test_without_iterations_the_start_is_what_is_found(backend: str, grid: tuple[int, ...]) -> None:
    x = tokens()
    with only_backend(backend):
        found = kmeans_clusters(x, 7, iterations=0, grid_size=grid)
        if grid == (60,):
            assert torch.equal(found.assignment, kmeans_clusters(x, 7, iterations=0).assignment)
    start = list(spread_over_grid(grid, 7))
    torch.testing.assert_close(found.centroids, x[:, start])
    assert torch.equal(found.assignment[:, start], torch.arange(7).expand(2, 7))


@everywhere
@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64])
def test_each_step_is_lloyds(backend: str, dtype: torch.dtype, channels: int) -> None:
    with only_backend(backend):
        check_steps(tokens(channels=channels, dtype=dtype), 7)


@on_backends
@pytest.mark.parametrize(
    ("count", "clusters"), [(255, 15), (256, 16), (257, 17), (40, 33), (40, 39), (1030, 64), (2, 1)]
)
def test_each_step_is_lloyds_at_any_size(backend: str, count: int, clusters: int) -> None:
    with only_backend(backend):
        check_steps(tokens(1, count, 5), clusters, steps=2)


@everywhere
def test_any_strides(backend: str, dtype: torch.dtype) -> None:
    x = tokens(dtype=dtype)
    wide = torch.full((2, 120, 11), math.nan, dtype=dtype)
    wide[:, ::2, 1:9] = x
    laid = [x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, wide[:, ::2, 1:9]]
    with only_backend(backend):
        want = kmeans_clusters(x, 7)
        for view in laid:
            found = kmeans_clusters(view, 7)
            assert torch.equal(found.assignment, want.assignment)
            torch.testing.assert_close(found.centroids, want.centroids)


def test_strides_beyond_two_to_the_31_elements() -> None:
    x = tokens(dtype=torch.bfloat16)
    for found, want in zip(kmeans_clusters(*far_apart(x), 7), kmeans_clusters(x, 7), strict=True):
        assert torch.equal(found, want)


@everywhere
def test_islands_are_found(backend: str, dtype: torch.dtype) -> None:
    x = islands().to(dtype)
    with only_backend(backend):
        found = kmeans_clusters(x, 5)
    assert torch.equal(found.assignment, torch.arange(5).repeat_interleave(12).expand(2, -1))
    torch.testing.assert_close(found.centroids.double(), means(x, found.assignment, 5), rtol=1e-5, atol=1e-5)


@on_backends
@pytest.mark.parametrize("seed", range(3))
def test_more_iterations_never_spread_the_clusters(backend: str, seed: int) -> None:
    x = tokens(count=200, seed=seed)
    spread = []
    with only_backend(backend):
        for iterations in range(8):
            assignment, _ = kmeans_clusters(x, 9, iterations=iterations)
            own = means(x, assignment, 9).gather(1, assignment.unsqueeze(-1).expand_as(x))
            spread.append(float((x - own).square().sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(spread))
    assert spread[-1] < 0.95 * spread[0]


@on_backends
def test_equally_near_centroids_leave_a_token_to_the_first(backend: str) -> None:
    """Small integers are exact wherever the origin is moved to by the mean of an even number of them."""
    x = torch.tensor([[-2.0], [0.0], [2.0], [0.0], [-2.0], [0.0], [2.0], [0.0]])[None]
    mask = torch.tensor([True, False, True, False, False, False, False, False])
    with only_backend(backend):
        found = kmeans_clusters(x, 2, iterations=0, mask=mask)
    assert found.centroids.flatten().tolist() == [-2.0, 2.0]
    assert found.assignment.tolist() == [[0, 0, 1, 0, 0, 0, 1, 0]]


@on_backends
def test_all_tokens_equal(backend: str) -> None:
    """One cluster takes all; the others are empty and stay where they are, which is there too."""
    x = tokens(count=1).expand(2, 50, 8)
    with only_backend(backend):
        found = kmeans_clusters(x, 6, iterations=3)
    assert (found.assignment == 0).all()
    torch.testing.assert_close(found.centroids, x[:, :6])


@on_backends
def test_a_cluster_without_tokens_stays_where_it_was(backend: str) -> None:
    """Two starts on equal tokens: the second never gets any, whatever else moves."""
    x = tokens(1, 40)
    start = spread_over_grid((40,), 4)
    x[:, start[1]] = x[:, start[0]]
    with only_backend(backend):
        before, after = (kmeans_clusters(x, 4, iterations=n) for n in (0, 1))
        assert (before.assignment != 1).all()
        torch.testing.assert_close(after.centroids[:, 1], x[:, start[0]])
        check_steps(x, 4)


@everywhere
@pytest.mark.parametrize("iterations", [0, 2])
def test_as_many_clusters_as_tokens_and_one(backend: str, dtype: torch.dtype, iterations: int) -> None:
    x = tokens(dtype=dtype)
    with only_backend(backend):
        each = kmeans_clusters(x, 60, iterations=iterations)
        one = kmeans_clusters(x, 1, iterations=iterations)
        alone = kmeans_clusters(x[:, :1], 1, iterations=iterations)
    assert torch.equal(each.assignment, torch.arange(60).expand(2, 60))
    assert torch.equal(each.centroids, x.to(each.centroids.dtype))
    assert (one.assignment == 0).all() and (alone.assignment == 0).all()
    if iterations:
        torch.testing.assert_close(one.centroids.double(), x.double().mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.centroids, x[:, :1].to(alone.centroids.dtype))


@everywhere
def test_far_from_the_origin_nothing_is_lost(backend: str, dtype: torch.dtype) -> None:
    """Moved by a power of two, which these tokens (multiples of 1/8) take without rounding, they are grouped alike."""
    x = (8 * islands()).round().div(8).clamp(-31, 31)
    shift = {torch.bfloat16: 0.0, torch.float16: 32.0}.get(dtype, 2.0**14)
    if dtype == torch.bfloat16:
        x = x.round()
    with only_backend(backend):
        want = kmeans_clusters(x.to(dtype), 5).assignment
        assert torch.equal(kmeans_clusters((x + shift).to(dtype), 5).assignment, want)


@on_backends
def test_leading_dimensions_and_images_are_independent(backend: str) -> None:
    x = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(1)) > 0.2
    with only_backend(backend):
        for shown in (None, mask):
            found = kmeans_clusters(x, 6, mask=shown)
            assert found.assignment.shape == (2, 3, 40) and found.centroids.shape == (2, 3, 6, 8)
            for i in range(2):
                for j in range(3):
                    alone = kmeans_clusters(x[i, j], 6, mask=None if shown is None else shown[i, 0])
                    assert torch.equal(alone.assignment, found.assignment[i, j])
                    torch.testing.assert_close(alone.centroids, found.centroids[i, j])


@everywhere
def test_hidden_tokens_move_nothing(backend: str, dtype: torch.dtype) -> None:
    """Whatever they hold; the others are grouped as if alone, and the hidden are assigned, too."""
    x = tokens(dtype=dtype)
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) > 0.4
    other = x.masked_fill(~mask.unsqueeze(-1), 30.0)
    with only_backend(backend):
        check_steps(x, 7, mask=mask)
        ours, again = (kmeans_clusters(t, 7, mask=mask) for t in (x, other))
        assert torch.equal(ours.assignment[mask], again.assignment[mask])
        torch.testing.assert_close(ours.centroids, again.centroids)
        first = kmeans_clusters(x[:1][:, mask[0]], 7, mask=torch.ones(int(mask[0].sum()), dtype=torch.bool))
    assert torch.equal(ours.assignment[0][mask[0]], first.assignment[0])


@on_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_tokens_may_hold_anything(backend: str, bad: float) -> None:
    x = tokens()
    mask = torch.arange(60) % 7 != 3
    with only_backend(backend):
        want = kmeans_clusters(x, 7, mask=mask)
        x[:, 10] = bad
        assert not mask[10]
        found = kmeans_clusters(x, 7, mask=mask)
    assert torch.equal(found.assignment[:, mask], want.assignment[:, mask])
    torch.testing.assert_close(found.centroids, want.centroids)


@on_backends
def test_fewer_visible_tokens_than_clusters(backend: str) -> None:
    x = tokens()
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[0, 10:13] = True  # the second image shows none
    with only_backend(backend):
        found = kmeans_clusters(x, 7, mask=mask)
    assert torch.isfinite(found.centroids).all()
    assert len(set(found.assignment[0, 10:13].tolist())) == 3


@on_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tokens_that_are_not_finite_harm_their_image_only(backend: str, bad: float) -> None:
    x = tokens()
    with only_backend(backend):
        want = kmeans_clusters(x, 7)
        x[0, 3] = bad
        found = kmeans_clusters(x, 7)
        x[0] = bad
        everything = kmeans_clusters(x, 7)
    for result in (found, everything):
        assert ((result.assignment >= 0) & (result.assignment < 7)).all()
        assert torch.equal(result.assignment[1], want.assignment[1])
        assert torch.equal(result.centroids[1], want.centroids[1])


@on_backends
@pytest.mark.parametrize("size", [(0, 9, 4), (2, 0, 9, 4)], ids=str)
def test_nothing_to_group(backend: str, size: tuple[int, ...]) -> None:
    with only_backend(backend):
        found = kmeans_clusters(torch.zeros(size), 3)
    assert found.assignment.shape == size[:-1] and found.centroids.shape == (*size[:-2], 3, size[-1])
    assert (found.assignment == 0).all()


@on_backends
def test_repeats_bit_for_bit_and_has_no_gradient(backend: str) -> None:
    x = tokens(1, 1000, 16).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        with only_backend(backend):
            first, second = kmeans_clusters(x, 20), kmeans_clusters(x, 20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.assignment, second.assignment) and torch.equal(first.centroids, second.centroids)
    assert not first.centroids.requires_grad and not first.assignment.requires_grad


@on_backends
def test_one_thread_and_two_agree(backend: str) -> None:
    x = islands(each=200)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            with only_backend(backend):
                results.append(kmeans_clusters(x, 5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].assignment, results[1].assignment)
    torch.testing.assert_close(results[0].centroids, results[1].centroids)


@on_backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend: str, masked: bool, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    with only_backend(backend):
        for clusters in (7, 60):
            arguments = (tokens(dtype=dtype), mask, clusters, 2, None if masked else [6, 10])
            torch.library.opcheck(torch.ops.regard.kmeans.default, arguments)


@on_backends
def test_compiles_to_one_graph_at_any_size(backend: str) -> None:
    torch._dynamo.reset()

    def run(x):
        return kmeans_clusters(x, x.shape[1] // 6, grid_size=(x.shape[1] // 5, 5))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with only_backend(backend):
        for count in (60, 45, 100):
            for a, b in zip(compiled(tokens(count=count)), run(tokens(count=count)), strict=True):
                torch.testing.assert_close(a, b)


@on_backends
def test_autocast_changes_nothing(backend: str) -> None:
    x = tokens(count=200)
    with only_backend(backend):
        want = kmeans_clusters(x, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kmeans_clusters(x, 9)
    assert torch.equal(found.assignment, want.assignment) and torch.equal(found.centroids, want.centroids)


def test_flops_are_those_of_the_distances() -> None:
    with FlopCounterMode(display=False) as counter:
        kmeans_clusters(tokens(), 7, iterations=3)
    assert counter.get_total_flops() == 2 * 2 * 60 * 7 * 8 * 4


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"num_clusters": 0}, ValueError, ["num_clusters", "at least 1", "0"]),
        ({"num_clusters": 61}, ValueError, ["num_clusters", "61", "60 tokens", "at most one"]),
        ({"num_clusters": 2.0}, TypeError, ["num_clusters", "float"]),
        ({"num_clusters": True}, TypeError, ["num_clusters", "bool"]),
        ({"num_clusters": None}, TypeError, ["num_clusters", "NoneType"]),
        ({"iterations": -1}, ValueError, ["iterations", "-1"]),
        ({"iterations": 1.5}, TypeError, ["iterations", "float"]),
        ({"grid_size": (7, 9)}, ValueError, ["grid_size", "(7, 9)", "63", "60"]),
        ({"mask": torch.ones(60)}, TypeError, ["mask", "float32", "boolean"]),
        ({"mask": "all"}, TypeError, ["mask", "str"]),
        ({"mask": torch.ones(59, dtype=torch.bool)}, ValueError, ["mask", "(59,)", "(2, 60)"]),
        ({"mask": torch.ones(3, 60, dtype=torch.bool)}, ValueError, ["mask", "(3, 60)"]),
        ({"mask": torch.ones(1, 2, 60, dtype=torch.bool)}, ValueError, ["mask", "(1, 2, 60)"]),
        ({"x": torch.zeros(60)}, ValueError, ["x", "(60,)"]),
        ({"x": torch.zeros(60, 8, dtype=torch.int32)}, TypeError, ["x", "int32"]),
        ({"x": [[1.0]]}, TypeError, ["x", "list"]),
        ({"x": torch.zeros(2, 60, 0)}, ValueError, ["x", "(2, 60, 0)"]),
    ],
    ids=str,
)
def test_arguments_out_of_range(options, error, names) -> None:
    with pytest.raises(error) as raised:
        kmeans_clusters(**{"x": tokens(), "num_clusters": 7, **options})
    for name in names:
        assert name in str(raised.value), str(raised.value)


def test_the_slow_path_is_told() -> None:
    x = tokens()
    expected = "cpu" if "cpu" in BACKENDS else "pytorch"
    assert explain(kmeans_clusters, x, 4).backend == expected
    assert explain(density_peak_clusters, x, 4).backend == expected
    for operator in (kmeans_clusters, density_peak_clusters):
        told = explain(operator, x.double(), 4)
        assert told.backend == "pytorch"
        assert "float64" in str(told)
        with pytest.raises(ValueError, match="num_clusters"):
            explain(operator, x, 1000)
