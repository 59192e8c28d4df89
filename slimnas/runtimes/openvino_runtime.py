"""OpenVINO on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import openvino
from torch import Tensor, nn

from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.runtimes.base import Array, Configured
from slimnas.runtimes.onnxruntime_runtime import onnx_model

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@dataclass(frozen=True)
class OpenVinoRuntime(Configured):
    """OpenVINO's CPU plugin on exactly `threads` threads.

    Its files are ONNX models, so that there is one export path and one archive per network;
    compiled, they are what OpenVINO's own pair of files becomes. bf16 and fp16 are for processors
    with arithmetic of that kind; int8 is ONNX Runtime's quantisation.
    """

    core: Any = field(default_factory=openvino.Core, repr=False, compare=False)

    library: ClassVar[str] = "openvino"
    version: ClassVar[str] = str(openvino.__version__).split("-", maxsplit=1)[0]
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8")
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self) -> None:
        super().__post_init__()
        here = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.dtype.upper() not in here:
            has = [dtype for dtype in self.dtypes if dtype.upper() in here]
            raise RuntimeUnavailableError(
                f"this processor has no {self.dtype} arithmetic for OpenVINO; it has: "
                f"{', '.join(has)}"
            )

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Serialise `module` as an ONNX model; int8 takes the ranges of its maps from `example`.

        Raises:
            ExportError: an operator ONNX has no form for.
        """
        return onnx_model(module, example, self.dtype)

    def open(self, model: bytes) -> OpenVinoSession:
        """Compile an ONNX model.

        Raises:
            ExportError: OpenVINO cannot convert it.
        """
        return OpenVinoSession(
            self.core,
            self.converted(model),
            threads=self.threads,
            precision=PRECISIONS.get(self.dtype, "f32"),
        )

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
        precision: of what is not integer; left to itself OpenVINO takes bf16 where there is any.
    """

    def __init__(self, core: Any, model: Any, *, threads: int, precision: str = "f32") -> None:
        # One stream: a call gets all threads.
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, x: Array) -> Array:
        """Map one batch to the model's first output."""
        output: Array = self._request.infer({0: x}, share_inputs=True)[0]
        return output
