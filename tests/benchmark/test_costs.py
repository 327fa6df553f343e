"""Costs, timing and the machine's description. Speed itself is never asserted."""

import itertools
import json
from dataclasses import asdict

import pytest

from regard import KNN, Dense
from regard.benchmark import crossover, environment, interleave, measure_costs
from regard.results import CostPoint


def point(mechanism, tokens, seconds, direction="forward"):
    return CostPoint(mechanism, tokens, 1, 6, 64, "float32", direction, "x", seconds, seconds, seconds, 1, 0)


def against_dense(times):
    return [point("dense", n, 1.0) for n in times] + [point("other", n, t) for n, t in times.items()]


def test_measure_costs():
    told = []
    points = measure_costs(
        [Dense(), KNN(0.5)],
        tokens=(64, 25),
        heads=2,
        head_dim=16,
        budget_seconds=20,
        on_progress=lambda *step: told.append(step),
    )
    assert [(p.tokens, p.direction, p.mechanism) for p in points] == list(
        itertools.product((25, 64), ("forward", "forward+backward"), ("dense", "knn(topk=0.5)"))
    )
    assert all(p.seconds_low <= p.seconds <= p.seconds_high and p.repeats >= 1 for p in points)
    assert points[0].flops == 4 * 2 * 25 * 25 * 16
    assert all(p.flops > 0 and p.peak_memory is not None and p.peak_memory < 3 * 2**20 for p in points)
    assert [done for done, *_ in told] == list(range(6))


def test_budget_leaves_sizes_out():
    points = measure_costs([Dense()], tokens=(16, 400_000), heads=1, head_dim=8, budget_seconds=1)
    assert {p.tokens for p in points} == {16}


def test_measure_costs_refuses():
    with pytest.raises(ValueError, match="mechanisms"):
        measure_costs([])
    with pytest.raises(ValueError, match="mechanisms"):
        measure_costs([KNN(3), KNN(3)])
    with pytest.raises(ValueError, match="tokens"):
        measure_costs([Dense()], tokens=(0,))
    with pytest.raises(ValueError, match="dtype"):
        measure_costs([Dense()], dtype="int8")


@pytest.mark.parametrize(
    ("times", "tokens", "always"),
    [
        ({100: 2.0, 400: 0.5}, 200.0, False),
        ({100: 0.5, 400: 0.4}, 100.0, True),
        ({100: 0.5, 400: 2.0}, None, False),
        ({100: 0.5, 400: 2.0, 1600: 0.5}, 800.0, False),
        ({100: 2.0, 400: 1.0, 1600: 0.5}, 400.0, False),
    ],
)
def test_crossover(times, tokens, always):
    (found,) = crossover(against_dense(times))
    assert found.tokens == (pytest.approx(tokens) if tokens else None)
    assert found.always is always


def test_crossover_needs_dense():
    assert crossover([point("other", 100, 1.0)]) == []


def test_interleave_runs_all_in_every_round():
    seen = []
    timings = interleave(
        {n: lambda n=n: seen.append(n) for n in "abc"}, max_rounds=7, min_rounds=1, warm_up=1, budget_seconds=5
    )
    assert {t.repeats for t in timings.values()} == {7}
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert rounds[:3] == ["abc", "bca", "cab"] and all(sorted(r) == list("abc") for r in rounds)


def test_interleave_refuses():
    with pytest.raises(ValueError, match="nothing to time"):
        interleave({})
    with pytest.raises(ValueError, match="budget_seconds"):
        interleave({"a": int}, budget_seconds=0)


def test_environment_tells_no_names():
    found = environment()
    text = json.dumps(asdict(found))
    assert found.cores >= 1 and found.machine and "/home" not in text and "/tmp" not in text
