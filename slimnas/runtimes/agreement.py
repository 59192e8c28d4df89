"""The test every exported file passes before it is written: its runtime gives PyTorch's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slimnas.errors import ExportError
from slimnas.runtimes.base import Array, Session, only_tensor

TOLERANCE = 1e-3
"""Largest difference an exported file may have, as a share of the largest output."""
ROUNDING = 1e-6
"""Difference allowed whatever the outputs, so that outputs near zero pass."""


def checked_difference(
    session: Session, reference: nn.Module, image: Tensor, *, path: str | Path, runtime: str
) -> float:
    """Return the largest absolute difference between what a file and PyTorch compute.

    Args:
        session: the file, opened in the runtime it is for.
        reference: the module whose output, in evaluation mode, it must give.
        image: what both compute on.
        path: where the file will be, for the message.
        runtime: the runtime as people write it, for the message.

    Raises:
        ExportError: another shape, or a difference above `TOLERANCE` x largest |output|.
    """
    expected = _output(reference, image)
    got = session.run(image.numpy())
    if got.shape != expected.shape:
        raise ExportError(f"{path}: exported shape {got.shape}, PyTorch gives {expected.shape}")
    difference = float(np.abs(got - expected).max())
    allowed = TOLERANCE * float(np.abs(expected).max()) + ROUNDING
    if not difference <= allowed:
        raise ExportError(
            f"{path}: {runtime} differs from PyTorch by {difference:.3g}, more than "
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
