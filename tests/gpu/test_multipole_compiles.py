"""Multipole attention's Triton kernels compile for GPUs, and need no more shared memory than is reckoned with."""

import pytest
import torch
from attention_cases import Shape
from compiling import ARCHITECTURES, Found, compiling
from multipole_cases import even_sizes, random_call
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard.ops._triton import Config, only_config
from regard.ops.multipole import triton as kernels
from regard.ops.multipole import triton_clusters

SMALLEST_ROOM = 99 * 1024  # shared memory of a block on the smaller GPUs from compute capability 8.0 on
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SELECTING = ["_moments", "_select", "_unite", "_compact"]


def launch(
    dtype: torch.dtype, dim: int, config: Config, architecture: int, clusters: int = 30, far: str = "gaussian"
) -> tuple[list[Found], list[Found]]:
    """Everything that a training step launches, for the clusters and behind them. No GPU, so nothing is computed."""
    shape = Shape(1, 2, 1, 70, dim=dim, value_dim=dim)
    call = random_call(shape, even_sizes(max(90, clusters), clusters), 4, far=far, dtype=dtype)
    selecting = compiling(triton_clusters, architecture)
    with only_config(config), selecting as before, compiling(kernels, architecture) as found:
        kernels.backward(kernels.forward(*call.operands()), *call.operands())
    return before, found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_compiles(architecture: int) -> None:
    config = kernels.configs(64, 2)[0]
    before, found = launch(torch.bfloat16, 64, config, architecture)
    assert [one.name for one in before] == [*SELECTING, *SELECTING, "_compact"]
    assert [one.name for one in found] == ["_forward", "_backward_queries", "_backward_keys", "_backward_clusters"]
    assert max(one.shared for one in found) <= kernels.shared_memory(config, 64, 64, 2)
    assert max(one.shared for one in before) <= SMALLEST_ROOM


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_configuration_that_comes_first_compiles(dtype: torch.dtype, dim: int, architecture: int) -> None:
    config = kernels.configs(dim, dtype.itemsize)[0]
    limit = kernels.shared_memory(config, dim, dim, dtype.itemsize)
    for one in launch(dtype, dim, config, architecture)[1]:
        assert one.shared <= limit, f"{one.name}, {config}: {one.shared} bytes, reckoned {limit}"


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "far"), [(500, "centroid"), (1024, "centroid"), (512, "gaussian")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_clusters_compiles(dtype: torch.dtype, clusters: int, far: str) -> None:
    for one in launch(dtype, 64, kernels.configs(64, dtype.itemsize)[-1], 90, clusters, far)[0]:
        assert one.shared <= SMALLEST_ROOM, f"{one.name}: {one.shared} bytes of shared memory"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_some_configuration_fits_the_smaller_gpus(dtype: torch.dtype, dim: int) -> None:
    sizes = [kernels.shared_memory(config, dim, dim, dtype.itemsize) for config in kernels.configs(dim, dtype.itemsize)]
    assert min(sizes) <= SMALLEST_ROOM


@pytest.mark.parametrize(
    ("options", "says"), [({}, None), ({"tolerance": 0.1}, "tolerance"), ({"num_clusters": 3000}, "3000 clusters")]
)
def test_explain_names_triton_on_a_gpu_and_why_it_refuses(options: dict, says: str | None) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(1, 2, 4000, 16, device="cuda") for _ in range(3)]
    told = regard.explain("multipole_attention", *tensors, **{"num_clusters": 30, "near": 2, **options})
    assert told.backend == ("pytorch" if says else "triton")
    assert says is None or says in dict(told.refusals)["triton"]
