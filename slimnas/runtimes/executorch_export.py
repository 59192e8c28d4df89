"""ExecuTorch programs, written only once ExecuTorch has computed what the module computes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from slimnas._files import atomic_write_bytes
from slimnas.errors import ExportError
from slimnas.runtimes.agreement import checked_difference, checked_dtype
from slimnas.runtimes.executorch_runtime import ExecuTorchSession, executorch_bytes


def export_executorch(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    reference: nn.Module | None = None,
    dynamic_batch: bool = False,
    dtype: str | None = None,
) -> float:
    """Write `module` as an ExecuTorch program (.pte) for XNNPACK, in single precision.

    Arguments and result as in `onnx_export.export_onnx`, except that there is no dynamic batch:
    a program's memory is planned for one shape.

    Raises:
        ExportError: unknown operator, a difference above the tolerance, a dynamic batch, or another
            dtype.
        RunFolderError: the place cannot be written.
    """
    checked_dtype(path, dtype, ("fp32",))
    if dynamic_batch:
        raise ExportError(
            f"{path}: an ExecuTorch program is planned for one batch size; export it without "
            "--dynamic-batch, or as onnx or openvino"
        )
    program = executorch_bytes(module, example)
    difference = checked_difference(
        ExecuTorchSession(program, threads=1),
        reference or module,
        example,
        path=path,
        runtime="ExecuTorch",
    )
    atomic_write_bytes(Path(path), program)
    return difference
