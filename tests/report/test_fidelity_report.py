"""Tables and figures of a hand-made fidelity study."""

import pytest

from regard.report.fidelity import (
    fidelity_over_share,
    fidelity_table,
    head_losses,
    layer_table,
    patch_losses,
    write_png,
)
from regard.results import Environment, FidelityPoint, FidelityStudy, PictureFidelity

KNN = "knn(topk=0.25)"
ALONE = "multipole(num_clusters=64, near=0, far='centroid', iterations=2)"
GAUSSIAN = "multipole(num_clusters=128, near=16, far='gaussian', iterations=2)"
HERE = Environment("machine", 2, 2, "avx512", "cpu", "3.11", "2.15", "1.0.31", "0.1.0", "abc", "2026-11-21")


def point(mechanism, photo, loss, share, layers=None):
    fidelity = PictureFidelity(4096, 1 - loss, 1 - 3 * loss, 10 * loss, 1 - 5 * loss, 1 - 9 * loss, 1 - loss / 2)
    return FidelityPoint(mechanism, 896, photo, fidelity, share, 1.0, layers)


@pytest.fixture
def study():
    heads = [[PictureFidelity(4096, 1 - loss, 1 - 2 * loss, 0.1, 0.9, 0.8) for loss in (1e-3, 0.1)] for _ in range(3)]
    points = []
    for photo, harder in (("a", 1.0), ("b", 2.2)):
        points += [
            point("dense", photo, 0.0, 1.0),
            point(KNN, photo, 0.01 * harder, 0.25),
            point(ALONE, photo, 0.05 * harder, 0.0002),
            point(GAUSSIAN, photo, 0.001 * harder, 0.14, heads),
        ]
    settings = {"mechanisms": ["dense", KNN, ALONE, GAUSSIAN], "layers": [GAUSSIAN], "sizes": [896]}
    return FidelityStudy(settings, HERE, points)


def test_the_table_holds_mean_and_worst_photograph(study):
    lines = fidelity_table(study, 896).splitlines()
    assert len(lines) == 2 + 4
    (row,) = [line for line in lines if GAUSSIAN in line]
    assert row == (
        f"| `{GAUSSIAN}` | 14.0 % | 0.9984 (0.9978) | 0.9952 (0.9934) | 0.016 (0.022) | 0.992 (0.989) "
        "| 0.986 (0.980) | 0.9992 (0.9989) |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert fidelity_table(study, 518).count("\n") == 2


def test_the_table_of_layers_holds_mean_and_worst_head(study):
    lines = layer_table(study, [GAUSSIAN, KNN], 896).splitlines()
    assert lines[0] == f"| layer | `{GAUSSIAN}` |", "only what was judged by layer"
    assert lines[2] == "| 0 | 0.8990 (0.8000) |"
    assert len(lines) == 2 + 3
    assert layer_table(study, [KNN], 896) == ""


def test_fidelity_over_share_draws_every_family(study):
    figure = fidelity_over_share(study, 896, goals=(0.998, 0.985))
    raw, centred = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["k-NN", "centroids alone", "multipole, Gaussian"]
    heights = {line.get_label(): list(line.get_ydata()) for line in raw.get_lines()}
    assert heights["k-NN"] == pytest.approx([0.016])
    assert {line.get_label(): list(line.get_ydata()) for line in centred.get_lines()}["k-NN"] == pytest.approx([0.048])
    bottom, top = raw.get_ylim()
    assert bottom > top, "the best stands on top"
    assert fidelity_over_share(study, 518) is None


def test_head_losses_show_every_head_once(study):
    figure = head_losses(study, [GAUSSIAN, KNN], 896)
    panel = figure.axes[0]
    texts = [text.get_text() for text in panel.texts]
    assert texts == ["2.0", "200"] * 3
    assert panel.get_title(loc="left") == "16 of 128 clusters, Gaussian"
    assert head_losses(study, [KNN], 896) is None


def test_pictures_are_written_whole(tmp_path, study):
    figure = patch_losses([[[0.5, 0.5, 0.5]] * 8] * 8, {KNN: [[0.1, 0.2], [0.3, 0.4]], ALONE: [[0.0, 0.1], [0.5, 1.0]]})
    titles = [axes.get_title(loc="left") for axes in figure.axes[:3]]
    assert titles == ["photograph", "k-NN, N/4\nmean 0.7500", "64 centroids alone\nmean 0.6000"]
    write_png(figure, tmp_path / "deep" / "picture.png", dpi=50)
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["picture.png"]
