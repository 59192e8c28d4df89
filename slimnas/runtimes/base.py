"""What every inference runtime looks like from outside."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float32]


class Session(Protocol):
    """A module made ready to run."""

    def run(self, x: Array) -> Array:
        """Map one batch, of the shape it was loaded for, to the module's output."""
        ...


class Runtime(Protocol):
    """One way to run a module on one compute unit.

    Attributes:
        name: `torch`, `onnxruntime`, ...
        version: the library's version.
        compute_unit: where it runs, such as `cpu`.
        threads: how many threads run one call.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above

    @property
    def version(self) -> str: ...  # noqa: D102

    @property
    def compute_unit(self) -> str: ...  # noqa: D102

    @property
    def threads(self) -> int: ...  # noqa: D102

    def load(self, module: nn.Module, example: Tensor) -> Session:
        """Make `module` ready for inputs of the shape of `example`.

        The module runs as in evaluation mode and is not changed; `slimnas.nn.fold.fold` it
        first to run it as it is deployed.
        """
        ...


def only_tensor(output: Any) -> Tensor:
    """The output of a module that must give one tensor in evaluation mode.

    Raises:
        TypeError: it gave something else.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"a runtime runs modules with one output, got {type(output).__name__}")
    return output
