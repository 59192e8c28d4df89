"""ONNX models in 8-bit integers, for the runtimes that read them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from torch import Tensor, nn

from slimnas.runtimes.base import Array
from slimnas.runtimes.onnx_graph import onnx_bytes
from slimnas.runtimes.quiet import quiet

with quiet():
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

QUANTISED = ["Conv", "Gemm", "MatMul"]
"""Where the multiply-adds are. Quantised sums and norms lose accuracy, and crash OpenVINO."""


def int8_onnx_bytes(module: nn.Module, example: Tensor) -> bytes:
    """Serialise `module` as an ONNX model whose products are of 8-bit integers.

    Weights are signed, a scale per channel; maps are unsigned, with the range that they have in
    `example`. Enough to measure latency; for accuracy give real images as the example, and
    evaluate.

    Args:
        module: a module with one tensor in and one out; it is not changed.
        example: an input of the shape the model will take, and for the ranges.

    Raises:
        ExportError: the exporter does not know an operator.
    """
    model = onnx.load_from_string(onnx_bytes(module, example))
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            _Once(example.numpy()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTISED,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantised = onnx.load(path)
    _unround_logits(quantised.graph)
    serialised: bytes = quantised.SerializeToString()
    return serialised


def _unround_logits(graph: onnx.GraphProto) -> None:
    """Give every softmax what its product computes, not that rounded to 8 bits.

    From rounded logits to rounded weights ONNX Runtime takes an operator of its own
    (QLinearSoftmax), with up to ten times the error of the rounding itself.
    """
    maker = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        back = maker.get(softmax.input[0])
        there = maker.get(back.input[0]) if back is not None else None
        if back is None or there is None or there.op_type != "QuantizeLinear":
            continue
        softmax.input[0] = there.input[0]
        if readers[back.output[0]] == readers[there.output[0]] == 1:
            graph.node.remove(back)
            graph.node.remove(there)


class _Once(CalibrationDataReader):  # type: ignore[misc]  # comes without types
    """One batch to take the ranges from."""

    def __init__(self, x: Array) -> None:
        self._batches: Iterator[dict[str, Array]] = iter([{"image": x}])

    def get_next(self) -> dict[str, Array] | None:
        """Return the next batch by input name."""
        return next(self._batches, None)
