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
"""Largest difference an exported file may have, as a share of the largest output (at least 1)."""


def export_onnx(
    module: nn.Module, example: Tensor, path: str | Path, *, dynamic_batch: bool = False
) -> float:
    """Write `module` to an ONNX file, after ONNX Runtime agreed with PyTorch on random input.

    Args:
        module: what to export, folded if the file is to be deployed; it is not changed.
        example: an input; its shape is the file's, its values are what is compared.
        path: where to write; the file appears whole or not at all.
        dynamic_batch: let the file take any batch size.

    Returns:
        The largest absolute difference between the two outputs.

    Raises:
        ExportError: unknown operator, or a difference above `TOLERANCE` x max(1, |output|).
        RunFolderError: the place cannot be written.
    """
    data = onnx_bytes(module, example, dynamic_batch=dynamic_batch)
    difference = _difference(data, module, example, path)
    atomic_write_bytes(Path(path), data)
    return difference


def _difference(data: bytes, module: nn.Module, example: Tensor, path: str | Path) -> float:
    expected = _reference(module, example)
    got = OnnxSession(data, threads=1).run(example.numpy())
    if got.shape != expected.shape:
        raise ExportError(f"{path}: exported shape {got.shape}, PyTorch gives {expected.shape}")
    difference = float(np.abs(got - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise ExportError(
            f"{path}: ONNX Runtime differs from PyTorch by {difference:.3g}, more than "
            f"{allowed:.3g}; nothing was written"
        )
    return difference


def _reference(module: nn.Module, example: Tensor) -> Array:
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            expected: Array = only_tensor(module(example)).numpy()
            return expected
    finally:
        module.train(was_training)
