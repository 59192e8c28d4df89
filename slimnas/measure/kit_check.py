"""What is checked of a kit's file where it is made: that it opens, its input, what it computes."""

from __future__ import annotations

import importlib
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.measure.kit_manifest import InputInfo
from slimnas.runtimes.base import FileRuntime, Session


def checked_input(
    path: Path, file_format: str, runtime: FileRuntime, example: Tensor
) -> tuple[InputInfo, bool]:
    """Open a file of a kit as its runner will, and run it if it runs here.

    Args:
        path: the file, where it lies in the kit.
        file_format: onnx, coreml or executorch.
        runtime: what wrote it.
        example: the input it was written for.

    Returns:
        What the file says its input is, and whether it was run.

    Raises:
        ExportError: it does not open, takes another input, or gives numbers that are not finite.
    """
    info = _READERS[file_format](path)
    if info.shape != tuple(example.shape):
        raise ExportError(
            f"{path.name}: takes inputs of shape {info.shape}, made for {tuple(example.shape)}"
        )
    try:
        session = _session(path, file_format, runtime)
    except RuntimeUnavailableError:
        return info, False
    output = session.run(example.numpy())
    if not (np.isfinite(output).all() and np.abs(output).max() > np.finfo(np.float32).tiny):
        raise ExportError(f"{path.name}: must compute finite numbers, not all zero; it does not")
    return info, True


def _session(path: Path, file_format: str, runtime: FileRuntime) -> Session:
    if file_format != "onnx":
        return runtime.open(path.read_bytes())
    # by path: its weights lie beside it
    from slimnas.runtimes.onnxruntime_runtime import OnnxSession

    return OnnxSession(str(path), threads=runtime.threads)


def _onnx_input(path: Path) -> InputInfo:
    import onnx

    (given,) = onnx.load(str(path), load_external_data=False).graph.input
    tensor = given.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return InputInfo(shape=tuple(dim.dim_value for dim in tensor.shape.dim), dtype=str(dtype))


def _coreml_input(path: Path) -> InputInfo:
    ct: Any = importlib.import_module("coremltools")  # untyped, and an extra

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        (package,) = Path(folder).glob("*.mlpackage")
        spec = ct.models.utils.load_spec(str(package))
    (given,) = spec.description.input
    array = given.type.multiArrayType
    kinds = ct.proto.FeatureTypes_pb2.ArrayFeatureType
    names = {kinds.FLOAT32: "float32", kinds.FLOAT16: "float16"}
    return InputInfo(shape=tuple(array.shape), dtype=names.get(array.dataType, "unknown"))


def _executorch_input(path: Path) -> InputInfo:
    from executorch.extension.pybindings import portable_lib

    program = portable_lib._load_for_executorch_from_buffer(path.read_bytes())
    meta = program.method_meta("forward").input_tensor_meta(0)
    kinds = {6: "float32", 5: "float16", 15: "bfloat16"}  # ScalarType's numbers
    return InputInfo(shape=tuple(meta.sizes()), dtype=kinds.get(int(meta.dtype()), "unknown"))


_READERS: dict[str, Callable[[Path], InputInfo]] = {
    "onnx": _onnx_input,
    "coreml": _coreml_input,
    "executorch": _executorch_input,
}
