"""ONNX files, written only once ONNX Runtime has computed what the module computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from slimnas._files import atomic_write_bytes
from slimnas.runtimes.agreement import checked_difference, checked_dtype
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.onnxruntime_runtime import OnnxSession


def export_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    reference: nn.Module | None = None,
    dynamic_batch: bool = False,
    dtype: str | None = None,
) -> float:
    """Write `module` to an ONNX file, once ONNX Runtime agrees with PyTorch on `example`.

    Args:
        module: what to export, folded if the file is to be deployed; it is not changed.
        example: an input; its shape is the file's, its values are what is compared.
        path: where to write; the file appears whole or not at all.
        reference: the module whose output, in evaluation mode, the file must give; by default
            `module`, but the unfolded network checks the folding too.
        dynamic_batch: let the file take any batch size.
        dtype: number format, one that files of this format can be in; fp32 here.

    Returns:
        The largest absolute difference between the two outputs.

    Raises:
        ExportError: unknown operator, another dtype, or a difference above the tolerance.
        RunFolderError: the place cannot be written.
    """
    checked_dtype(path, dtype, ("fp32",))
    data = onnx_bytes(module, example, dynamic_batch=dynamic_batch)
    image = torch.cat([example, example.flip(-1)]) if dynamic_batch else example
    session = OnnxSession(data, threads=1)
    difference = checked_difference(
        session, reference or module, image, path=path, runtime="ONNX Runtime"
    )
    atomic_write_bytes(Path(path), data)
    return difference
