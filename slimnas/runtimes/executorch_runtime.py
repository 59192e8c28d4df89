"""ExecuTorch with XNNPACK on the CPU, the runtime phones use."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError

from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.runtimes.base import Array, Configured
from slimnas.runtimes.quiet import quiet

with quiet():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError as LoweringError
    from executorch.exir.error import InternalError
    from executorch.extension.pybindings import portable_lib


@dataclass(frozen=True)
class ExecuTorchRuntime(Configured):
    """ExecuTorch with the XNNPACK delegate on exactly `threads` threads.

    ExecuTorch's thread pool belongs to the process, so that sessions that are open at the same
    time run on the same number of threads.

    No fp16: XNNPACK's gives wrong numbers for whole networks on x86. No int8: lowering takes
    minutes per network, and ViTs come out far off.
    """

    library: ClassVar[str] = "executorch"
    version: ClassVar[str] = version("executorch")
    suffix: ClassVar[str] = ".pte"

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Lower `module` to an ExecuTorch program.

        Raises:
            ExportError: an operator ExecuTorch has no form for.
        """
        return executorch_bytes(module, example)

    def open(self, model: bytes) -> ExecuTorchSession:
        """Open an ExecuTorch program.

        Raises:
            ExportError: the program needs an operator that the installed ExecuTorch lacks.
            RuntimeUnavailableError: sessions on another number of threads are open.
        """
        return ExecuTorchSession(model, threads=self.threads)

    def load(self, module: nn.Module, example: Tensor) -> ExecuTorchSession:
        """Lower `module` and open it for inputs of the shape of `example`.

        Raises:
            ExportError: an operator ExecuTorch has no form for.
            RuntimeUnavailableError: sessions on another number of threads are open.
        """
        return self.open(self.export(module, example))


def executorch_bytes(module: nn.Module, example: Tensor) -> bytes:
    """Serialise `module` in evaluation mode as an ExecuTorch program, delegated to XNNPACK.

    Args:
        module: a module with one tensor in and one out; it is not changed.
        example: an input of the shape the program will take.

    Raises:
        ExportError: an operator ExecuTorch has no form for.
    """
    try:
        with quiet():
            exported = torch.export.export(copy.deepcopy(module).eval(), (example,))
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
    except (RuntimeError, SpecViolationError, LoweringError, InternalError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"ExecuTorch export failed: {reason}") from error


class ExecuTorchSession:
    """An ExecuTorch program opened on a fixed number of threads.

    Raises:
        ExportError: the program needs an operator that the installed ExecuTorch lacks.
        RuntimeUnavailableError: sessions on another number of threads are open.
    """

    def __init__(self, program: bytes, *, threads: int) -> None:
        _set_threads(threads)
        self._program = program  # the module reads its weights from here
        try:
            self._module = portable_lib._load_for_executorch_from_buffer(program)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"ExecuTorch cannot load the program: {reason}") from error
        _open_sessions.add(self)

    def run(self, x: Array) -> Array:
        """Map one batch to the program's first output."""
        output: Array = self._module.forward((torch.from_numpy(x),))[0].numpy()
        return output


_open_sessions: WeakSet[ExecuTorchSession] = WeakSet()
"""As the thread pool is the process's, so is the knowledge of who uses it."""


def _set_threads(threads: int) -> None:
    """Give the process's pool `threads` threads; the old pool must have no users left."""
    now = portable_lib._threadpool_get_thread_count()
    if now == threads:
        return
    if _open_sessions:
        raise RuntimeUnavailableError(
            f"executorch has one thread pool per process and {len(_open_sessions)} session(s) run "
            f"on {now} thread(s) of it; drop them before loading one for {threads}"
        )
    portable_lib._unsafe_reset_threadpool(threads)
    now = portable_lib._threadpool_get_thread_count()
    if now != threads:
        raise RuntimeUnavailableError(
            f"executorch runs on {now} thread(s) here and cannot be set to {threads}"
        )
