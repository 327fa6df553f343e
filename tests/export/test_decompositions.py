"""What an export refuses, and the parts that stand between an operator and its decomposition."""

import subprocess
import sys

import pytest
import sympy
import torch
from torch import nn

from regard.export import export_onnx, export_package, export_program
from regard.export.decompositions import _holds_always, _whole_numbers
from regard.ops import kmeans_clusters, knn_attention
from regard.ops._counts import _fraction, share_of


class Grouped(nn.Module):
    def forward(self, images):
        _, _, height, width = images.shape
        return kmeans_clusters(images.flatten(2).mT, 4, grid_size=(height, width)).centroids


class Attending(nn.Module):
    def forward(self, query, key, value):
        return knn_attention(query, key, value, topk=3)


def test_a_start_spread_over_an_open_grid_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    open_grid = ({2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)},)
    with pytest.raises(NotImplementedError, match="grid and num_clusters must be constant"):
        export_onnx(Grouped().eval(), torch.randn(1, 8, 6, 7), tmp_path / "m.onnx", dynamic_shapes=open_grid)
    assert list(tmp_path.iterdir()) == []


def test_training_other_types_and_names_are_refused(tmp_path):
    inputs = tuple(torch.randn(3, 1, 2, 16, 8).unbind())
    with pytest.raises(ValueError, match=r"model: it is in training mode"):
        export_program(Attending(), inputs)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        export_program(knn_attention, inputs)
    with pytest.raises(ValueError, match=r"file: a package's name ends in \.pt2, got 'm.so'"):
        export_package(Attending().eval(), inputs, tmp_path / "m.so")


def test_a_size_that_is_not_free_is_named():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 6, 8)

    with pytest.raises(ValueError, match="dynamic_shapes: Fixed is not free"):
        export_program(Fixed().eval(), torch.randn(2, 6, 8), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=9)},))


def test_conditions_on_sizes_are_tried():
    class Range:
        lower, upper = sympy.Integer(2), sympy.oo

    n = sympy.Symbol("n", integer=True)
    assert _holds_always(sympy.Le(sympy.Min(n, 7), n), {n: Range})
    assert not _holds_always(sympy.Ne(n, 3), {n: type("R", (), {"lower": sympy.Integer(2), "upper": sympy.Integer(9)})})
    assert not _holds_always(sympy.Eq(n, 40), {n: Range})


@pytest.mark.parametrize("numbers", [(0,), (1, 0, 1), tuple(range(0, 4000, 37)), (2**40, 5)])
def test_whole_numbers_are_themselves(numbers):
    assert _whole_numbers(numbers, torch.device("cpu")).tolist() == list(numbers)


@pytest.mark.parametrize("share", [0.07, 0.1, 1 / 3, 0.25, 0.999, 1.0, 1e-12, 0.123456789])
def test_shares_in_whole_numbers_are_the_shares(share):
    above, below = _fraction(share)
    for whole in (1, 3, 7, 100, 196, 4097, 16385):
        assert min((above * whole + below - 1) // below, whole) == share_of(share, whole)


def test_export_is_imported_alone():
    """Every operator that is decomposed is defined by then, whoever else was imported."""
    done = subprocess.run([sys.executable, "-c", "import regard.export"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
