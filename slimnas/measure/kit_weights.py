"""One file of weights for all ONNX networks of a kit.

Latency does not depend on the values of weights, as long as they are ordinary numbers, so the
networks of a kit need not have different ones. Every large tensor of a network becomes a
reference into one file of random numbers. Inside a network no two tensors overlap, so that
copies in a chain have memory of their own, as blocks of a real network have. The file is then as
large as the largest network instead of as large as all together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from slimnas._files import atomic_write_bytes

WEIGHTS_FILE = "weights.bin"
ALIGNMENT = 4096
"""Tensors begin at multiples of this, the page of memory-mapped files."""
LEAST_BYTES = 1024
"""Smaller tensors, shapes and constants among them, stay in the network's file."""
FLOATS = {onnx.TensorProto.FLOAT: np.dtype(np.float32)}
SCALE = 0.02
"""Numbers are between a half and one and a half of this, of either sign: none is zero or
denormal, and what flows through a network neither grows beyond fp32 nor vanishes."""


class SharedWeights:
    """Collects how much the networks need, then writes that many random numbers."""

    def __init__(self) -> None:
        self.size = 0

    def share(self, model: bytes) -> bytes:
        """Return an ONNX model whose large weights lie in the shared file.

        Tensors of other number formats than fp32 stay where they are.
        """
        graph_of = onnx.load_from_string(model)
        offset = 0
        for tensor in graph_of.graph.initializer:
            if tensor.data_type not in FLOATS:
                continue
            length = int(np.prod(tensor.dims)) * FLOATS[tensor.data_type].itemsize
            if length < LEAST_BYTES:
                continue
            for name in ("raw_data", "float_data"):
                tensor.ClearField(name)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            offset += -(-length // ALIGNMENT) * ALIGNMENT
        self.size = max(self.size, offset)
        shared: bytes = graph_of.SerializeToString()
        return shared

    def write(self, folder: Path, seed: int) -> Path:
        """Write the numbers that the networks in `folder` refer to.

        Raises:
            RunFolderError: the place cannot be written.
        """
        rng = np.random.default_rng(seed)
        count = self.size // 4
        numbers = rng.uniform(0.5, 1.5, count) * rng.choice((-SCALE, SCALE), count)
        path = folder / WEIGHTS_FILE
        atomic_write_bytes(path, numbers.astype(np.float32).tobytes())
        return path
