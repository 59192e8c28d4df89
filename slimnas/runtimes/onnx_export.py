"""ONNX files, written only once ONNX Runtime has computed what the module computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slimnas._files import atomic_write_bytes
from slimnas.errors import ExportError
from slimnas.runtimes.base import Array, only_tensor
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.onnxruntime_runtime import OnnxSession

TOLERANCE = 1e-3
"""Largest difference an exported file may have, as a share of the largest output."""
ROUNDING = 1e-6
"""Difference allowed whatever the outputs, so that outputs near zero pass."""


def export_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    reference: nn.Module | None = None,
    dynamic_batch: bool = False,
) -> float:
    """Write `module` to an ONNX file, once ONNX Runtime agrees with PyTorch on `example`.

    Args:
        module: what to export, folded if the file is to be deployed; it is not changed.
        example: an input; its shape is the file's, its values are what is compared.
        path: where to write; the file appears whole or not at all.
        reference: the module whose output, in evaluation mode, the file must give; by default
            `module`, but the unfolded network checks the folding too.
        dynamic_batch: let the file take any batch size.

    Returns:
        The largest absolute difference between the two outputs.

    Raises:
        ExportError: unknown operator, or a difference above `TOLERANCE` x largest |output|.
        RunFolderError: the place cannot be written.
    """
    data = onnx_bytes(module, example, dynamic_batch=dynamic_batch)
    image = torch.cat([example, example.flip(-1)]) if dynamic_batch else example
    difference = _difference(data, reference or module, image, path)
    atomic_write_bytes(Path(path), data)
    return difference


def _difference(data: bytes, reference: nn.Module, image: Tensor, path: str | Path) -> float:
    expected = _output(reference, image)
    got = OnnxSession(data, threads=1).run(image.numpy())
    if got.shape != expected.shape:
        raise ExportError(f"{path}: exported shape {got.shape}, PyTorch gives {expected.shape}")
    difference = float(np.abs(got - expected).max())
    allowed = TOLERANCE * float(np.abs(expected).max()) + ROUNDING
    if not difference <= allowed:
        raise ExportError(
            f"{path}: ONNX Runtime differs from PyTorch by {difference:.3g}, more than "
            f"{allowed:.3g}; nothing was written"
        )
    return difference


def _output(module: nn.Module, example: Tensor) -> Array:
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            expected: Array = only_tensor(module(example)).numpy()
            return expected
    finally:
        module.train(was_training)
