"""Deployment files from networks."""

from __future__ import annotations

from pathlib import Path

import torch

from slimnas.nn.build import Network
from slimnas.nn.fold import fold
from slimnas.runtimes.onnx_export import export_onnx


def export_network(
    network: Network, path: str | Path, *, dynamic_batch: bool = False, seed: int = 0
) -> float:
    """Fold `network` and write it as ONNX, checked in ONNX Runtime against the unfolded network.

    Args:
        network: the network; it is not changed.
        path: the file to write, whole or not at all.
        dynamic_batch: let the file take any batch size instead of one image.
        seed: seed of the random image the outputs are compared on.

    Returns:
        The largest absolute difference between ONNX Runtime's and PyTorch's logits.

    Raises:
        ExportError: the file would not compute what the network computes.
        RunFolderError: the place cannot be written.
    """
    shape = network.architecture.input.shape
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, shape.channels, shape.height, shape.width, generator=generator)
    return export_onnx(fold(network), image, path, reference=network, dynamic_batch=dynamic_batch)
