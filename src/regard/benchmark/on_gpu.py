"""Time on a GPU: replayed graphs between events, over inputs that rotate, so that no run finds its own in the cache.

What is made here tells its own seconds (`clock`), so `interleave` times it beside others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["OnGPU", "input_sets"]

_WARM_UP = 3
_MOST_SETS = 8
_CACHE = 64 * 2**20  # bytes, where the device does not tell


def input_sets(tensors: dict[str, Any], device: str = "cuda") -> list[dict[str, Any]]:
    """The tensors, and so many copies that all together are larger than twice the L2 cache; at least two sets."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _CACHE)
    size = sum(one.numel() * one.element_size() for one in tensors.values() if isinstance(one, Tensor))
    count = min(max(2, -(-2 * cache // max(size, 1))), _MOST_SETS)
    copies = [
        {name: one.clone() if isinstance(one, Tensor) else one for name, one in tensors.items()}
        for _ in range(count - 1)
    ]
    return [tensors, *copies]


class OnGPU:
    """Runs one call after the other, round and round, and tells the seconds that each took on the device.

    Every call is captured as a graph, so that the time is the kernels' and not Python's. One that cannot be captured
    (it waits for the device) is run as it is; `captured` tells.

    Args:
        calls: the same computation, each on its own inputs.

    Raises:
        ValueError: no calls.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        if not calls:
            raise ValueError("calls: nothing to time")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graphs: list[Any] = []
        self._calls: list[Callable[[], Any]] = list(calls)
        self.captured = self._capture()
        self._turn = 0

    def _capture(self) -> bool:
        try:
            for call in self._calls:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                self._graphs.append(graph)
        except RuntimeError:
            torch.cuda.synchronize()
            self._graphs.clear()
            return False
        self._calls = [graph.replay for graph in self._graphs]
        return True

    def clock(self) -> float:
        """Run the next call; the seconds that it took."""
        call = self._calls[self._turn % len(self._calls)]
        self._turn += 1
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def __call__(self) -> None:
        self.clock()
