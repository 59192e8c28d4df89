"""Runtimes and file formats by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from slimnas.errors import ExportError, RuntimeUnavailableError, suggest
from slimnas.runtimes.base import Runtime

RUNTIMES = {
    "coreml": ("slimnas.runtimes.coreml_runtime", "CoreMlRuntime"),
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
    "coreml": ("slimnas.runtimes.coreml_export", "export_coreml"),
}
"""Module and function of every file format, imported only when it is asked for."""

EXTRAS = ("coreml", "executorch", "openvino")
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
        dtype: str | None = None,
    ) -> float | None:
        """Return the largest absolute difference between the file's output and PyTorch's.

        None if the file cannot be run on this machine.
        """
        ...


def get_runtime(
    name: str,
    *,
    threads: int = 1,
    dtype: str | None = None,
    unit: str | None = None,
    options: Sequence[str] = (),
) -> Runtime:
    """Return a runtime that runs on `threads` threads.

    Args:
        name: a key of `RUNTIMES`, or the name a table records, which has the options in brackets:
            `torch[compile,channels-last]`.
        threads: threads per call.
        dtype: number format, `fp32`, `bf16`, `fp16` or `int8`; the runtime's default if none
            (fp32; fp16 for Core ML).
        unit: compute unit: `cpu` everywhere; torch also `cuda` and `mps`; Core ML `cpu-and-ne`
            (its default), `all`, `cpu-and-gpu`. The runtime's default if none. What a table
            records, `cuda:NVIDIA H100`, asks for that very device.
        options: torch has `compile`, `channels-last` and `cuda-graph`.

    Raises:
        RuntimeUnavailableError: no such runtime, its library is not installed, no threads, or it
            lacks the dtype, the unit or an option; the message names what it has.
    """
    name, _, recorded = name.partition("[")
    if name not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {name!r}{suggest(name, RUNTIMES)}; known: {', '.join(RUNTIMES)}"
        )
    kind = None if unit is None else unit.partition(":")[0]
    wanted = [word for word in recorded.removesuffix("]").split(",") if word]
    given = {"dtype": dtype, "unit": kind}
    runtime: Runtime = _imported(name, *RUNTIMES[name])(
        threads=threads,
        options=(*wanted, *options),
        **{key: value for key, value in given.items() if value is not None},
    )
    if unit not in (None, kind, runtime.compute_unit):
        raise RuntimeUnavailableError(
            f"compute unit {unit!r} was asked for; this machine has {runtime.compute_unit!r}"
        )
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
