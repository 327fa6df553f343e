"""The simulator against published figures, a rule written out key by key, and tiles counted by brute force."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.simulation import NeighborhoodPattern, PatternError, Tiling, search, simulate, window_bounds

VIDEO = (30, 48, 80)
WINDOW = (18, 24, 24)
TILES = Tiling((4, 8, 8), (2, 8, 8))


@pytest.mark.parametrize(
    ("stride", "bound", "end_to_end"),
    [
        ((1, 1, 1), 3.27, 1.73),
        ((2, 1, 1), 3.60, 1.78),
        ((1, 1, 8), 5.45, 1.98),
        ((2, 1, 8), 6.00, 2.02),
        ((1, 8, 8), 9.09, 2.18),
        ((2, 8, 8), 10.0, 2.20),
        ((16, 8, 8), 11.11, 2.23),
        (WINDOW, 6.67, 2.07),
    ],
)
def test_the_published_column(stride, bound, end_to_end):
    found = simulate(NeighborhoodPattern(VIDEO, WINDOW, stride), TILES, attention_share=0.607)
    assert round(found.speedup, 2) == bound
    assert found.end_to_end == pytest.approx(end_to_end, abs=0.0101)
    assert found.flop_speedup == pytest.approx(30 * 48 * 80 / (18 * 24 * 24))
    assert found.speedup <= found.mean_speedup <= found.flop_speedup * (1 + 1e-12)


@pytest.mark.parametrize(
    ("query", "stride", "bound"),
    [(128, 1, 15.06), (128, 128, 15.06), (128, 256, 16.0), (256, 1, 14.22), (256, 256, 16.0)],
)
def test_published_bounds_of_one_axis(query, stride, bound):
    found = simulate(NeighborhoodPattern((32768,), 2048, stride), Tiling((query,), (128,)))
    assert round(found.speedup, 2) == bound


@pytest.mark.parametrize(("stride", "bound"), [(1, 6.65), (16, 10.24)])
def test_published_bounds_of_two_axes(stride, bound):
    found = simulate(NeighborhoodPattern((256, 256), 80, stride), Tiling((16, 8), (16, 8)))
    assert round(found.speedup, 2) == bound


RANGES = [
    ((8, 3, 1, False), "0-2 0-2 1-3 2-4 3-5 4-6 5-7 5-7"),
    ((8, 4, 1, False), "0-3 0-3 0-3 1-4 2-5 3-6 4-7 4-7"),
    ((10, 4, 2, False), "0-3 0-3 1-4 1-4 3-6 3-6 5-8 5-8 6-9 6-9"),
    ((10, 5, 3, False), "0-4 0-4 0-4 2-6 2-6 2-6 5-9 5-9 5-9 5-9"),
    ((9, 3, 3, False), "0-2 0-2 0-2 3-5 3-5 3-5 6-8 6-8 6-8"),
    ((10, 4, 4, False), "0-3 0-3 0-3 0-3 4-7 4-7 4-7 4-7 6-9 6-9"),
    ((8, 3, 1, True), "0-0 0-1 0-2 1-3 2-4 3-5 4-6 5-7"),
    ((10, 4, 2, True), "0-0 0-1 0-2 0-3 2-4 2-5 4-6 4-7 6-8 6-9"),
]


@pytest.mark.parametrize(("axis", "expected"), RANGES)
def test_windows_of_each_query(axis, expected):
    length, window, stride, causal = axis
    found = [window_bounds(index, length, window, stride, causal) for index in range(length)]
    assert " ".join(f"{start}-{end - 1}" for start, end in found) == expected


def attended(axis, query):
    """The keys along one axis that token `query` of the whole axis sees: interleaved groups written out."""
    length, window, stride, dilation, causal = axis
    group = list(range(query % dilation, length, dilation))
    start, end = window_bounds(query // dilation, len(group), window, stride, causal)
    return group[start:end]


axes = st.builds(
    lambda window, stride, dilation, extra, causal: (
        window * dilation + extra,
        window,
        1 + stride % window,
        dilation,
        causal,
    ),
    st.integers(1, 7),
    st.integers(0, 6),
    st.integers(1, 3),
    st.integers(0, 12),
    st.booleans(),
)


@given(st.lists(axes, min_size=1, max_size=2), st.data())
@settings(max_examples=60, deadline=None)
def test_bounds_equal_tiles_counted_one_by_one(grid, data):
    rank = len(grid)
    query, key = (tuple(data.draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))) for _ in range(2))
    dynamic = data.draw(st.booleans())
    pattern = NeighborhoodPattern(
        tuple(one[0] for one in grid),
        *(tuple(one[i] for one in grid) for i in (1, 2, 3)),
        tuple(one[4] for one in grid),
    )
    found = simulate(pattern, Tiling(query, key, dynamic))
    counts = []
    for axis, tq, tk in zip(grid, query, key, strict=True):
        length, _, _, dilation, _ = axis
        mine = []
        for group in range(dilation):
            tokens = list(range(group, length, dilation))
            for row in range(0, len(tokens), tq):
                keys = {one // dilation for token in tokens[row : row + tq] for one in attended(axis, token)}
                first = min(keys)
                mine.append(len({(one - first * dynamic) // tk for one in range(first, max(keys) + 1)}))
        counts.append(mine)
    visits = [math.prod(one) for one in itertools.product(*counts)]
    tiles = math.prod(-(-axis[0] // tk) for axis, tk in zip(grid, key, strict=True))
    pairs = math.prod(sum(len(attended(axis, token)) for token in range(axis[0])) for axis in grid)
    assert (found.key_tiles, found.visited_most) == (tiles, max(visits))
    assert found.visited_mean == pytest.approx(sum(visits) / len(visits))
    assert found.flop_speedup == pytest.approx(math.prod(axis[0] for axis in grid) ** 2 / pairs)


def test_whole_windows_gain_nothing_and_causal_ones_at_most_twice():
    whole = simulate(NeighborhoodPattern((64,), 64), Tiling((8,), (8,)))
    assert (whole.speedup, whole.flop_speedup, whole.end_to_end) == (1.0, 1.0, 1.0)
    causal = simulate(NeighborhoodPattern((64,), 64, is_causal=True), Tiling((8,), (8,)))
    assert causal.speedup == 1.0  # the last query tile visits all
    assert causal.mean_speedup == pytest.approx(64 / 36) and causal.flop_speedup == pytest.approx(64 * 2 / 65)


def test_dynamic_tiles_are_never_visited_more_often():
    for stride in range(1, 9):
        pattern = NeighborhoodPattern((37, 41), (9, 8), stride)
        static, dynamic = (simulate(pattern, Tiling((4, 4), (4, 8), moves)) for moves in (False, True))
        assert dynamic.visited_most <= static.visited_most and dynamic.visited_mean <= static.visited_mean


def test_the_search_finds_the_perfect_stride_of_the_published_pattern():
    found = search(NeighborhoodPattern(VIDEO, WINDOW), TILES, vary=("stride",))
    assert found[0].pattern.stride == (1, 1, 1) and found[0].change == 0
    assert found[-1].simulation.efficiency == pytest.approx(1.0)
    assert found[-1].change <= math.log2(16 * 8 * 8)  # (16, 8, 8) is known to be perfect
    for before, after in itertools.pairwise(found):
        assert after.change > before.change and after.simulation.efficiency > before.simulation.efficiency


def test_the_search_misses_nothing_that_brute_force_finds():
    pattern, tiling = NeighborhoodPattern((20, 24), (7, 9), (1, 2)), Tiling((2, 4), (4, 2), True)
    everything = []
    windows = [range(math.ceil(w * 0.75), math.floor(w * 1.25) + 1) for w in (7, 9)]
    shapes = [Tiling(*pair, True) for pair in itertools.product([(1, 8), (2, 4), (4, 2), (8, 1)], repeat=2)]
    asked = simulate(pattern, tiling).speedup
    shapes = [tiles for tiles in shapes if simulate(pattern, tiles).speedup >= asked]
    assert 1 < len(shapes) < 16

    def axis_speeds(window, stride, tiles):
        grids = zip((20, 24), window, stride, tiles.query, tiles.key, strict=True)
        return [simulate(NeighborhoodPattern((n,), w, s), Tiling((q,), (k,), True)).speedup for n, w, s, q, k in grids]

    least = {tiles: axis_speeds((7, 9), (1, 2), tiles) for tiles in shapes}
    for first, second in itertools.product(*windows):
        for s, t in itertools.product(range(1, first + 1), range(1, second + 1)):
            change = sum(abs(math.log2(a / b)) for a, b in zip((first, second, s, t), (7, 9, 1, 2), strict=True))
            for tiles in shapes:
                speeds = axis_speeds((first, second), (s, t), tiles)
                if all(mine >= asked for mine, asked in zip(speeds, least[tiles], strict=True)):
                    one = simulate(NeighborhoodPattern((20, 24), (first, second), (s, t)), tiles)
                    everything.append((change, min(one.efficiency, 1.0)))
    found = search(pattern, tiling, step=0.0)
    assert len(found) > 2
    assert all(one.simulation.speedup >= asked for one in found)
    for one in found[1:]:
        best = max(efficiency for change, efficiency in everything if change <= one.change + 1e-9)
        assert min(one.simulation.efficiency, 1.0) == pytest.approx(best)
    assert min(found[-1].simulation.efficiency, 1.0) == pytest.approx(max(efficiency for _, efficiency in everything))


def test_the_search_tells_only_steps_worth_taking():
    every, some = (search(NeighborhoodPattern((64, 64), 11), Tiling((8, 8), (8, 8)), step=step) for step in (0.0, 0.2))
    assert set(some) < set(every) and (some[0], some[-1]) == (every[0], every[-1])
    for before, after in itertools.pairwise(some[:-1]):
        assert after.simulation.efficiency >= 1.2 * before.simulation.efficiency


def test_the_search_keeps_what_it_may_not_vary():
    found = search(NeighborhoodPattern((256, 256), 80), Tiling((16, 8), (16, 8)), vary=("tile",))
    assert {one.pattern for one in found} == {NeighborhoodPattern((256, 256), 80)}
    assert found[-1].simulation.speedup > found[0].simulation.speedup
    assert all(math.prod(one.tiling.query) == 128 for one in found)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: NeighborhoodPattern((8, 8, 8, 8), 3), "grid_size"),
        (lambda: NeighborhoodPattern((8, 0), 3), "grid_size"),
        (lambda: NeighborhoodPattern((8, 8), (3, 3, 3)), "kernel_size"),
        (lambda: NeighborhoodPattern((8, 8), 9), "kernel_size"),
        (lambda: NeighborhoodPattern((8, 8), 3, dilation=3), "kernel_size"),
        (lambda: NeighborhoodPattern((8, 8), 3, 4), "stride"),
        (lambda: NeighborhoodPattern((8, 8), 3, True), "stride"),
        (lambda: NeighborhoodPattern((8, 8), 3, is_causal=(True,)), "is_causal"),
        (lambda: Tiling((0,), (8,)), "query_tile"),
        (lambda: simulate(NeighborhoodPattern((8, 8), 3), Tiling((4, 4), (8,))), "key_tile"),
        (lambda: simulate(NeighborhoodPattern((8,), 3), Tiling((4,), (4,)), attention_share=0.0), "attention_share"),
        (lambda: search(NeighborhoodPattern((8,), 3), Tiling((4,), (4,)), vary=("colour",)), "vary"),
        (lambda: search(NeighborhoodPattern((8,), 3), Tiling((4,), (4,)), near=-1.0), "near"),
        (lambda: search(NeighborhoodPattern((8,), 3), Tiling((4,), (4,)), step=-1.0), "step"),
    ],
)
def test_what_cannot_be_is_named(make, argument):
    with pytest.raises(PatternError, match=argument) as found:
        make()
    assert found.value.argument == argument
