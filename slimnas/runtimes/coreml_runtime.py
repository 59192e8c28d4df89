"""Core ML: converts anywhere, runs on macOS."""

from __future__ import annotations

import copy
import io
import logging
import shutil
import sys
import tempfile
import traceback
import weakref
import zipfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.runtimes.base import Array, Configured
from slimnas.runtimes.quiet import quiet

with quiet():  # coremltools says of every version newer than itself that it was not tested
    import coremltools

PACKAGE = "network.mlpackage"
"""The folder in a serialised package."""
UNITS = {"cpu-and-ne": "CPU_AND_NE", "all": "ALL", "cpu-and-gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}
LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class CoreMlRuntime(Configured):
    """Core ML programs for iOS 15 and macOS 12 on, in fp16 as the Neural Engine computes.

    Its files are packages, folders that are serialised as one zip archive. The compute unit is
    what Core ML may use; it decides itself, as it does about threads.
    """

    dtype: str = "fp16"
    unit: str = "cpu-and-ne"

    library: ClassVar[str] = "coreml"
    version: ClassVar[str] = version("coremltools")
    dtypes: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    units: ClassVar[tuple[str, ...]] = tuple(UNITS)
    suffix: ClassVar[str] = ".mlpackage.zip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads != 1:
            raise RuntimeUnavailableError(
                f"Core ML chooses its threads itself, got threads {self.threads}; leave it at 1"
            )

    def export(self, module: nn.Module, example: Tensor) -> bytes:
        """Convert `module` and zip the package.

        Raises:
            ExportError: an operator Core ML has no form for, or a weight beyond fp16.
        """
        return coreml_bytes(module, example, dtype=self.dtype, unit=self.unit)

    def open(self, model: bytes) -> CoreMlSession:
        """Compile a zipped package for this Mac.

        Raises:
            ExportError: no package.
            RuntimeUnavailableError: not on macOS.
        """
        _require_macos()
        folder = unpacked(model)
        units = coremltools.ComputeUnit[UNITS[self.unit]]
        try:
            session = CoreMlSession(coremltools.models.MLModel(str(folder), compute_units=units))
        except RuntimeError as error:
            shutil.rmtree(folder.parent)
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"Core ML cannot load the package: {reason}") from error
        weakref.finalize(session, shutil.rmtree, folder.parent)
        return session

    def load(self, module: nn.Module, example: Tensor) -> CoreMlSession:
        """Convert `module` and compile it for this Mac.

        Raises:
            ExportError: an operator Core ML has no form for, or a weight beyond fp16.
            RuntimeUnavailableError: not on macOS.
        """
        _require_macos()
        return self.open(self.export(module, example))


class Predictor(Protocol):
    """What a session needs of `coremltools.models.MLModel`."""

    def predict(self, data: dict[str, Any]) -> Mapping[str, Any]:
        """Return the outputs by name."""
        ...


class CoreMlSession:
    """A package compiled for this Mac."""

    def __init__(self, model: Predictor) -> None:
        self._model = model

    def run(self, x: Array) -> Array:
        """Map one batch to the package's output."""
        output: Array = np.asarray(self._model.predict({"image": x})["logits"], dtype=np.float32)
        return output


def _require_macos() -> None:
    if sys.platform != "darwin":
        raise RuntimeUnavailableError(
            f"Core ML runs on macOS only, this is {sys.platform}; it converts here: slimnas zoo "
            "export --format coreml, slimnas latency kit --format coreml"
        )


def coreml_bytes(
    module: nn.Module, example: Tensor, *, dtype: str = "fp16", unit: str = "cpu-and-ne"
) -> bytes:
    """Convert `module` in evaluation mode to an ML program, zipped with its package's folder.

    Input `image` and output `logits` are single precision whatever the arithmetic.

    Args:
        module: a module with one tensor in and one out; it is not changed.
        example: an input of the shape the program will take.
        dtype: arithmetic and weights, fp16 or fp32.
        unit: one of `UNITS`; a hint that the one who loads the package gives anew.

    Raises:
        ExportError: an operator Core ML has no form for, or a weight beyond fp16.
    """
    inside = copy.deepcopy(module).eval()
    if dtype == "fp16":
        _check_range(inside)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / PACKAGE
        # Its progress bars go to stderr whatever it is told, and an error is logged before it is
        # raised.
        with quiet(logging.CRITICAL), redirect_stderr(io.StringIO()), torch.inference_mode():
            try:
                _converted(inside, example, dtype, unit).save(str(package))
            except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError) as error:
                traceback.clear_frames(error.__traceback__)  # they hold temporary folders
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ExportError(f"Core ML conversion failed: {reason}") from error
        return _packed(package)


def _converted(module: nn.Module, example: Tensor, dtype: str, unit: str) -> Any:
    """TorchScript gives the same program as torch.export here, in half the time."""
    precision = {"fp16": coremltools.precision.FLOAT16, "fp32": coremltools.precision.FLOAT32}
    return coremltools.convert(
        torch.jit.trace(module, example),  # type: ignore[no-untyped-call]
        convert_to="mlprogram",
        inputs=[coremltools.TensorType(name="image", shape=tuple(example.shape), dtype=np.float32)],
        outputs=[coremltools.TensorType(name="logits", dtype=np.float32)],
        minimum_deployment_target=coremltools.target.iOS15,
        compute_precision=precision[dtype],
        compute_units=coremltools.ComputeUnit[UNITS[unit]],
        skip_model_load=True,  # the one who runs it compiles it
    )


def _check_range(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel():
            largest = float(tensor.detach().abs().max())
            if not largest <= LARGEST_HALF:
                raise ExportError(
                    f"{name}: holds {largest:.3g}, fp16 ends at {LARGEST_HALF:.0f}; export it in "
                    "fp32"
                )


def _packed(package: Path) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(package.rglob("*")):  # without weights, their folder is there and empty
            packed.write(path, Path(PACKAGE) / path.relative_to(package))
    return archive.getvalue()


def unpacked(model: bytes) -> Path:
    """Unpack a zipped package into a new temporary folder, which is the caller's to remove.

    Returns:
        The package's folder.

    Raises:
        ExportError: no zipped package.
    """
    folder = Path(tempfile.mkdtemp(prefix="slimnas-coreml-"))
    try:
        with zipfile.ZipFile(io.BytesIO(model)) as archive:
            archive.extractall(folder)  # keeps to the folder, whatever the names
        if not (folder / PACKAGE).is_dir():
            raise ExportError(f"a zipped Core ML package must hold {PACKAGE}, got another archive")
    except (zipfile.BadZipFile, ExportError) as error:
        shutil.rmtree(folder)
        if isinstance(error, ExportError):
            raise
        raise ExportError("a Core ML package must be a zip archive here, got no archive") from error
    return folder / PACKAGE
