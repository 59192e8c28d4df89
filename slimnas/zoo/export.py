"""Deployment files from networks."""

from __future__ import annotations

from pathlib import Path

import torch

from slimnas.nn.build import Network
from slimnas.nn.fold import fold
from slimnas.runtimes.registry import get_exporter

FILE_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte", "coreml": ".mlpackage"}
"""How the files of each format end."""


def export_network(
    network: Network,
    path: str | Path,
    *,
    format: str = "onnx",
    dynamic_batch: bool = False,
    dtype: str | None = None,
    seed: int = 0,
) -> float | None:
    """Fold `network` and write it for a runtime, which first has to give the network's logits.

    Args:
        network: the network; it is not changed.
        path: the file to write, whole or not at all; openvino's weights go beside it.
        format: "onnx" (checked in ONNX Runtime), "openvino", "executorch" (XNNPACK) or "coreml" (a
            folder; checked on macOS).
        dynamic_batch: let the file take any batch size instead of one image; onnx and openvino.
        dtype: number format: "fp16" (default) or "fp32" in coreml, "fp32" in the others.
        seed: seed of the random image the outputs are compared on.

    Returns:
        The largest absolute difference between the runtime's and PyTorch's logits; none for Core ML
        elsewhere than on macOS, where the package is written with its input and output checked.

    Raises:
        ExportError: the file would not compute what the network computes, or no such format.
        RuntimeUnavailableError: the runtime is not installed.
        RunFolderError: the place cannot be written.
    """
    export = get_exporter(format)
    shape = network.architecture.input.shape
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(1, shape.channels, shape.height, shape.width, generator=generator)
    return export(
        fold(network), image, path, reference=network, dynamic_batch=dynamic_batch, dtype=dtype
    )
