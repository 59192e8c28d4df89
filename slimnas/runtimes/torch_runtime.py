"""PyTorch itself as a runtime: eager or compiled, on the CPU or an accelerator."""

from __future__ import annotations

import copy
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimnas.errors import RuntimeUnavailableError
from slimnas.runtimes.base import Array, Configured, Session, only_tensor
from slimnas.runtimes.torch_device import (
    AcceleratorSession,
    EventClock,
    Graph,
    Module,
    exact_kernels,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TorchRuntime(Configured):
    """PyTorch, eager unless told otherwise.

    Options: `compile` is `torch.compile` with inductor, one graph per network, weights frozen;
    `channels-last` lays maps and kernels out so; `cuda-graph` records a call once and replays it,
    so that launches cost next to nothing.

    A number format is that of weights, maps and products; inputs and outputs are single precision
    outside. On CUDA, fp32 is true single precision (no TF32) and cuDNN picks its fastest kernels
    by trying them.

    PyTorch's number of threads belongs to the process: a session sets it when it runs, and it
    stays so afterwards. Compiled code keeps the number it was compiled for.
    """

    library: ClassVar[str] = "torch"
    version: ClassVar[str] = str(torch.__version__)
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    units: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    known_options: ClassVar[tuple[str, ...]] = ("compile", "channels-last", "cuda-graph")

    def __post_init__(self) -> None:
        super().__post_init__()
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(self.unit, True):
            raise RuntimeUnavailableError(
                f"torch {torch.__version__} finds no {self.unit} device here; use unit cpu, or "
                "install a torch built for it (https://pytorch.org/get-started/locally)"
            )
        if self.unit == "cpu" and self.dtype == "fp16":
            raise RuntimeUnavailableError(
                "torch has no fast fp16 on the CPU (10 times as slow as fp32); it has: fp32, bf16"
            )
        if "cuda-graph" in self.options and self.unit != "cuda":
            raise RuntimeUnavailableError(
                f"torch's option cuda-graph needs unit cuda, got {self.unit}"
            )

    @property
    def compute_unit(self) -> str:
        """`cpu`, `mps`, or `cuda:` and the name of the GPU."""
        return f"cuda:{torch.cuda.get_device_name()}" if self.unit == "cuda" else self.unit

    def clock(self) -> Callable[[], float]:
        """Return a clock in seconds: CUDA events on a GPU, else the wall clock."""
        return EventClock() if self.unit == "cuda" else time.perf_counter

    def load(self, module: nn.Module, example: Tensor) -> Session:
        """Copy `module` into evaluation mode, and compile it if asked to.

        Raises:
            RuntimeUnavailableError: it cannot be compiled here.
        """
        layout = torch.channels_last if "channels-last" in self.options else None
        own = copy.deepcopy(module).eval().to(self.unit, DTYPES[self.dtype])
        if layout is not None:
            own = own.to(memory_format=layout)  # type: ignore[call-overload]
        place = Place(torch.device(self.unit), DTYPES[self.dtype], layout)
        run: Module = own
        if "compile" in self.options:
            run = _compiled(own, place.take(example), self.threads)
        if self.unit == "cpu":
            return TorchSession(run, self.threads, place)
        graphs = Graph if "cuda-graph" in self.options else None
        return AcceleratorSession(run, place, graph=graphs)


@dataclass(frozen=True)
class Place:
    """Where and how a session's inputs lie.

    Attributes:
        device: the device.
        dtype: number format.
        layout: memory format of maps; as they come if none.
    """

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format | None = None

    def take(self, x: Tensor) -> Tensor:
        """Return `x` there; itself if it is there already."""
        x = x.to(self.device, self.dtype)
        if self.layout is not None and x.dim() == 4:
            x = x.contiguous(memory_format=self.layout)
        return x


class TorchSession:
    """A module in evaluation mode, run on a fixed number of the CPU's threads."""

    def __init__(self, module: Module, threads: int, place: Place) -> None:
        self._module = module
        self._threads = threads
        self._place = place

    def run(self, x: Array) -> Array:
        """Map one batch to the module's output."""
        output: Array = self._call(self._place.take(torch.from_numpy(x))).float().numpy()
        return output

    def bind(self, x: Array) -> Callable[[], Tensor]:
        """Bring `x` into the session's number format and layout; the call runs the module."""
        return partial(self._call, self._place.take(torch.from_numpy(x)))

    def _call(self, x: Tensor) -> Tensor:
        _set_threads(self._threads)
        with torch.inference_mode():
            return only_tensor(self._module(x))


def _set_threads(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _compiled(module: nn.Module, example: Tensor, threads: int) -> Module:
    """Compile `module` for inputs like `example`, into code for `threads` threads.

    Raises:
        RuntimeUnavailableError: no compiler, or not one graph.
    """
    _set_threads(threads)
    frozen: Any = {"freezing": True} if example.device.type == "cpu" else None
    compiled: Module = torch.compile(
        _with_own_code(module),
        dynamic=False,
        fullgraph=True,
        options=frozen,
    )
    try:
        with warnings.catch_warnings(), torch.inference_mode(), exact_kernels():
            warnings.simplefilter("ignore")  # about its own and others' deprecated functions
            compiled(example)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise RuntimeUnavailableError(
            f"torch.compile failed ({reason}); it needs a C++ compiler, on CUDA triton: install "
            "them, or leave out the option compile"
        ) from error
    return compiled


def _with_own_code(module: nn.Module) -> Module:
    """Return a function that calls `module` and shares its code object with no other.

    PyTorch looks compiled graphs up by code object, gives up after eight of one, and checks one
    after the other until then, which hundreds of networks of one class would pay for.
    """

    def run(x: Tensor) -> Tensor:
        output: Tensor = module(x)
        return output

    return types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
