"""ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
)
from torch import Tensor, nn

from slimnas.errors import ExportError
from slimnas.runtimes.base import Array, Configured
from slimnas.runtimes.onnx_graph import onnx_bytes

_ONLY_ERRORS = 3
_REFUSALS = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented)


@dataclass(frozen=True)
class OnnxRuntime(Configured):
    """ONNX Runtime's CPU provider with all graph optimisations, on exactly `threads` threads.

    No fp16 and bf16: the provider lacks kernels for most operators and computes those in fp32.
    """

    library: ClassVar[str] = "onnxruntime"
    version: ClassVar[str] = str(onnxruntime.__version__)
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    suffix: ClassVar[str] = ".onnx"

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Serialise `module` as an ONNX model; int8 takes the ranges of its maps from `example`.

        Raises:
            ExportError: an operator ONNX has no form for.
        """
        return onnx_model(module, example, self.dtype)

    def open(self, model: bytes) -> OnnxSession:
        """Open an ONNX model.

        Raises:
            ExportError: ONNX Runtime cannot load it.
        """
        return OnnxSession(model, threads=self.threads)

    def load(self, module: nn.Module, example: Tensor) -> OnnxSession:
        """Export `module` and open it for inputs of the shape of `example`.

        Raises:
            ExportError: an operator ONNX has no form for.
        """
        return self.open(self.export(module, example))


def onnx_model(module: nn.Module, example: Tensor, dtype: str) -> bytes:
    """Serialise `module` as an ONNX model, of 8-bit integers if `dtype` is int8.

    Raises:
        ExportError: an operator ONNX has no form for.
    """
    if dtype != "int8":
        return onnx_bytes(module, example)
    from slimnas.runtimes.onnx_int8 import int8_onnx_bytes  # imports seconds of libraries

    return int8_onnx_bytes(module, example)


@dataclass(frozen=True)
class OnnxTensor:
    """What an ONNX model says of an input or output.

    Attributes:
        dtype: its number format as ONNX Runtime writes it: `tensor(float)`.
        shape: its sizes; None where the file leaves one open.
    """

    dtype: str
    shape: tuple[int | None, ...]


class OnnxSession:
    """An ONNX model opened on a fixed number of threads.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """

    def __init__(self, model: bytes | str, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ONLY_ERRORS
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except _REFUSALS as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"ONNX Runtime cannot load the model: {reason}") from error
        self._input = self._session.get_inputs()[0].name

    @property
    def takes(self) -> OnnxTensor:
        """The model's first input."""
        return _described(self._session.get_inputs()[0])

    @property
    def gives(self) -> OnnxTensor:
        """The model's first output."""
        return _described(self._session.get_outputs()[0])

    def run(self, x: Array) -> Array:
        """Map one batch to the model's first output."""
        output: Array = self._session.run(None, {self._input: x})[0]
        return output


def _described(argument: onnxruntime.NodeArg) -> OnnxTensor:
    shape = tuple(size if isinstance(size, int) else None for size in argument.shape)
    return OnnxTensor(argument.type, shape)
