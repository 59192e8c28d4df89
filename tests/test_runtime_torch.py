"""PyTorch as a runtime: options, layouts, compiled code, and accelerators by their fakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from runtime_cases import MIXED, image_of, logits, network_of
from torch import Tensor, nn

from slimnas.errors import RuntimeUnavailableError
from slimnas.nn.fold import fold
from slimnas.runtimes.base import bound
from slimnas.runtimes.registry import get_runtime
from slimnas.runtimes.torch_device import AcceleratorSession, EventClock, Graph
from slimnas.runtimes.torch_runtime import Place, TorchRuntime

BODY = {"input": {"resolution": [64, 96]}, **MIXED}


def test_the_name_holds_the_options() -> None:
    assert TorchRuntime().name == "torch"
    runtime = get_runtime("torch", options=("channels-last", "compile"))
    assert runtime.name == "torch[compile,channels-last]"
    assert get_runtime(runtime.name) == runtime
    assert get_runtime("torch", options=("compile", "compile")).name == "torch[compile]"
    assert get_runtime("torch[compile]", options=("channels-last",)) == runtime
    assert (runtime.compute_unit, runtime.dtype) == ("cpu", "fp32")


def test_maps_lie_channels_last() -> None:
    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            last = torch.channels_last
            kernel = self.conv.weight.is_contiguous(memory_format=last)
            return torch.tensor([x.is_contiguous(memory_format=last), kernel])

    x = torch.randn(1, 3, 8, 8)
    for options, expected in (((), [0, 0]), (("channels-last",), [1, 1])):
        got = get_runtime("torch", options=options).load(Layout(), x).run(x.numpy())
        assert got.tolist() == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_channels_last_gives_the_same_numbers(dtype: str) -> None:
    network = network_of(BODY)
    x = image_of(network, 2)
    session = get_runtime("torch", dtype=dtype, options=("channels-last",)).load(fold(network), x)
    expected = logits(network, x)
    difference = np.abs(session.run(x.numpy()) - expected).max()
    assert difference <= {"fp32": 2e-5, "bf16": 0.05}[dtype] * np.abs(expected).max()


class Small(nn.Module):
    """One kernel to compile."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).relu()


@pytest.mark.slow
def test_compiled_modules_do_not_share_their_code() -> None:
    """PyTorch gives up after eight graphs of one piece of code."""
    x = torch.randn(2, 5)
    runtime = get_runtime("torch", options=("compile",))
    sessions = [(i, runtime.load(Small(i), x[: 1 + i % 2])) for i in range(1, 11)]
    for i, session in sessions:
        part = x[: 1 + i % 2]
        np.testing.assert_allclose(session.run(part.numpy()), (i * part).relu(), rtol=1e-6)
    bound(sessions[0][1], x[:2].numpy())()


def test_what_cannot_be_compiled_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    with pytest.raises(RuntimeUnavailableError, match=r"^torch\.compile failed \([^\n]*compiler"):
        get_runtime("torch", options=("compile",)).load(Broken(), torch.ones(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_units_that_are_not_there() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"finds no cuda device here; use unit cpu"):
        get_runtime("torch", unit="cuda:NVIDIA H100")


def test_another_device_than_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    runtime = get_runtime("torch", unit="cuda:NVIDIA H100", dtype="fp16")
    assert (runtime.compute_unit, runtime.dtype) == ("cuda:NVIDIA H100", "fp16")
    assert get_runtime("torch", unit="cuda") == get_runtime("torch", unit=runtime.compute_unit)
    with pytest.raises(
        RuntimeUnavailableError, match=r"'cuda:RTX'.* machine has 'cuda:NVIDIA H100"
    ):
        get_runtime("torch", unit="cuda:RTX")


def test_a_graph_without_cuda() -> None:
    with pytest.raises(RuntimeUnavailableError, match="cuda-graph needs unit cuda, got cpu"):
        get_runtime("torch", options=("cuda-graph",))


class FakeCuda:
    """A GPU of the CPU: work is done at once, and noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.module: nn.Module | None = None
        self.now_ms = 1e7
        cuda = self

        class Stream:
            def wait_stream(self, _: Any) -> None:
                cuda.log.append("wait")

        class CUDAGraph:
            def replay(self) -> None:
                cuda.log.append("replay")

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now_ms

            def synchronize(self) -> None:
                cuda.log.append("synchronize event")

            def elapsed_time(self, end: Event) -> float:
                return float(np.float32(end.at) - np.float32(self.at))

        @contextlib.contextmanager
        def entered(_: Any) -> Iterator[None]:
            self.log.append("enter")
            yield

        for name, fake in {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": entered,
            "CUDAGraph": CUDAGraph,
            "graph": entered,
            "Event": Event,
            "synchronize": lambda: self.log.append("synchronize"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)


class OnGpu:
    """A place that says it is on a GPU."""

    device = torch.device("cuda")

    def take(self, x: Tensor) -> Tensor:
        return x.clone()


def test_a_call_on_an_accelerator_has_ended_when_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeCuda(monkeypatch)

    def module(x: Tensor) -> Tensor:
        gpu.log.append("module")
        assert not torch.backends.cudnn.allow_tf32
        return 2 * x

    session = AcceleratorSession(module, OnGpu())
    x = np.ones((1, 2), dtype=np.float32)
    np.testing.assert_array_equal(session.run(x), 2 * x)
    call = bound(session, x)
    gpu.log.clear()
    call()
    call()
    assert gpu.log == ["module", "synchronize"] * 2


def test_a_recorded_call_is_replayed_on_the_next_input(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCuda(monkeypatch)
    calls = []

    def module(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    session = AcceleratorSession(module, OnGpu(), graph=Graph)
    one, three = (np.full((1, 2), value, dtype=np.float32) for value in (1, 3))
    np.testing.assert_array_equal(session.run(one), 2 * one)
    assert len(calls) == 4  # three to warm up, one recorded
    gpu.log.clear()
    call = bound(session, three)
    call()
    assert gpu.log == ["replay", "synchronize"]
    assert len(calls) == 4
    assert len({x.data_ptr() for x in calls}) == 1
    np.testing.assert_array_equal(calls[0], three)  # where the recorded call reads


def test_the_clock_of_events_keeps_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCuda(monkeypatch)
    clock = EventClock()
    for _ in range(1000):
        gpu.now_ms += 4000.0
        clock()
    before = clock()
    gpu.now_ms += 1.0
    assert clock() - before == pytest.approx(1e-3, rel=1e-9)
    assert gpu.log.count("synchronize event") == 1003


def test_inputs_are_taken_once() -> None:
    place = Place(torch.device("cpu"), torch.float32)
    x = torch.randn(1, 3, 4, 4)
    assert place.take(x) is x
    last = Place(torch.device("cpu"), torch.bfloat16, torch.channels_last)
    assert last.take(x).is_contiguous(memory_format=torch.channels_last)
    assert last.take(x[0]).dtype == torch.bfloat16
