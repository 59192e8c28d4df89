"""PyTorch itself as a runtime: eager mode on the CPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from slimnas.runtimes.base import Array, Configured, only_tensor


@dataclass(frozen=True)
class TorchRuntime(Configured):
    """Eager PyTorch on the CPU.

    PyTorch's number of threads belongs to the process: a session sets it when it runs, and it
    stays so afterwards.
    """

    library: ClassVar[str] = "torch"
    version: ClassVar[str] = str(torch.__version__)

    def load(self, module: nn.Module, example: Tensor) -> TorchSession:
        """Copy `module` into evaluation mode; `example` is not needed."""
        return TorchSession(copy.deepcopy(module).eval(), self.threads)


class TorchSession:
    """A module in evaluation mode, run on a fixed number of threads."""

    def __init__(self, module: nn.Module, threads: int) -> None:
        self._module = module
        self._threads = threads

    def run(self, x: Array) -> Array:
        """Map one batch to the module's output."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            output: Array = only_tensor(self._module(torch.from_numpy(x))).numpy()
        return output
