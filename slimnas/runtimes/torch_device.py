"""PyTorch on an accelerator: calls that have ended when they return, graphs, and their clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from slimnas.runtimes.base import Array, only_tensor

Module = Callable[[Tensor], Tensor]

_WARM_UP_CALLS = 3
"""Before a recording: libraries allocate and pick kernels in their first calls."""


class Taker(Protocol):
    """Brings a tensor to where a module runs; see `torch_runtime.Place`."""

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def take(self, x: Tensor) -> Tensor: ...  # noqa: D102


class AcceleratorSession:
    """A module on CUDA or MPS.

    Args:
        module: the module, in evaluation mode, its weights on the device.
        place: where its inputs lie.
        graph: how a call is recorded; run as it is if none.
    """

    def __init__(
        self,
        module: Module,
        place: Taker,
        *,
        graph: Callable[[Module, Tensor], Graph] | None = None,
    ) -> None:
        self._module = module
        self._place = place
        self._record = graph
        self._graph: Graph | None = None

    def run(self, x: Array) -> Array:
        """Map one batch to the module's output, both in the host's memory."""
        output: Array = self._call(self._place.take(torch.from_numpy(x)))().float().cpu().numpy()
        return output

    def bind(self, x: Array) -> Callable[[], None]:
        """Copy `x` to the device; the call runs the module there and waits until it has ended.

        With a graph there is one input: a later `bind` or `run` replaces it.
        """
        return partial(self._call_and_wait, self._call(self._place.take(torch.from_numpy(x))))

    def _call(self, x: Tensor) -> Callable[[], Tensor]:
        if self._record is None:
            return partial(self._forward, x)
        if self._graph is None:
            with exact_kernels():
                self._graph = self._record(self._module, x)
        else:
            self._graph.set_input(x)
        return self._graph.replay

    def _forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(), exact_kernels():
            return only_tensor(self._module(x))

    def _call_and_wait(self, call: Callable[[], Tensor]) -> None:
        call()
        if self._place.device.type == "cuda":
            torch.cuda.synchronize()
        else:
            torch.mps.synchronize()


class Graph:
    """A CUDA graph: one call of a module, recorded with its memory, replayed as one launch."""

    def __init__(self, module: Module, example: Tensor) -> None:
        self._input = example.clone()  # keeps the memory format
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP_CALLS):
                    module(self._input)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = only_tensor(module(self._input))

    def set_input(self, x: Tensor) -> None:
        """Copy `x` to where the recorded call reads."""
        self._input.copy_(x)

    def replay(self) -> Tensor:
        """Start the recorded call; the next one overwrites what this returns."""
        self._graph.replay()
        return self._output


class EventClock:
    """Seconds on a GPU's own timeline, by CUDA events on the current stream.

    Reading it waits for everything started before. Differences are summed up in double precision:
    a single one loses microseconds over minutes.
    """

    def __init__(self) -> None:
        self._last = self._now()
        self._seconds = 0.0

    def __call__(self) -> float:
        """Return the seconds since the clock was made."""
        now = self._now()
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
        return event


@contextlib.contextmanager
def exact_kernels() -> Iterator[None]:
    """Let cuDNN try its kernels and pick the fastest, none of which rounds fp32 to TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield
