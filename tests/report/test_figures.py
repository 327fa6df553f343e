"""What the figures show: labels apart, crossovers where the curves meet, one colour a mechanism."""

import itertools

import pytest
from matplotlib.colors import to_hex

from regard.report import maps, plots
from regard.report.style import _spread, looks
from regard.results import Crossover


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([0.0, 30.0], [0.0, 30.0]),
        ([10.0, 10.0], [5.0, 15.0]),
        ([10.0, 10.0, 10.0], [0.0, 10.0, 20.0]),
        ([0.0, 1.0, 50.0], [-4.5, 5.5, 50.0]),
    ],
)
def test_labels_are_moved_apart_and_no_further(heights, expected):
    assert _spread(heights, 10.0) == pytest.approx(expected)


def texts(axes):
    return [text for text in axes.texts if text.get_text()]


def test_line_labels_do_not_overlap(comparison):
    figure = plots.accuracy_over_epochs(comparison)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts(figure.axes[0])]
    assert len(boxes) == 3
    assert not any(left.overlaps(right) for left, right in itertools.combinations(boxes, 2))


def test_every_mechanism_keeps_its_colour(comparison):
    expected = {look.color for look in looks(comparison).values()}
    for figure in (plots.accuracy_over_epochs(comparison), plots.operator_time(comparison, "forward")):
        assert {to_hex(line.get_color()) for line in figure.axes[0].lines if line.get_linewidth() >= 2} == expected


def test_seeds_are_lines_of_their_own_and_unfinished_ones_are_dotted(comparison):
    comparison.runs[-1].finished = False
    thin = [line for line in plots.accuracy_over_epochs(comparison).axes[0].lines if line.get_linewidth() < 1]
    assert len(thin) == 9
    assert sum(line.get_linestyle() == ":" for line in thin) == 1


def test_the_mean_line_ends_at_the_mean_accuracy(comparison):
    lines = plots.accuracy_over_epochs(comparison).axes[0].lines
    dense = [line for line in lines if to_hex(line.get_color()) == looks(comparison)["dense"].color]
    mean = next(line for line in dense if line.get_linewidth() > 2)
    assert mean.get_ydata()[-1] == pytest.approx(100 * (0.812 + 0.806 + 0.815) / 3)


def test_a_ring_marks_the_crossover_on_the_baselines_line(comparison):
    comparison.crossovers = [
        Crossover("knn(topk=0.5)", "forward", 784.0),
        Crossover("knn(topk=0.125)", "forward", None),
    ]
    axes = plots.operator_time(comparison, "forward").axes[0]
    ring = next(line for line in axes.lines if line.get_markerfacecolor() == "none")
    at_784 = next(p for p in comparison.costs if (p.mechanism, p.direction, p.tokens) == ("dense", "forward", 784))
    assert ring.get_xydata()[0] == pytest.approx([784.0, 1e3 * at_784.seconds])
    assert sum("faster from" in text.get_text() for text in texts(axes)) == 1


def test_maps_stand_in_rows_of_images_and_columns_of_mechanisms(comparison):
    figure = maps.attention_maps(comparison, most=3)
    assert len(figure.axes) == 3 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == ["", "dense", "knn(topk=0.5)", "knn(topk=0.125)"]
    captions = [axes.get_xlabel() for axes in figure.axes]
    assert captions[0] == "Coat"
    assert captions[7] == "half on 4 of 49\nsays Shirt"


def test_a_missing_map_leaves_its_place_empty(comparison):
    comparison.maps = [one for one in comparison.maps if (one.mechanism, one.image_index) != ("knn(topk=0.5)", 0)]
    figure = maps.attention_maps(comparison)
    assert not figure.axes[2].images and figure.axes[6].images


def test_no_data_no_figure(comparison):
    comparison.runs, comparison.costs, comparison.maps = [], [], []
    assert plots.accuracy_over_seconds(comparison) is None
    assert plots.cost_accuracy(comparison) is None
    assert plots.cost_accuracy(comparison, operator=True) is None
    assert plots.operator_time(comparison, "forward") is None
    assert plots.operator_memory(comparison, "forward") is None
    assert maps.attention_maps(comparison) is None
