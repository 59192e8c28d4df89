"""How a network is profiled, and what a profiler saw: the values that profilers share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from slimnas.analysis.operators import Operator
from slimnas.analysis.places import Place
from slimnas.errors import AnalysisError

DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda")
LOG_LEVEL, SILENT = "KINETO_LOG_LEVEL", "99"

RuntimeName = Literal["torch", "onnxruntime"]
Attention = Literal["fused", "explicit"]


@dataclass(frozen=True)
class ProfileSettings:
    """How a network is profiled.

    Attributes:
        runtime: whose profiler.
        device: cpu or cuda.
        dtype: number format of weights and maps.
        batch: images per run.
        threads: of the CPU.
        iterations: runs that count.
        warm_up: runs before them.
        folded: as deployed, BatchNorm in the convolutions before it.
        attention: of torch: `fused` runs what the network asks for, `explicit` products, softmax
            and products, as the networks of the paper did.
        seed: of the image.
    """

    runtime: RuntimeName = "torch"
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 8
    threads: int = 1
    iterations: int = 10
    warm_up: int = 3
    folded: bool = True
    attention: Attention = "fused"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be profiled.

        Raises:
            AnalysisError: one line.
        """
        for name in ("batch", "threads", "iterations"):
            if getattr(self, name) < 1:
                raise AnalysisError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("device", DEVICES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise AnalysisError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.runtime == "onnxruntime" and (self.device, self.dtype) != ("cpu", "fp32"):
            raise AnalysisError(
                "ONNX Runtime is profiled on the CPU in fp32 only, got "
                f"{self.device} and {self.dtype}; use runtime torch"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise AnalysisError(
                f"device cuda: torch {torch.__version__} finds none here; use device cpu"
            )


@contextlib.contextmanager
def silent_profiler() -> Iterator[None]:
    """Keep torch's profiler, which reads its level when first used, from writing to stderr."""
    before = os.environ.get(LOG_LEVEL)
    os.environ.setdefault(LOG_LEVEL, SILENT)
    try:
        yield
    finally:
        if before is None:
            del os.environ[LOG_LEVEL]


@dataclass(frozen=True)
class Cell:
    """One operator in one place of the network.

    Attributes:
        place: where.
        operator: which.
        calls: per run.
        times_ms: its time in every run that counts, all calls together.
        macs: per run, of the whole batch.
        bytes: read and written per run.
    """

    place: Place
    operator: Operator
    calls: int
    times_ms: tuple[float, ...]
    macs: int
    bytes: int


@dataclass(frozen=True)
class Recording:
    """What a profiler saw.

    Attributes:
        cells: every operator in every place.
        forward_ms: a whole run without the profiler, several times.
        version: of the runtime.
        compute_unit: `cpu`, or the name of the GPU.
    """

    cells: tuple[Cell, ...]
    forward_ms: tuple[float, ...]
    version: str
    compute_unit: str
