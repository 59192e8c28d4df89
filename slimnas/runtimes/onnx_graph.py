"""ONNX models from modules."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor, nn

from slimnas.errors import ExportError

OPSET = 18


def onnx_bytes(module: nn.Module, example: Tensor, *, dynamic_batch: bool = False) -> bytes:
    """Serialise `module` in evaluation mode as an ONNX model with input `image`, output `logits`.

    Uses PyTorch's TorchScript exporter: the newer one gives the same graph for these modules and
    takes 5-10 times as long, which a latency table of hundreds of blocks feels.

    Args:
        module: a module with one tensor in and one out; it is not changed.
        example: an input of the shape the model will take.
        dynamic_batch: let the file take any batch size.

    Raises:
        ExportError: the exporter does not know an operator.
    """
    buffer = io.BytesIO()
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}} if dynamic_batch else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # The exporter reverses the sizes of a padding by a slice that it cannot fold itself.
            warnings.filterwarnings("ignore", "Constant folding", UserWarning)
            torch.onnx.export(
                module,
                (example,),
                buffer,  # type: ignore[arg-type]  # a file object is taken by this exporter
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"ONNX export failed: {str(error).splitlines()[0]}") from error
    return buffer.getvalue()
