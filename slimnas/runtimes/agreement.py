"""The test every exported file passes before it is written: its runtime gives PyTorch's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slimnas.errors import ExportError
from slimnas.runtimes.base import Array, Session, only_tensor

TOLERANCES = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest difference an exported file may have, as a share of the largest output, by dtype."""
ROUNDING = 1e-6
"""Difference allowed whatever the outputs, so that outputs near zero pass."""


def checked_difference(
    session: Session,
    reference: nn.Module,
    image: Tensor,
    *,
    path: str | Path,
    runtime: str,
    dtype: str = "fp32",
) -> float:
    """Return the largest absolute difference between what a file and PyTorch compute.

    Args:
        session: the file, opened in the runtime it is for.
        reference: the module whose output, in evaluation mode, it must give.
        image: what both compute on.
        path: where the file will be, for the message.
        runtime: the runtime as people write it, for the message.
        dtype: the file's arithmetic.

    Raises:
        ExportError: another shape, or a difference above `TOLERANCES` x largest |output|.
    """
    expected = output_of(reference, image)
    got = session.run(image.numpy())
    if got.shape != expected.shape:
        raise ExportError(f"{path}: exported shape {got.shape}, PyTorch gives {expected.shape}")
    difference = float(np.abs(got - expected).max())
    allowed = TOLERANCES[dtype] * float(np.abs(expected).max()) + ROUNDING
    if not difference <= allowed:
        raise ExportError(
            f"{path}: {runtime} differs from PyTorch by {difference:.3g}, more than "
            f"{allowed:.3g}; nothing was written"
        )
    return difference


def output_of(module: nn.Module, example: Tensor) -> Array:
    """Return what a module computes in evaluation mode; it is not changed."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            expected: Array = only_tensor(module(example)).numpy()
            return expected
    finally:
        module.train(was_training)


def checked_dtype(path: str | Path, asked: str | None, has: tuple[str, ...]) -> str:
    """Return the number format of a file, by default the first that there is.

    Raises:
        ExportError: files of this format cannot be in that number format.
    """
    if asked is not None and asked not in has:
        raise ExportError(f"{path}: dtype must be {' or '.join(has)}, got {asked}")
    return asked or has[0]
