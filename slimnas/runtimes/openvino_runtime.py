"""OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import openvino
from torch import Tensor, nn

from slimnas.errors import ExportError
from slimnas.runtimes.base import Array, Configured
from slimnas.runtimes.onnx_graph import onnx_bytes


@dataclass(frozen=True)
class OpenVinoRuntime(Configured):
    """OpenVINO's CPU plugin on exactly `threads` threads.

    Its files are ONNX models, so that there is one export path and one archive per network;
    compiled, they are what OpenVINO's own pair of files becomes.
    """

    core: Any = field(default_factory=openvino.Core, repr=False, compare=False)

    library: ClassVar[str] = "openvino"
    version: ClassVar[str] = str(openvino.__version__).split("-", maxsplit=1)[0]
    suffix: ClassVar[str] = ".onnx"

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Serialise `module` as an ONNX model.

        Raises:
            ExportError: an operator ONNX has no form for.
        """
        return onnx_bytes(module, example)

    def open(self, model: bytes) -> OpenVinoSession:
        """Compile an ONNX model.

        Raises:
            ExportError: OpenVINO cannot convert it.
        """
        return OpenVinoSession(self.core, self.converted(model), threads=self.threads)

    def load(self, module: nn.Module, example: Tensor) -> OpenVinoSession:
        """Convert `module` and compile it for inputs of the shape of `example`.

        Raises:
            ExportError: an operator ONNX or OpenVINO has no form for.
        """
        return self.open(self.export(module, example))

    def converted(self, onnx_model: bytes) -> Any:
        """Return OpenVINO's form of a serialised ONNX model.

        Raises:
            ExportError: OpenVINO does not know an operator.
        """
        try:
            return self.core.read_model(onnx_model)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ExportError(f"OpenVINO cannot convert the network: {reason}") from error


class OpenVinoSession:
    """A model compiled for a fixed number of threads.

    Args:
        core: OpenVINO's entry point.
        model: a converted model or the path of an .xml file.
        threads: threads per call.
    """

    def __init__(self, core: Any, model: Any, *, threads: int) -> None:
        # One stream: a call gets all threads. f32: processors with bf16 units would use those.
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, x: Array) -> Array:
        """Map one batch to the model's first output."""
        output: Array = self._request.infer({0: x}, share_inputs=True)[0]
        return output
