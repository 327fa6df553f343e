"""What all Triton kernels share, as far as it runs without a GPU and without Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from attention_cases import Shape, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard.ops import _triton
from regard.ops._triton import Config, first_that_fits, only_config, padded

needs_triton = pytest.mark.skipif(bool(_triton.available()), reason=_triton.available() or "Triton is here")


def on_a_fake_gpu(dtype: torch.dtype = torch.float32, **sizes: int) -> list[torch.Tensor]:
    """Query, key, value on a GPU that need not exist."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(t.shape, dtype=dtype, device="cuda") for t in inputs(Shape(**sizes))]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 40, 256])
def test_gpu_tensors_are_taken(dtype: torch.dtype, dim: int) -> None:
    query, _, value = on_a_fake_gpu(dtype, dim=dim, value_dim=dim)
    assert _triton.refusal(query, value) is None


@needs_triton
@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lambda: inputs(Shape()), "on cpu"),
        (lambda: on_a_fake_gpu(torch.float64), "float64"),
        (lambda: on_a_fake_gpu(dim=257), "head_dim 257 is above 256"),
        (lambda: on_a_fake_gpu(value_dim=300), "head_dim 300 is above 256"),
    ],
)
def test_what_is_refused_and_why(tensors, reason: str) -> None:
    query, _, value = tensors()
    assert reason in _triton.refusal(query, value).reason


@needs_triton
def test_an_old_gpu_is_refused(monkeypatch) -> None:
    query, _, value = on_a_fake_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in _triton.refusal(query, value).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _triton.refusal(query, value) is None


def test_without_triton_the_refusal_says_so(monkeypatch) -> None:
    monkeypatch.setattr(_triton, "_not_installed", lambda: "Triton is not installed")
    query, _, value = on_a_fake_gpu()
    assert "not installed" in _triton.refusal(query, value).reason


@needs_triton
def test_explain_names_triton_on_a_gpu_and_why_it_refuses() -> None:
    assert regard.explain("knn_attention", *on_a_fake_gpu(), topk=3).backend == "triton"
    told = regard.explain("knn_attention", *on_a_fake_gpu(dim=512), topk=3)
    assert told.backend == "pytorch" and "head_dim 512 is above 256" in dict(told.refusals)["triton"]


@needs_triton
@pytest.mark.parametrize("operator", ["knn_attention", "knn_attention_backward"])
def test_kernels_are_registered_for_the_gpu(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"regard::{operator}", "CUDA")


@needs_triton
def test_a_refused_call_of_the_bare_operator_is_computed_by_pytorch(monkeypatch) -> None:
    """What is registered for CUDA tensors; here it is given CPU tensors, which it refuses."""
    registered = []
    monkeypatch.setattr(torch.library, "impl", lambda name, key, function: registered.append((name, key, function)))
    _triton.register("some_attention", "no.such.module", "forward", otherwise=lambda *args: len(args))
    ((name, key, launch),) = registered
    assert (name, key) == ("regard::some_attention", "CUDA")
    assert launch(*inputs(Shape()), 7) == 4
    monkeypatch.setattr(_triton, "refusal", lambda *tensors: None)
    with pytest.raises(ModuleNotFoundError, match="no"):
        launch(*inputs(Shape()), 7)


def test_configs_are_pruned_by_the_device(monkeypatch) -> None:
    configs = [Config.of(ROWS=128, num_warps=8), Config.of(ROWS=64), Config.of(ROWS=16)]
    chosen = []
    for room in (1 << 20, 100, 20):
        monkeypatch.setattr(_triton, "_shared_memory", lambda device, room=room: room)
        chosen.append(first_that_fits(configs, lambda config: config["ROWS"], torch.device("cuda")))
    assert chosen == configs
    with only_config(configs[2]):
        assert first_that_fits(configs[:2], lambda config: 0, torch.device("cuda")) == configs[2]
    assert chosen[0].options() == {"ROWS": 128, "num_warps": 8, "num_stages": 2}
    monkeypatch.setattr(_triton, "_shared_memory", lambda device: 15)
    with pytest.raises(RuntimeError, match="15 bytes .* needs 16"):
        first_that_fits(configs, lambda config: config["ROWS"], torch.device("cuda"))


@pytest.mark.parametrize(("dim", "tile"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (256, 256)])
def test_tiles_are_padded_to_what_a_product_takes(dim: int, tile: int) -> None:
    assert padded(dim) == tile


def test_the_kernels_are_loaded_when_they_run() -> None:
    check = "import sys, regard; regard.knn_attention; sys.exit('regard.ops.knn.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
