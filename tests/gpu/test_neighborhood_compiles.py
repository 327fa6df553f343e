"""Neighborhood attention's Triton kernels compile for GPUs, and need no more shared memory than is reckoned with."""

import pytest
import torch
from attention_cases import HALVES, Shape
from compiling import ARCHITECTURES, compiling
from neighborhood_cases import output_gradient, pattern_of, random_call

from regard.ops._triton import Config, only_config
from regard.ops.neighborhood import triton as kernels
from regard.ops.neighborhood.triton import configurations, shared_memory

SMALLEST_ROOM = 99 * 1024  # shared memory of a block on the smaller GPUs from compute capability 8.0 on
# Each but the tables a second time, with care (see triton_rows).
KERNELS = [
    *("fill_tables", "attend_tiles", "attend_tiles"),
    *("fill_tables", "query_gradients", "query_gradients", "key_gradients", "key_gradients"),
]
DTYPES = (torch.float32, *HALVES)


def compiled(dtype: torch.dtype, dim: int, config: Config, architecture: int, full: bool = True, rank: int = 2):
    """What a training step launches; `full` with bias, mask and prefix tokens. No GPU, so nothing is computed."""
    shape = Shape(batch=1, heads=2, key_heads=1, dim=dim, value_dim=dim)
    pattern = pattern_of((12,) * rank, 5)
    call = random_call(pattern, shape, prefix=2 * full, bias=full, hidden=full, dtype=dtype)
    with compiling(kernels, architecture) as found, only_config(config):
        kernels.forward(*call.operands())
        kernels.backward(output_gradient(call), *call.operands(), full)
    assert [one.name for one in found] == [*KERNELS, *(["bias_gradients"] if full else [])]
    limit = shared_memory(config, dtype, dim)
    for one in found:
        assert one.shared <= limit, f"{one.name}: {one.shared} bytes of shared memory, reckoned {limit}"
    return found


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_a_training_step_compiles(architecture: int) -> None:
    compiled(torch.bfloat16, 64, configurations(torch.bfloat16, 64)[0], architecture, full=False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_configuration_that_comes_first_compiles(dtype: torch.dtype, dim: int, architecture: int) -> None:
    config = configurations(dtype, dim)[0]
    usual = {}
    for one in compiled(dtype, dim, config, architecture):
        usual.setdefault(one.name, one)
    for one in usual.values():
        spilled = one.spilled()
        assert spilled <= 1024, f"{one.name}, {config}: {spilled} bytes of a thread's registers spill"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("full", [False, True])
def test_every_rank_compiles(rank: int, full: bool) -> None:
    compiled(torch.bfloat16, 64, configurations(torch.bfloat16, 64)[0], 90, full, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_some_configuration_fits_the_smaller_gpus(dtype: torch.dtype, dim: int) -> None:
    assert min(shared_memory(config, dtype, dim) for config in configurations(dtype, dim)) <= SMALLEST_ROOM
