"""Whole models: a converted DeiT and a ClusTR as programs, ONNX files and compiled packages."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import regard
from regard.export import export_onnx, export_package, export_program, load_package
from regard.export.decompositions import operators_left

MECHANISMS = (
    "knn(topk=0.1)",
    "multipole(num_clusters=8, near=2)",
    "multipole",
    "neighborhood(kernel_size=3)",
    "clustered",
)


def deit(mechanism: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=96, depth=2, num_classes=10).eval()
    # Fresh weights give all tokens nearly the same logits; trained ones do not.
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.15)
    regard.convert(model, mechanism)
    return model


def clustr() -> nn.Module:
    torch.manual_seed(0)
    from regard.backbones.clustr import Architecture

    return regard.create_model("clustr_b1", architecture=Architecture((1, 1, 1, 1)), num_classes=10).eval()


MODELS = {**{mechanism: lambda mechanism=mechanism: deit(mechanism) for mechanism in MECHANISMS}, "clustr": clustr}
_QUICK = ("knn(topk=0.1)", "multipole")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in MODELS]
)


def images(batch: int, side: int = 96) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch + side))


def shapes(name: str) -> tuple[dict[int, object]]:
    """Any batch; ClusTR takes any size, too."""
    batch = {0: torch.export.Dim("batch", min=1, max=256)}
    if name != "clustr":
        return (batch,)
    return ({**batch, **{n: 32 * torch.export.Dim(f"side{n}", min=2, max=64) for n in (2, 3)}},)


def sides(name: str) -> tuple[int, ...]:
    return (96, 160) if name == "clustr" else (96,)


@every_model
def test_exports_with_its_operators(name: str) -> None:
    model = MODELS[name]()
    program = export_program(model, images(2), dynamic_shapes=shapes(name))
    assert operators_left(program)
    with torch.no_grad():
        for side in sides(name):
            torch.testing.assert_close(program.module()(images(3, side)), model(images(3, side)))


@every_model
def test_onnx_at_sizes_not_seen_at_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    file = export_onnx(model, images(2), tmp_path / "model.onnx", dynamic_shapes=shapes(name), input_names=["image"])
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for side in sides(name):
        for batch in (1, 3):
            (found,) = session.run(None, {"image": images(batch, side).numpy()})
            with torch.no_grad():
                expected = model(images(batch, side))
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("name", ["knn(topk=0.1)", "clustr"])
def test_package(name: str, standalone: bool, tmp_path: Path) -> None:
    model = MODELS[name]()
    file = export_package(model, images(2), tmp_path / "model.pt2", dynamic_shapes=shapes(name), standalone=standalone)
    package = load_package(file)
    with torch.no_grad():
        for side in sides(name):
            expected = model(images(3, side))
            torch.testing.assert_close(package(images(3, side)), expected, rtol=1e-3, atol=1e-4)
