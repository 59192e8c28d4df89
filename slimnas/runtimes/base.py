"""What every inference runtime looks like from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from slimnas.errors import RuntimeUnavailableError, suggest

Array = NDArray[np.float32]


class Session(Protocol):
    """A module made ready to run."""

    def run(self, x: Array) -> Array:
        """Map one batch, of the shape it was loaded for, to the module's output.

        Whatever the number format inside, both are single precision; the output is complete when
        this returns.
        """
        ...


@runtime_checkable
class BindableSession(Session, Protocol):
    """A session that can take an input beforehand: to its device, number format and layout."""

    def bind(self, x: Array) -> Callable[[], object]:
        """Take `x` once; the call runs the module on it and returns when it has ended."""
        ...


class Runtime(Protocol):
    """One way to run a module on one compute unit.

    Attributes:
        name: `torch`, `onnxruntime`, ...; with options as `torch[compile,channels-last]`.
        version: the library's version.
        compute_unit: where it runs: `cpu`, `cuda:NVIDIA H100`, ...
        threads: how many threads run one call.
        dtype: number format of weights and arithmetic: `fp32`, `bf16`, `fp16` or `int8`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above

    @property
    def version(self) -> str: ...  # noqa: D102

    @property
    def compute_unit(self) -> str: ...  # noqa: D102

    @property
    def threads(self) -> int: ...  # noqa: D102

    @property
    def dtype(self) -> str: ...  # noqa: D102

    def load(self, module: nn.Module, example: Tensor) -> Session:
        """Make `module` ready for inputs of the shape of `example`.

        The module runs as in evaluation mode and is not changed; `slimnas.nn.fold.fold` it
        first to run it as it is deployed.

        Raises:
            ExportError: the runtime has no form for an operator.
            RuntimeUnavailableError: it cannot run here.
        """
        ...


@runtime_checkable
class ClockedRuntime(Runtime, Protocol):
    """A runtime that knows a better clock than the system's for what it runs."""

    def clock(self) -> Callable[[], float]:
        """Return a new clock, in seconds."""
        ...


@runtime_checkable
class FileRuntime(Runtime, Protocol):
    """A runtime that runs files; `load(...)` is `open(export(...))`.

    Attributes:
        suffix: how its files end, such as `.onnx`. A format that is a folder is one zip archive of
            it here: `.mlpackage.zip`.
    """

    @property
    def suffix(self) -> str: ...  # noqa: D102

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Serialise `module`, as in evaluation mode, for inputs of the shape of `example`.

        Raises:
            ExportError: the runtime has no form for an operator.
        """
        ...

    def open(self, model: bytes) -> Session:
        """Make a serialised module ready to run.

        Raises:
            ExportError: the bytes are no model that this runtime can load.
            RuntimeUnavailableError: it cannot run here.
        """
        ...


@dataclass(frozen=True)
class Configured:
    """What a runtime is asked for, checked against what it has.

    Attributes:
        threads: threads per call.
        dtype: number format, one of `dtypes`.
        unit: kind of compute unit, one of `units`.
        options: some of `known_options`.
        library: the runtime's name without options.
        version: the library's version.
        dtypes: number formats it has.
        units: compute units it has.
        known_options: options it has.
    """

    threads: int = 1
    dtype: str = "fp32"
    unit: str = "cpu"
    options: tuple[str, ...] = ()

    library: ClassVar[str]
    version: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32",)
    units: ClassVar[tuple[str, ...]] = ("cpu",)
    known_options: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise RuntimeUnavailableError(f"threads must be at least 1, got {self.threads}")
        self._has("dtype", self.dtype, self.dtypes)
        self._has("compute unit", self.unit, self.units)
        for option in self.options:
            self._has("option", option, self.known_options)
        in_order = tuple(option for option in self.known_options if option in self.options)
        object.__setattr__(self, "options", in_order)

    def _has(self, what: str, asked: str, has: tuple[str, ...]) -> None:
        if asked not in has:
            raise RuntimeUnavailableError(
                f"{self.library} has no {what} {asked!r}{suggest(asked, has)}; "
                f"it has: {', '.join(has) or 'none'}"
            )

    @property
    def name(self) -> str:
        """The library's name, and the options that change what is run."""
        return f"{self.library}[{','.join(self.options)}]" if self.options else self.library

    @property
    def compute_unit(self) -> str:
        """Where it runs."""
        return self.unit


def bound(session: Session, x: Array) -> Callable[[], object]:
    """Return what to time: a call that runs `session` on `x`, taken to its device beforehand."""
    if isinstance(session, BindableSession):
        return session.bind(x)
    return partial(session.run, x)


def clock_of(runtime: Runtime) -> Callable[[], float]:
    """Return the clock to time `runtime` with, in seconds: its own, else the system's."""
    return runtime.clock() if isinstance(runtime, ClockedRuntime) else time.perf_counter


def only_tensor(output: Any) -> Tensor:
    """The output of a module that must give one tensor in evaluation mode.

    Raises:
        TypeError: it gave something else.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"a runtime runs modules with one output, got {type(output).__name__}")
    return output
