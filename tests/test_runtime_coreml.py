"""Core ML packages: what they compute, by another reading of their programs; what is written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_cases import (
    EFFICIENTFORMERV2,
    EFFICIENTVIT,
    LITV2,
    MIXED,
    SWIN,
    VIT,
    image_of,
    logits,
    network_of,
)
from torch import Tensor, nn

from slimnas.errors import ExportError, RunFolderError, RuntimeUnavailableError
from slimnas.nn.fold import fold
from slimnas.zoo.export import export_network

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("not installed; pip install 'slimnas[coreml]'", allow_module_level=True)

from mil import evaluate, program_of

from slimnas.runtimes.coreml_runtime import (
    UNITS,
    CoreMlRuntime,
    CoreMlSession,
    coremltools,
    unpacked,
)
from slimnas.runtimes.registry import get_runtime

FAMILIES = {
    "efficientformer": {"input": {"resolution": [64, 96]}, **MIXED},
    "vit": VIT,
    "swin": SWIN,
    "efficientformerv2": EFFICIENTFORMERV2,
    "efficientvit": EFFICIENTVIT,
    "litv2": LITV2,
}
ELSEWHERE = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", CoreMlRuntime.dtypes)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_program_computes_what_pytorch_computes(family: str, dtype: str, batch: int) -> None:
    network = network_of(FAMILIES[family])
    x = image_of(network, batch)
    package = unpacked(CoreMlRuntime(dtype=dtype).export(fold(network), x))
    main = program_of(package)
    got, expected = evaluate(main, x).numpy(), logits(network, x)
    assert got.shape == expected.shape
    difference, largest = np.abs(got - expected).max(), np.abs(expected).max()
    assert difference <= {"fp32": 2e-5, "fp16": 0.01}[dtype] * largest, f"{difference:.3g}"
    kinds = {operation.op_type for operation in main.operations}
    assert ("cast" in kinds) == (dtype == "fp16")
    assert len(kinds) >= 10


def test_a_package_says_what_it_takes_and_gives(tmp_path: Path) -> None:
    network = network_of(VIT)
    difference = export_network(network, tmp_path / "net.mlpackage", format="coreml")
    assert (difference is None) == (sys.platform != "darwin")
    assert [path.name for path in tmp_path.iterdir()] == ["net.mlpackage"]
    spec = coremltools.models.utils.load_spec(str(tmp_path / "net.mlpackage"))
    (image,), (output,) = spec.description.input, spec.description.output
    assert (image.name, output.name) == ("image", "logits")
    assert tuple(image.type.multiArrayType.shape) == (1, 3, 32, 24)
    assert tuple(output.type.multiArrayType.shape) == (1, 5)
    assert spec.specificationVersion == 6  # iOS 15
    expected = logits(network, image_of(network))
    got = evaluate(program_of(tmp_path / "net.mlpackage"), image_of(network)).numpy()
    np.testing.assert_allclose(got, expected, atol=0.01 * np.abs(expected).max())


def test_a_package_replaces_a_package_and_nothing_else(tmp_path: Path) -> None:
    network = network_of(VIT)
    path = tmp_path / "deep" / "net.mlpackage"
    export_network(network, path, format="coreml", dtype="fp32")
    export_network(network, path, format="coreml")
    assert [one.name for one in path.parent.iterdir()] == ["net.mlpackage"]
    assert "cast" in {operation.op_type for operation in program_of(path).operations}
    other = tmp_path / "other.mlpackage"
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(ExportError, match=r"other\.mlpackage: is no Core ML package"):
        export_network(network, other, format="coreml")
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be written"):
        export_network(network, tmp_path / "file" / "net.mlpackage", format="coreml")
    assert {one.name for one in tmp_path.iterdir()} == {"deep", "other.mlpackage", "file"}


def test_a_failed_move_leaves_the_old_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(VIT)
    path = tmp_path / "net.mlpackage"
    export_network(network, path, format="coreml", dtype="fp32")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunFolderError, match=r"net\.mlpackage: cannot be written \(No space"):
        export_network(network, path, format="coreml")
    assert [one.name for one in tmp_path.iterdir()] == ["net.mlpackage"]
    assert "cast" not in {operation.op_type for operation in program_of(path).operations}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.onnx", {}, r"net\.onnx: a Core ML package must end in \.mlpackage"),
        ("net.mlpackage", {"dynamic_batch": True}, "export it without --dynamic-batch"),
        ("net.mlpackage", {"dtype": "bf16"}, "dtype must be fp16 or fp32, got bf16"),
    ],
)
def test_what_a_package_cannot_be(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_network(network_of(VIT), tmp_path / name, format="coreml", **options)
    assert not list(tmp_path.iterdir())


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_weight_beyond_fp16(factor: float) -> None:
    x = torch.ones(1, 2)
    with pytest.raises(ExportError, match=r"factor: holds .*, fp16 ends at 65504; export it in"):
        CoreMlRuntime().export(Scale(factor), x)
    main = program_of(unpacked(CoreMlRuntime(dtype="fp32").export(Scale(1e6), x)))
    assert evaluate(main, x).tolist() == [[1e6, 1e6]]


def test_an_operator_core_ml_lacks() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1e(x)

    with pytest.raises(ExportError, match=r"^Core ML conversion failed: [^\n]*i1e[^\n]*$"):
        CoreMlRuntime().export(Unknown(), torch.ones(1, 2))


def test_it_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    CoreMlRuntime().export(Scale(2.0), torch.ones(1, 2))
    assert capfd.readouterr() == ("", "")


@ELSEWHERE
def test_it_runs_on_macos_only() -> None:
    runtime = get_runtime("coreml")
    assert (runtime.name, runtime.compute_unit, runtime.dtype) == ("coreml", "cpu-and-ne", "fp16")
    with pytest.raises(RuntimeUnavailableError, match="Core ML runs on macOS only, this is linux"):
        runtime.load(Scale(2.0), torch.ones(1, 2))
    with pytest.raises(RuntimeUnavailableError, match="macOS only"):
        runtime.open(b"")
    with pytest.raises(RuntimeUnavailableError, match="chooses its threads itself, got threads 2"):
        get_runtime("coreml", threads=2)


@ELSEWHERE
def test_a_macs_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fake of the half of coremltools that only macOS has."""
    opened: list[tuple[str, Any]] = []

    class Model:
        def __init__(self, path: str, compute_units: Any) -> None:
            opened.append((path, compute_units))
            self.main = program_of(Path(path))

        def predict(self, data: dict[str, Any]) -> dict[str, Any]:
            return {"logits": evaluate(self.main, torch.from_numpy(data["image"])).double().numpy()}

    x = torch.ones(1, 2)
    model = CoreMlRuntime().export(Scale(2.0), x)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Model)
    for unit, wanted in UNITS.items():
        session = CoreMlRuntime(unit=unit).open(model)
        assert isinstance(session, CoreMlSession)
        got = session.run(x.numpy())
        assert (got.tolist(), got.dtype) == ([[2.0, 2.0]], np.float32)
        path, units = opened.pop()
        assert units.name == wanted
        assert Path(path).is_dir()
        del session
        assert not Path(path).exists()


@pytest.mark.parametrize("content", [b"", b"PK no archive"])
def test_no_package(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ExportError, match="must be a zip archive here"):
        CoreMlRuntime().open(content)
