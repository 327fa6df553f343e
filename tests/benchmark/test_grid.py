"""The grid of `regard bench`: entries, gates that see a fault, and how a point is measured. Speed is never asserted."""

import dataclasses
import json
import math

import pytest
import torch

import regard.ops
from regard.benchmark import gates, grid
from regard.benchmark.entry import Case, Peer, prepared_call
from regard.benchmark.grid import OWN, Grid, Point, measure_memory, measure_point, points_of
from regard.benchmark.operators import OPERATORS, entries_of
from regard.results import BenchCell, BenchTime, growth_of

BOTH = ("forward", "forward+backward")
TINY = {
    "knn": [Case(24, heads=1, head_dim=16, series="k = 4", options={"topk": 4})],
    "multipole": [
        Case(
            26,
            heads=2,
            head_dim=16,
            options={"num_clusters": 6, "near": 0.3, "num_prefix_tokens": 1, "grid_size": [5, 5]},
        )
    ],
    "neighborhood": [Case(30, heads=2, head_dim=16, options={"grid_size": [5, 6], "kernel_size": [3, 3]})],
    "routed": [Case(32, heads=2, head_dim=16, options={"query_block": 8, "key_block": 8})],
    "density_peaks": [Case(40, 2, 1, 8, options={"num_clusters": [4, 9]})],
    "kmeans": [Case(60, 2, 1, 8, options={"num_clusters": 7})],
}


def tiny(name: str, *cases: Case):
    """The entry with small sizes."""
    (entry,) = entries_of([name])
    return dataclasses.replace(entry, cases=tuple(cases or TINY[name]))


def point_of(entry, direction="forward", dtype="float32", place=0):
    return Point(entry, entry.cases[place], dtype, direction)


@pytest.mark.parametrize("entry", entries_of(), ids=lambda entry: entry.name)
def test_entries_are_whole(entry):
    assert callable(getattr(regard.ops, entry.operator))
    labels = [case.label for case in entry.cases]
    assert len(set(labels)) == len(labels) and any(case.quick for case in entry.cases)
    assert json.loads(json.dumps([dict(case.options) for case in entry.cases]))
    peers = [peer.name for peer in entry.peers]
    assert len({*peers, OWN, "float32"}) == len(peers) + 2
    by_series = {}
    for case in entry.cases:
        by_series.setdefault((case.series, case.batch, case.heads, case.head_dim), []).append(case.tokens)
    assert all(sizes == sorted(set(sizes)) for sizes in by_series.values())
    assert max(map(len, by_series.values())) > 1, "no series to tell growth of"


