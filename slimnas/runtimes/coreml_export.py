"""Core ML packages, written once they are checked as far as this machine can."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from torch import Tensor, nn

from slimnas.errors import ExportError, RunFolderError
from slimnas.runtimes.agreement import checked_difference, checked_dtype, output_of
from slimnas.runtimes.coreml_runtime import CoreMlRuntime, unpacked
from slimnas.runtimes.quiet import quiet

with quiet():
    import coremltools


def export_coreml(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    reference: nn.Module | None = None,
    dynamic_batch: bool = False,
    dtype: str | None = None,
) -> float | None:
    """Write `module` as a Core ML package (.mlpackage), by default in fp16.

    On macOS the package is run and compared with PyTorch. Elsewhere it is loaded as far as it can
    be without Core ML: the names, shapes and number formats of its input and output are checked.
    Arguments and result as in `onnx_export.export_onnx`, except that there is no dynamic batch.

    Returns:
        The largest absolute difference between the two outputs; none where Core ML does not run.

    Raises:
        ExportError: unknown operator, a difference above the tolerance, another input or output,
            a dynamic batch, or `path` is no .mlpackage.
        RunFolderError: the place cannot be written.
    """
    path = Path(path)
    runtime = CoreMlRuntime(dtype=checked_dtype(path, dtype, CoreMlRuntime.dtypes))
    if path.suffix != ".mlpackage":
        raise ExportError(f"{path}: a Core ML package must end in .mlpackage")
    if dynamic_batch:
        raise ExportError(
            f"{path}: a Core ML package is compiled for one batch size; export it without "
            "--dynamic-batch, or as onnx or openvino"
        )
    model = runtime.export(module, example)
    package = unpacked(model)
    try:
        _check_interface(package, reference or module, example, path)
        difference = None
        if sys.platform == "darwin":
            difference = checked_difference(
                runtime.open(model),
                reference or module,
                example,
                path=path,
                runtime="Core ML",
                dtype=runtime.dtype,
            )
        _move_package(package, path)
    finally:
        shutil.rmtree(package.parent)
    return difference


def _check_interface(package: Path, reference: nn.Module, example: Tensor, path: Path) -> None:
    """Load the package's specification; its input must be the example's, its output PyTorch's."""
    with quiet():
        description = coremltools.models.utils.load_spec(str(package)).description
    output = output_of(reference, example)
    single = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    for name, features, tensor in (
        ("image", description.input, example),
        ("logits", description.output, output),
    ):
        got = [
            (feature.name, tuple(feature.type.multiArrayType.shape), feature.type.multiArrayType)
            for feature in features
        ]
        wanted = (name, tuple(tensor.shape))
        if [one[:2] for one in got] != [wanted] or got[0][2].dataType != single:
            raise ExportError(
                f"{path}: the package must have {wanted} in single precision, it has "
                f"{[one[:2] for one in got]}; nothing was written"
            )


def _move_package(package: Path, path: Path) -> None:
    """Put a folder in the place of a package; when that fails the old one is there again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path / "Manifest.json").is_file():
            raise ExportError(f"{path}: is no Core ML package; choose another place with --output")
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            new, old = Path(folder) / "new", Path(folder) / "old"
            shutil.copytree(package, new)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free space or choose another place with --output"
        ) from error
