"""Timing on a GPU, with a stand-in for the device: what is run in which order, and what the clock tells."""

from types import SimpleNamespace

import pytest
import torch

from regard.benchmark import interleave
from regard.benchmark.on_gpu import OnGPU, input_sets


class FakeDevice:
    """torch.cuda as far as OnGPU needs it: time goes by only when work runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturable: bool = True) -> None:
        self.now = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = device.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.time - self.time)

        class Graph:
            def replay(self) -> None:
                device.work(self.index, replayed=True)

        class Capture:
            def __init__(self, graph: Graph) -> None:
                graph.index = len(device.graphs)
                device.graphs.append(graph)

            def __enter__(self) -> None:
                if not capturable:
                    raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *unused: object) -> None:
                pass

        self.graphs: list[Graph] = []
        self.worked: list[tuple[int, bool]] = []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: torch.no_grad(),
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def work(self, which: int, replayed: bool = False) -> None:
        self.worked.append((which, replayed))
        self.now += 0.25


@pytest.mark.parametrize("capturable", [True, False])
def test_calls_take_turns_and_tell_the_devices_seconds(monkeypatch, capturable: bool) -> None:
    device = FakeDevice(monkeypatch, capturable)
    call = OnGPU([lambda: device.work(0), lambda: device.work(1), lambda: device.work(2)])
    assert call.captured is capturable
    device.worked.clear()
    assert [call.clock() for _ in range(4)] == [0.25] * 4
    assert device.worked == [(turn % 3, capturable) for turn in range(4)]


def test_interleave_asks_it_for_its_seconds(monkeypatch) -> None:
    device = FakeDevice(monkeypatch)
    times = interleave({"one": OnGPU([lambda: device.work(0)])}, budget_seconds=1.0, max_rounds=5)
    assert times["one"].samples == (0.25,) * 5


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="calls"):
        OnGPU([])


@pytest.mark.parametrize(("elements", "count"), [(100, 8), (30_000, 3), (10**6, 2)])
def test_inputs_rotate_through_more_than_the_cache(monkeypatch, elements: int, count: int) -> None:
    cache = 180_000  # bytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    sets = input_sets({"query": torch.ones(elements), "blocks": 7})
    assert len(sets) == count
    assert len({one["query"].data_ptr() for one in sets}) == count
    assert all(torch.equal(one["query"], torch.ones(elements)) and one["blocks"] == 7 for one in sets)
