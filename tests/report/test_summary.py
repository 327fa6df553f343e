"""Means, spreads and verdicts."""

import math
import statistics

import pytest

from regard.report import summary
from regard.report.summary import Difference, Ratio, summarise, t_quantile


# Student's t, 0.975 quantile, from printed tables (three decimals).
@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_t_quantile_agrees_with_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def of(comparison, mechanism):
    return next(one for one in summarise(comparison) if one.mechanism == mechanism)


def test_difference_is_paired_by_seed(comparison):
    found = of(comparison, "knn(topk=0.125)")
    differences = [0.802 - 0.812, 0.795 - 0.806, 0.806 - 0.815]
    assert found.difference.mean == pytest.approx(statistics.fmean(differences))
    assert found.difference.half_width == pytest.approx(
        4.302653 * statistics.stdev(differences) / math.sqrt(3), rel=1e-5
    )
    assert found.difference.shown


def test_no_difference_is_shown_where_the_interval_covers_zero(comparison):
    found = of(comparison, "knn(topk=0.5)").difference
    assert abs(found.mean) < found.half_width
    assert not found.shown


def test_only_seeds_that_both_finished_are_paired(comparison):
    comparison.runs = [run for run in comparison.runs if (run.mechanism, run.seed) != ("dense", 1)]
    comparison.runs[-1].finished = False  # knn(topk=0.125), seed 2
    found = of(comparison, "knn(topk=0.125)")
    assert len(found.runs) == 2
    assert found.difference == Difference(pytest.approx(0.802 - 0.812), None, 1)
    assert not found.difference.shown


def test_equal_runs_show_no_difference(comparison):
    for run in comparison.runs:
        run.epochs[-1].test_accuracy = 0.8
    assert not of(comparison, "knn(topk=0.5)").difference.shown


def test_the_first_mechanism_is_the_baseline_without_dense(comparison):
    comparison.settings["mechanisms"] = ["knn(topk=0.5)", "knn(topk=0.125)"]
    comparison.runs = [run for run in comparison.runs if run.mechanism != "dense"]
    comparison.costs = [point for point in comparison.costs if point.mechanism != "dense"]
    assert summary.baseline_of(comparison) == "knn(topk=0.5)"
    assert of(comparison, "knn(topk=0.5)").difference is None
    assert of(comparison, "knn(topk=0.125)").difference is not None


def test_a_mechanism_without_runs_is_kept_with_nothing(comparison):
    comparison.runs = [run for run in comparison.runs if run.mechanism != "knn(topk=0.5)"]
    found = of(comparison, "knn(topk=0.5)")
    assert found.accuracy is None and found.spread is None and found.difference is None
    assert found.asked == 3


def test_speed_is_the_baseline_time_over_the_mechanisms(comparison):
    speed = of(comparison, "knn(topk=0.125)").speed
    times = {(p.mechanism, p.direction, p.tokens): p.seconds for p in comparison.costs}
    for (direction, tokens), ratio in speed.items():
        expected = times["dense", direction, tokens] / times["knn(topk=0.125)", direction, tokens]
        assert ratio.value == pytest.approx(expected)
        assert ratio.low < ratio.value < ratio.high
    assert speed["forward", 196].value < 1 < speed["forward", 3136].value


def test_overlapping_quartiles_are_level():
    assert not Ratio(1.02, 0.97, 1.06).shown
    assert Ratio(1.2, 1.1, 1.3).shown
    assert Ratio(0.8, 0.75, 0.9).shown


def test_peak_memory_is_that_of_the_largest_size_and_the_longest_direction(comparison):
    largest = [p for p in comparison.costs if p.tokens == 3136 and p.direction == "forward+backward"]
    expected = next(p.peak_memory for p in largest if p.mechanism == "knn(topk=0.5)")
    assert of(comparison, "knn(topk=0.5)").peak_memory == expected


def test_a_size_measured_in_one_direction_alone_is_not_the_largest(comparison):
    comparison.costs = [p for p in comparison.costs if (p.direction, p.tokens) != ("forward+backward", 3136)]
    assert summary.largest_size(comparison.costs) == 1600
    expected = [
        p for p in comparison.costs if (p.mechanism, p.direction, p.tokens) == ("dense", "forward+backward", 1600)
    ]
    assert of(comparison, "dense").peak_memory == expected[0].peak_memory
    assert summary.largest_size([]) == 0
