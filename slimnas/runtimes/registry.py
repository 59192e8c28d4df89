"""Runtimes and file formats by name."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from torch import Tensor, nn

from slimnas.errors import ExportError, RuntimeUnavailableError, suggest
from slimnas.runtimes.base import Runtime

RUNTIMES = {
    "executorch": ("slimnas.runtimes.executorch_runtime", "ExecuTorchRuntime"),
    "onnxruntime": ("slimnas.runtimes.onnxruntime_runtime", "OnnxRuntime"),
    "openvino": ("slimnas.runtimes.openvino_runtime", "OpenVinoRuntime"),
    "torch": ("slimnas.runtimes.torch_runtime", "TorchRuntime"),
}
"""Module and class of every runtime, imported only when it is asked for."""

EXPORTERS = {
    "onnx": ("slimnas.runtimes.onnx_export", "export_onnx"),
    "openvino": ("slimnas.runtimes.openvino_export", "export_openvino"),
    "executorch": ("slimnas.runtimes.executorch_export", "export_executorch"),
}
"""Module and function of every file format, imported only when it is asked for."""

EXTRAS = ("executorch", "openvino")
"""What slimnas installs only when asked: pip install 'slimnas[NAME]'."""


class Exporter(Protocol):
    """Writes a module to a file; see `slimnas.runtimes.onnx_export.export_onnx`."""

    def __call__(
        self,
        module: nn.Module,
        example: Tensor,
        path: Any,
        *,
        reference: nn.Module | None = None,
        dynamic_batch: bool = False,
    ) -> float:
        """Return the largest absolute difference between the file's output and PyTorch's."""
        ...


def get_runtime(name: str, *, threads: int = 1) -> Runtime:
    """Return the runtime called `name`, which will run on `threads` threads.

    Raises:
        RuntimeUnavailableError: no such runtime, its library is not installed, or no threads.
    """
    if name not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {name!r}{suggest(name, RUNTIMES)}; known: {', '.join(RUNTIMES)}"
        )
    if threads < 1:
        raise RuntimeUnavailableError(f"threads must be at least 1, got {threads}")
    runtime: Runtime = _imported(name, *RUNTIMES[name])(threads=threads)
    return runtime


def get_exporter(file_format: str) -> Exporter:
    """Return the function that writes files of `file_format`.

    Raises:
        ExportError: no such format.
        RuntimeUnavailableError: the library that writes and checks it is not installed.
    """
    if file_format not in EXPORTERS:
        raise ExportError(
            f"unknown export format {file_format!r}{suggest(file_format, EXPORTERS)}; "
            f"known: {', '.join(EXPORTERS)}"
        )
    return cast("Exporter", _imported(file_format, *EXPORTERS[file_format]))


def _imported(name: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        package = f"'slimnas[{name}]'" if name in EXTRAS else name
        raise RuntimeUnavailableError(
            f"{name!r} is not installed ({error}); pip install {package}"
        ) from error
