"""k-NN attention's Triton kernels compile for GPUs, and need no more shared memory than is reckoned with."""

import pytest
import torch
from attention_cases import Shape, inputs
from compiling import ARCHITECTURES, compiling

from regard.ops._triton import only_config
from regard.ops.knn import triton as kernels
from regard.ops.knn.triton import configurations, shared_memory

SMALLEST_ROOM = 99 * 1024  # shared memory of a block on the smaller GPUs from compute capability 8.0 on
KERNELS = ["select_kernel", "attend_kernel", "rows_kernel", "keys_kernel"]


def launch(dtype, dim, config, mask=None, causal=False):
    """Everything that a training step launches. No GPU, so nothing is computed."""
    query, key, value = inputs(Shape(1, 2, 1, 70, 90, dim, dim), dtype=dtype)
    with only_config(config):
        state = kernels.forward(query, key, value, mask, 9, causal, 0.125)
        kernels.backward(query, query, key, value, mask, *state[1:], 9, causal, 0.125, mask is not None)


def check(found, dtype, dim, config, masked=False):
    limit = shared_memory(config, dtype, dim, masked=masked)
    for one in found:
        assert one.shared <= limit, f"{one.name}: {one.shared} bytes of shared memory, reckoned {limit}"


def test_a_training_step_compiles() -> None:
    config = configurations(torch.bfloat16, 64)[0]
    with compiling(kernels, 90) as found:
        launch(torch.bfloat16, 64, config)
    assert [one.name for one in found] == KERNELS
    check(found, torch.bfloat16, 64, config)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_configuration_compiles(dtype: torch.dtype, dim: int, architecture: int) -> None:
    for config in configurations(dtype, dim):
        with compiling(kernels, architecture) as found:
            launch(dtype, dim, config)
        check(found, dtype, dim, config)
        for one in found:
            spilled = one.spilled()
            assert spilled <= 1024, f"{one.name}, {config}: {spilled} bytes of a thread's registers spill"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 2, 70, 90), (1, 1, 1, 90), (1, 2, 70, 1), (1, 1, 1, 1)])
def test_masks_and_their_gradients_compile(size: tuple[int, ...]) -> None:
    config = configurations(torch.bfloat16, 64)[0]
    with compiling(kernels, 90) as found:
        launch(torch.bfloat16, 64, config, torch.zeros(size), causal=True)
    assert [one.name for one in found] == [*KERNELS, "mask_kernel"]
    check(found, torch.bfloat16, 64, config, masked=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_some_configuration_fits_the_smaller_gpus(dtype: torch.dtype, dim: int) -> None:
    assert min(shared_memory(config, dtype, dim) for config in configurations(dtype, dim)) <= SMALLEST_ROOM
