"""An ONNX file as something that is asked for logits, like a network.

Shapes: B batch, K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slimnas.arch.shapes import FeatureShape
from slimnas.errors import ExportError
from slimnas.runtimes.onnxruntime_runtime import OnnxRuntime, OnnxSession

FLOAT = "tensor(float)"


@dataclass(frozen=True, eq=False)
class OnnxModel:
    """An opened ONNX file; call it with images (B, c, H, W) for logits (B, K) on the CPU.

    A file for a fixed batch gets that many images per call, the last ones filled up with zeros.

    Attributes:
        path: the file.
        digest: SHA-256 of its content.
        session: ONNX Runtime on the CPU.
        batch: images per call; None for any number.
    """

    path: Path
    digest: str
    session: OnnxSession
    batch: int | None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of every image, in order."""
        given = np.ascontiguousarray(images.detach().float().cpu().numpy())
        if self.batch is None:
            return torch.from_numpy(self.session.run(given))
        found = []
        for start in range(0, len(given), self.batch):
            part = given[start : start + self.batch]
            missing = self.batch - len(part)
            if missing:
                part = np.concatenate([part, np.zeros_like(part, shape=(missing, *part.shape[1:]))])
            found.append(self.session.run(part)[: self.batch - missing])
        return torch.from_numpy(np.concatenate(found))


def open_onnx(path: Path, shape: FeatureShape, classes: int, *, threads: int) -> OnnxModel:
    """Open an ONNX classifier for images of `shape` and check that it fits.

    Args:
        path: the file.
        shape: channels, height and width of the images it will get.
        classes: logits it must give per image.
        threads: threads per call.

    Raises:
        ExportError: missing, no ONNX model, or one of another input or number of classes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror}); give an ONNX file, such as one of "
            "slimnas zoo export MODEL --format onnx"
        ) from error
    try:
        session = OnnxRuntime(threads=threads).open(content)
    except ExportError as error:
        raise ExportError(f"{path}: {error}; export the network again") from error
    _check_input(path, session, shape)
    size = _check_output(path, session, classes)
    batch = session.takes.shape[0]
    model = OnnxModel(path, hashlib.sha256(content).hexdigest(), session, batch)
    if size is None:  # the file does not say: one image tells
        probe = torch.zeros(1, shape.channels, shape.height, shape.width)
        _check_gives(path, tuple(model(probe).shape), classes)
    return model


def _check_input(path: Path, session: OnnxSession, shape: FeatureShape) -> None:
    takes = session.takes
    if takes.dtype != FLOAT:
        raise ExportError(
            f"{path}: must take single precision ({FLOAT}), it takes {takes.dtype}; export it "
            "with inputs in single precision"
        )
    wanted = (shape.channels, shape.height, shape.width)
    if len(takes.shape) != 4:
        raise ExportError(
            f"{path}: must take images (batch, channels, height, width), it takes "
            f"{_sizes(takes.shape)}"
        )
    pairs = zip(takes.shape[1:], wanted, strict=True)
    if all(size in (None, want) for size, want in pairs):
        return
    channels, height, width = takes.shape[1:]
    advice = "export the network that is evaluated"
    if channels in (None, shape.channels) and height == width:
        advice = f"use --resolution {height}, or {advice} at {shape.height} px"
    raise ExportError(
        f"{path}: takes images {_sizes(takes.shape[1:])}, these are {_sizes(wanted)}; {advice}"
    )


def _check_output(path: Path, session: OnnxSession, classes: int) -> int | None:
    """Number of classes by the file's word, or None where it leaves that open."""
    gives = session.gives.shape
    if gives:
        _check_gives(path, gives, classes)
    return gives[-1] if gives else None


def _check_gives(path: Path, gives: tuple[int | None, ...], classes: int) -> None:
    if len(gives) != 2:
        raise ExportError(f"{path}: must give logits (batch, classes), it gives {_sizes(gives)}")
    found = gives[1]
    if found not in (None, classes):
        raise ExportError(
            f"{path}: gives {found} classes, the network has {classes}; export the network that "
            "is evaluated"
        )


def _sizes(shape: tuple[int | None, ...]) -> str:
    return "x".join("any" if size is None else str(size) for size in shape) or "one number"
