"""OpenVINO files, written only once OpenVINO has computed what the module computes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import openvino
import torch
from torch import Tensor, nn

from slimnas._files import atomic_path
from slimnas.errors import ExportError
from slimnas.runtimes.agreement import checked_difference, checked_dtype
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.openvino_runtime import OpenVinoRuntime, OpenVinoSession


def export_openvino(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    reference: nn.Module | None = None,
    dynamic_batch: bool = False,
    dtype: str | None = None,
) -> float:
    """Write `module` as OpenVINO's pair of files, PATH.xml and PATH.bin, in single precision.

    What is compared with PyTorch is the pair as serialised. Arguments and result as in
    `onnx_export.export_onnx`.

    Raises:
        ExportError: unknown operator, another dtype, a difference above the tolerance, or `path` is
            no .xml file.
        RunFolderError: the place cannot be written; neither file is.
    """
    path = Path(path)
    checked_dtype(path, dtype, ("fp32",))
    if path.suffix != ".xml":
        raise ExportError(
            f"{path}: an OpenVINO file must end in .xml (the weights go into a .bin file beside it)"
        )
    runtime = OpenVinoRuntime()
    model = runtime.converted(onnx_bytes(module, example, dynamic_batch=dynamic_batch))
    image = torch.cat([example, example.flip(-1)]) if dynamic_batch else example
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "network.xml"
        openvino.save_model(model, pair, compress_to_fp16=False)
        session = OpenVinoSession(runtime.core, str(pair), threads=1)
        difference = checked_difference(
            session, reference or module, image, path=path, runtime="OpenVINO"
        )
        _write_pair(path, pair)
    return difference


def _write_pair(path: Path, pair: Path) -> None:
    """Copy both files; neither is renamed into place before both are on the disk."""
    weights = path.with_suffix(".bin")
    for place in (path, weights):
        if place.is_dir():  # the one way in which the second rename would fail after the first
            raise ExportError(f"{place}: is a folder; choose another place with --output")
    with atomic_path(path) as graph_file, atomic_path(weights) as weights_file:
        graph_file.write_bytes(pair.read_bytes())
        weights_file.write_bytes(pair.with_suffix(".bin").read_bytes())
