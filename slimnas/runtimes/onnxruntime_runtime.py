"""ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime
from torch import Tensor, nn

from slimnas.runtimes.base import Array
from slimnas.runtimes.onnx_graph import onnx_bytes

_ONLY_ERRORS = 3


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime's CPU provider with all graph optimisations, on exactly `threads` threads."""

    threads: int = 1
    name: str = "onnxruntime"
    compute_unit: str = "cpu"
    version: str = str(onnxruntime.__version__)

    def load(self, module: nn.Module, example: Tensor) -> OnnxSession:
        """Export `module` and open it for inputs of the shape of `example`.

        Raises:
            ExportError: an operator ONNX has no form for.
        """
        return OnnxSession(onnx_bytes(module, example), threads=self.threads)


class OnnxSession:
    """An ONNX model opened on a fixed number of threads."""

    def __init__(self, model: bytes | str, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ONLY_ERRORS
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def run(self, x: Array) -> Array:
        """Map one batch to the model's first output."""
        output: Array = self._session.run(None, {self._input: x})[0]
        return output