def test_entries_are_found_by_name_in_the_order_asked():
    assert [entry.name for entry in entries_of(["kmeans", "knn"])] == ["kmeans", "knn"]
    assert [entry.name for entry in entries_of()] == list(OPERATORS)
    with pytest.raises(ValueError, match="unknown name 'kmean'; known: kmeans, "):
        entries_of(["kmean"])
    with pytest.raises(ValueError, match="given twice"):
        entries_of(["knn", "knn"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gates_are_green_at_small_sizes(name, dtype):
    entry = tiny(name)
    gate = entry.gate(entry.cases[0], entry.inputs(entry.cases[0], dtype, "cpu"), len(entry.directions) > 1)
    assert gate.passed, str(gate)
    assert "green" in str(gate) and dtype in str(gate)


def test_multipoles_gate_sees_a_small_error(monkeypatch):
    run = gates.MULTIPOLE.run
    monkeypatch.setattr(type(gates.MULTIPOLE), "run", lambda self, call: run(call) * (1 + 1e-5))
    entry = tiny("multipole")
    gate = entry.gate(entry.cases[0], entry.inputs(entry.cases[0], "float32", "cpu"), True)
    assert not gate.passed and "RED" in str(gate)
    assert all(not one.passed for one in gate.judgements if one.name.endswith("output"))


def test_a_kernel_is_judged_by_its_own_pytorch_path(monkeypatch):
    entry = tiny("knn")
    tensors = entry.inputs(entry.cases[0], "float32", "cpu")
    options = {"topk": 24}  # all keys: nothing is selected
    gate = gates.check_kernel(regard.ops.knn_attention, tensors, options=options, backward=True)
    assert gate.passed and len(gate.judgements) == 4, str(gate)

    def wrong(query, key, value, **options):
        output = regard.ops.knn_attention(query, key, value, **options)
        return output if query.dtype == torch.float64 or _only_pytorch() else output * (1 + 1e-5)

    def _only_pytorch():
        return regard.ops._dispatch._only == "pytorch"

    assert not gates.check_kernel(wrong, tensors, options=options, backward=False).passed
    rough = [lambda query, key, value: wrong(query, key, value, **options)]
    gate = gates.check_kernel(wrong, tensors, options=options, formulations=rough, backward=False)
    assert gate.passed  # as rough as what plain operations may be


def test_kmeans_gate_sees_moved_centroids_and_wrong_assignments(monkeypatch):
    entry = tiny("kmeans")
    tensors = entry.inputs(entry.cases[0], "float32", "cpu")
    cluster = gates.kmeans_clusters

    def moved(x, *args, **options):
        found = cluster(x, *args, **options)
        return found._replace(centroids=found.centroids * (1 + 1e-5))

    def swapped(x, *args, **options):
        found = cluster(x, *args, **options)
        return found._replace(assignment=(found.assignment + 1) % 7)

    monkeypatch.setattr(gates, "kmeans_clusters", moved)
    gate = entry.gate(entry.cases[0], tensors, False)
    assert not gate.passed and not gate.problems
    monkeypatch.setattr(gates, "kmeans_clusters", swapped)
    assert "nearer to another centroid" in str(entry.gate(entry.cases[0], tensors, False))


def test_density_peaks_gate_sees_another_grouping(monkeypatch):
    entry = tiny("density_peaks")
    cluster = gates.density_peak_clusters

    def other(x, counts, **options):
        found = cluster(x, counts, **options)
        return [one._replace(assignment=one.assignment.roll(1, -1)) for one in found]

    monkeypatch.setattr(gates, "density_peak_clusters", other)
    gate = entry.gate(entry.cases[0], entry.inputs(entry.cases[0], "float32", "cpu"), False)
    assert len(gate.problems) == 4 and not gate.passed


@pytest.mark.parametrize("direction", BOTH)
def test_a_point_is_gated_timed_and_counted(direction):
    point = point_of(tiny("knn"), direction)
    cell = measure_point(point, Grid(seconds=0.05))
    assert cell.passed and cell.key == point.key
    assert [one.name for one in cell.times] == [OWN, "sdpa", "published"]
    for one in cell.times:
        assert not one.skipped and one.repeats >= 1 and one.seconds_low <= one.seconds <= one.seconds_high
    assert cell.own.slower == 1.0
    assert cell.backend == regard.ops.explain("knn_attention", *[torch.zeros(1, 1, 8, 8)] * 3, topk=2).backend
    tensor = 24 * 16 * 4
    forward = 2 * 24 * 16 * (24 + 4)
    # Forward: query, key, value, output. Backward: the output's gradient and three more.
    assert cell.bytes == tensor * (4 if direction == "forward" else 8)
    assert cell.flops == (forward if direction == "forward" else forward + 2 * 24 * 16 * (24 + 4 * 4))


def test_what_stands_in_for_dense_attention_tells_how_near_it_comes():
    (case,) = TINY["multipole"]
    exact = dataclasses.replace(case, options={**case.options, "near": 1.0})
    cosines = [measure_point(point_of(tiny("multipole", one)), Grid(seconds=0.02)).cosine for one in (case, exact)]
    assert 0.5 < cosines[0] < 0.9999 and cosines[1] == pytest.approx(1.0, abs=1e-6)
    assert math.isnan(measure_point(point_of(tiny("knn")), Grid(seconds=0.02)).cosine)


def test_half_types_run_beside_the_operator_in_float32():
    cell = measure_point(point_of(tiny("kmeans"), dtype="bfloat16"), Grid(seconds=0.05))
    assert [(one.name, bool(one.skipped)) for one in cell.times] == [(OWN, False), ("float32", False), ("eager", True)]
    assert "half" in cell.times[-1].skipped


def test_nothing_is_timed_while_the_gate_is_red():
    def never(**tensors):
        raise AssertionError("timed although the gate is red")

    red = gates.Findings("knn_attention", "float32", problems=("wrong",))
    entry = dataclasses.replace(tiny("knn"), gate=lambda *asked: red, peers=(Peer("x", lambda case: never),))
    cell = measure_point(point_of(entry), Grid(seconds=0.05))
    assert not cell.passed and cell.times == [] and cell.own is None and "wrong" in cell.gate


def test_each_direction_is_gated_by_what_it_computes():
    asked = []

    def gate(case, tensors, backward):
        asked.append(backward)
        return gates.Findings("x", "float32", problems=("wrong gradient",) if backward else ())

    entry, grid = dataclasses.replace(tiny("knn"), gate=gate, peers=()), Grid(seconds=0.02)
    assert [measure_point(point_of(entry, direction), grid).passed for direction in BOTH] == [True, False]
    assert asked == [False, True]


def test_a_peer_that_refuses_or_fails_is_left_out_with_its_reason():
    def failing(case):
        def call(**tensors):
            raise RuntimeError("no such instruction\nand more")

        return call

    peers = (Peer("odd", failing), Peer("shy", failing, lambda *asked: "needs a GPU"))
    cell = measure_point(point_of(dataclasses.replace(tiny("knn"), peers=peers)), Grid(seconds=0.02))
    assert {one.name: one.skipped for one in cell.times} == {
        OWN: "",
        "odd": "RuntimeError: no such instruction",
        "shy": "needs a GPU",
    }
    assert math.isnan(cell.times[1].seconds)


def test_a_peer_is_left_out_where_it_would_take_too_long():
    cases = [Case(tokens, heads=1, head_dim=16, series="k = 4", options={"topk": 4}) for tokens in (16, 32)]
    entry, grid = tiny("knn", *cases), Grid(seconds=0.02, patience=1.0)
    first = point_of(entry)
    grid.remember(first, "published", 0.3)
    grid.remember(first, "sdpa", 0.2)
    cell = measure_point(point_of(entry, place=1), grid)
    skipped = {one.name: one.skipped for one in cell.times}
    assert skipped["sdpa"] == "" and skipped["published"] == "about 1 s a run; --patience 2 takes it"
    dense = entry.peers[0]
    assert grid.too_slow(point_of(entry, "forward+backward", place=1), dense)  # three times its forward
    assert not grid.too_slow(point_of(entry, "forward+backward"), dense)
    assert not grid.too_slow(point_of(entry, place=1), dataclasses.replace(entry.peers[1], growth=1.0))


def test_recorded_inputs_take_the_place_of_random_ones():
    given = {name: torch.ones(1, 1, 24, 16) for name in ("query", "key", "value")}
    point = point_of(tiny("knn"), dtype="bfloat16")
    found = Grid(inputs=lambda name, case: given).tensors(point)
    assert all(torch.equal(found[name], given[name].bfloat16()) for name in given)
    assert not torch.equal(Grid().tensors(point)["query"], found["query"])


def test_what_has_no_gradient_has_no_backward():
    entry = tiny("kmeans")
    assert entry.directions == ("forward",)
    with pytest.raises(ValueError, match="direction"):
        prepared_call(entry.own(entry.cases[0]), entry.inputs(entry.cases[0], "float32", "cpu"), "forward+backward")
    names = [str(point) for point in points_of([entry], dtypes=["float32"], directions=BOTH)]
    assert names == [f"kmeans, {entry.cases[0].label}, float32, forward"]


def test_memory_is_measured_of_all_that_was_timed_but_compiled():
    (entry,) = entries_of(["kmeans"])
    compiled = dataclasses.replace(entry, peers=(*entry.peers, Peer("compiled", lambda case: None, compiles=True)))
    point = point_of(compiled)
    times = [BenchTime(OWN, 1.0), BenchTime("eager", 1.0), BenchTime("compiled", 1.0), BenchTime("x", skipped="no")]
    case = point.case
    place = (entry.name, case.label, case.series, case.tokens, case.batch, case.heads, case.head_dim)
    cell = BenchCell(*place, "float32", "forward", "green", True, times=times)
    measure_memory([cell], [point], "cpu", 60)
    own, eager, *others = (one.peak_memory for one in cell.times)
    matrix = 4 * case.batch * case.tokens * case.options["num_clusters"]
    assert own is not None and own < eager and eager > matrix
    assert others == [None, None]


def test_growth_is_fitted_to_the_large_sizes_of_a_series():
    def cell(tokens, seconds, batch=1):
        times = [BenchTime(OWN, seconds, slower=1.0), BenchTime("sdpa", 1e-9 * tokens**2), BenchTime("x", skipped="no")]
        label = f"N {tokens}, B {batch}"
        return BenchCell("knn", label, "s", tokens, batch, 6, 64, "float32", "forward", "", True, times=times)

    cells = [cell(100, 1.0), cell(1000, 1.0), cell(2000, 2.0**1.5), cell(4000, 4.0**1.5), cell(9000, 7.0, batch=2)]
    found = {one.name: one for one in growth_of(cells)}
    assert set(found) == {OWN, "sdpa"}
    assert found[OWN].exponent == pytest.approx(1.5) and found["sdpa"].exponent == pytest.approx(2.0)
    assert (found[OWN].tokens_low, found[OWN].tokens_high) == (1000, 4000)
    assert growth_of(cells[:1]) == []
    assert growth_of([cell(10, 1.0), cell(1000, 10.0)])[0].exponent == pytest.approx(0.5)


class TurnsOfAGPU:
    """Stands in for OnGPU: each call tells a second, whatever it took."""

    made: list["TurnsOfAGPU"] = []

    def __init__(self, calls):
        self.calls, self.turns = list(calls), 0
        TurnsOfAGPU.made.append(self)

    def clock(self):
        self()
        return 1.0

    def __call__(self):
        self.calls[self.turns % len(self.calls)]()
        self.turns += 1


def test_on_a_gpu_every_contender_takes_its_inputs_in_turn(monkeypatch):
    monkeypatch.setattr(TurnsOfAGPU, "made", [])
    monkeypatch.setattr(grid, "OnGPU", TurnsOfAGPU)
    monkeypatch.setattr(grid, "input_sets", lambda tensors, device: [tensors, dict(tensors), dict(tensors)])
    monkeypatch.setattr(grid, "_on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cell = measure_point(point_of(tiny("knn")), Grid(seconds=0.05))
    assert [one.name for one in cell.times if not one.skipped] == ["regard", "sdpa", "published"]
    assert all(one.seconds == 1.0 for one in cell.times)
    assert len(TurnsOfAGPU.made) == 3 and all(len(one.calls) == 3 and one.turns >= 3 for one in TurnsOfAGPU.made)
