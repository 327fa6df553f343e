"""Routed attention's Triton kernels compile for GPUs, and need no more shared memory than is reckoned with."""

import pytest
import torch
from attention_cases import Shape
from compiling import ARCHITECTURES, Found, compiling
from routed_cases import random_call
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard.ops._triton import Config, only_config, padded
from regard.ops.routed import triton as kernels

SMALLEST_ROOM = 99 * 1024  # shared memory of a block on the smaller GPUs from compute capability 8.0 on
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ["_forward", "_backward_queries", "_backward_keys", "_backward_extra"]


def launch(dtype: torch.dtype, dim: int, config: Config, architecture: int, **options) -> list[Found]:
    """Everything that a training step launches. No GPU, so nothing is computed."""
    call = random_call(Shape(1, 2, 1, 70, 90, dim, dim), 49, 20, 4, dtype=dtype, **options)
    with only_config(config), compiling(kernels, architecture) as found:
        kernels.backward(kernels.forward(*call.operands()), *call.operands())
    return found


def configs(dtype: torch.dtype, dim: int) -> list[Config]:
    """The first by queries and by keys."""
    return [kernels.configs(256, padded(dim), dtype.itemsize, by_keys=by_keys)[0] for by_keys in (False, True)]


def needed(config: Config, dtype: torch.dtype, dim: int) -> int:
    return max(
        kernels.shared_memory(config, 2 * padded(dim), dtype.itemsize, by_keys=by_keys) for by_keys in (False, True)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_compiles(architecture: int) -> None:
    config = kernels.configs(256, 64, 2)[0]
    found = launch(torch.bfloat16, 64, config, architecture, extra=3, bias="head", hidden=True)
    assert [one.name for one in found] == KERNELS
    assert max(one.shared for one in found) <= needed(config, torch.bfloat16, 64)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_configurations_that_come_first_compile(dtype: torch.dtype, dim: int, architecture: int) -> None:
    for config in configs(dtype, dim):
        for one in launch(dtype, dim, config, architecture, extra=3, bias="query"):
            limit = needed(config, dtype, dim)
            assert one.shared <= limit, f"{one.name}, {config}: {one.shared} bytes, reckoned {limit}"


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_some_configuration_fits_the_smaller_gpus(dtype: torch.dtype, dim: int, by_keys: bool) -> None:
    sizes = [
        kernels.shared_memory(config, 2 * dim, dtype.itemsize, by_keys=by_keys)
        for config in kernels.configs(256, dim, dtype.itemsize, by_keys=by_keys)
    ]
    assert min(sizes) <= SMALLEST_ROOM


@pytest.mark.parametrize(("dim", "says"), [(64, None), (300, "head_dim 300")])
def test_explain_names_triton_on_a_gpu_and_why_it_refuses(dim: int, says: str | None) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(1, 2, 40, dim, device="cuda") for _ in range(3)]
        blocks = torch.empty(2, 3, device="cuda", dtype=torch.int64)
    told = regard.explain("routed_attention", *tensors, blocks=blocks, query_block=20, key_block=8)
    assert told.backend == ("pytorch" if says else "triton")
    assert says is None or says in dict(told.refusals)["triton"]
