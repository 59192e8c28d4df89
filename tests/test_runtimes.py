"""Runtimes give PyTorch's numbers; exported files are checked before they are written.

The contract runs over every runtime whose library is installed; `.[test]` lacks only ExecuTorch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from runtime_cases import MIXED, RUNNING, SWIN, VIT, image_of, logits, network_of
from torch import Tensor, nn

from slimnas.errors import ExportError, RunFolderError, RuntimeUnavailableError
from slimnas.nn.build import Network
from slimnas.nn.efficientformer import MB4D
from slimnas.nn.fold import fold
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.runtimes.registry import EXPORTERS, RUNTIMES, get_exporter, get_runtime
from slimnas.runtimes.torch_runtime import TorchRuntime
from slimnas.zoo.export import FILE_SUFFIXES, export_network

INSTALLED = RUNNING
ALL = [
    pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"no {name} here"))
    for name in RUNTIMES
]
BESIDES_ONNX = [  # formats that are called like their runtimes
    pytest.param(name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"no {name} here"))
    for name in EXPORTERS
    if name not in ("onnx", "coreml")  # which has a file of its own
]


def mixed_network(resolution: tuple[int, int] = (64, 96)) -> Network:
    """A small EfficientFormer with every layout change."""
    return network_of({"input": {"resolution": list(resolution)}, **MIXED})


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_several_runtimes_are_tested() -> None:
    assert {"torch", "onnxruntime"} <= set(INSTALLED)
    assert len(ALL) == len(RUNTIMES) == 5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("folded", [False, True])
def test_runtime_gives_pytorchs_numbers(name: str, folded: bool) -> None:
    network = mixed_network()
    runtime = get_runtime(name, threads=1)
    session = runtime.load(fold(network) if folded else network, image())
    assert network.training
    got = session.run(image().numpy())
    expected = logits(network, image())
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert (runtime.name, runtime.compute_unit, runtime.threads) == (name, "cpu", 1)
    assert runtime.version


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("body", [pytest.param(VIT, id="vit"), pytest.param(SWIN, id="swin")])
def test_runtime_gives_pytorchs_numbers_of_pruned_transformers(
    name: str, batch: int, body: dict[str, Any]
) -> None:
    network = network_of(body)
    x = image_of(network, batch)
    session = get_runtime(name).load(fold(network), x)
    expected = logits(network, x)
    assert expected.shape == (batch, 5)
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(session.run(x.numpy()), expected, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_result_outlives_the_next_call(name: str) -> None:
    block = MB4D(width=6, ffn_dim=9).eval()
    first, second = torch.randn(2, 2, 6, 8, 8)
    session = get_runtime(name).load(block, first)
    got = [session.run(first.numpy()), session.run(second.numpy())]
    with torch.inference_mode():
        for result, x in zip(got, (first, second), strict=True):
            np.testing.assert_allclose(result, block(x).numpy(), atol=1e-5)


class Work(nn.Module):
    """Convolution, attention and layer norm, large enough to be worth several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        mixed = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        out: Tensor = self.linear(mixed)
        return out


def busy_threads(session: Any, x: np.ndarray) -> int:
    """How many of the process's threads the session's work is spread over.

    Counted by CPU time, which other processes do not change: a thread counts from a tenth of the
    whole on. 2 seconds of CPU time, as the system counts in hundredths.
    """

    def used() -> dict[int, float]:
        return {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}

    session.run(x)
    before = used()
    while sum(used().values()) - sum(before.values()) < 2:
        session.run(x)
    spent = [seconds - before.get(thread, 0) for thread, seconds in used().items()]
    return sum(seconds > 0.1 * sum(spent) for seconds in spent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_threads_are_as_many_as_asked_for(name: str) -> None:
    x = torch.randn(1, 64, 40, 40)
    counted, was = {}, torch.get_num_threads()
    try:
        for threads in (2, 1) if (os.cpu_count() or 1) > 1 else (1,):
            session = get_runtime(name, threads=threads).load(Work().eval(), x)
            counted[threads] = busy_threads(session, x.numpy())
            del session
    finally:
        torch.set_num_threads(was)
    assert counted[1] == 1
    assert counted.get(2, 2) == 2


def test_executorch_keeps_one_number_of_threads_while_sessions_are_open() -> None:
    pytest.importorskip("executorch")
    x = torch.randn(1, 6, 8, 8)
    block = MB4D(width=6, ffn_dim=9)
    session = get_runtime("executorch", threads=1).load(block, x)
    with pytest.raises(RuntimeUnavailableError, match=r"1 session\(s\) run on 1 thread.* for 2"):
        get_runtime("executorch", threads=2).load(block, x)
    session.run(x.numpy())
    del session
    get_runtime("executorch", threads=2).load(block, x).run(x.numpy())


def test_loading_copies_the_module() -> None:
    network = mixed_network()
    session = TorchRuntime().load(network, image())
    before = session.run(image().numpy())
    with torch.no_grad():
        network.stem.conv1.weight.zero_()
    np.testing.assert_array_equal(session.run(image().numpy()), before)


def test_torch_runs_on_its_own_number_of_threads() -> None:
    class Threads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.get_num_threads()

    was = torch.get_num_threads()
    x = torch.ones(1)
    try:
        for threads in (2, 1):
            session = get_runtime("torch", threads=threads).load(Threads(), x)
            assert session.run(x.numpy())[0] == threads
    finally:
        torch.set_num_threads(was)


def test_unknown_runtime() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"did you mean 'onnxruntime'.*known: "):
        get_runtime("onnxruntim")


def test_no_threads() -> None:
    with pytest.raises(RuntimeUnavailableError, match="threads must be at least 1, got 0"):
        get_runtime("torch", threads=0)


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "other", ("slimnas_no_such_module", "Other"))
    with pytest.raises(RuntimeUnavailableError, match=r"'other' is not installed .*pip install"):
        get_runtime("other")


@pytest.mark.parametrize("name", ["coreml", "openvino", "executorch"])
def test_an_extra_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, name, ("slimnas_no_such_module", "Other"))
    monkeypatch.setitem(EXPORTERS, name, ("slimnas_no_such_module", "other"))
    for get in (get_runtime, get_exporter):
        with pytest.raises(RuntimeUnavailableError, match=rf"pip install 'slimnas\[{name}\]'$"):
            get(name)


def test_unknown_format() -> None:
    with pytest.raises(ExportError, match=r"'openvin' \(did you mean 'openvino'\?\); known: onnx"):
        get_exporter("openvin")
    assert set(FILE_SUFFIXES) == set(EXPORTERS)


def test_more_than_one_output_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="one output, got tuple"):
        TorchRuntime().load(Two(), torch.ones(1)).run(np.ones(1, dtype=np.float32))


def test_exported_file(tmp_path: Path) -> None:
    network = mixed_network()
    path = tmp_path / "deep" / "net.onnx"
    difference = export_onnx(fold(network), image(), path, reference=network)
    assert network.training
    onnx.checker.check_model(str(path), full_check=True)
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": image().numpy()})
    expected = logits(network, image())
    assert difference == pytest.approx(float(np.abs(got - expected).max()), abs=1e-6)
    assert difference < 2e-5


def test_dynamic_batch(tmp_path: Path) -> None:
    network = mixed_network()
    path = tmp_path / "net.onnx"
    export_onnx(fold(network), image(), path, dynamic_batch=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": image(3).numpy()})
    np.testing.assert_allclose(got, logits(network, image(3)), atol=2e-5)


def test_a_file_that_disagrees_is_not_written(tmp_path: Path) -> None:
    network, other = mixed_network(), mixed_network()
    with torch.no_grad():
        other.head.head.bias.add_(0.1)
    with pytest.raises(ExportError, match=r"net\.onnx: ONNX Runtime differs from PyTorch by 0\.05"):
        export_onnx(fold(network), image(), tmp_path / "net.onnx", reference=other)
    assert not list(tmp_path.iterdir())


def test_an_operator_onnx_lacks(tmp_path: Path) -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1e(x)

    with pytest.raises(ExportError, match=r"ONNX export failed: .*i1e"):
        export_onnx(Unknown(), torch.ones(1, 2), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BESIDES_ONNX)
def test_other_formats(name: str, tmp_path: Path) -> None:
    network = network_of(VIT)
    path = tmp_path / "deep" / f"net{FILE_SUFFIXES[name]}"
    difference = export_network(network, path, format=name)
    assert difference < 2e-5
    assert network.training
    files = {"openvino": {"net.xml", "net.bin"}, "executorch": {"net.pte"}}[name]
    assert {file.name for file in path.parent.iterdir()} == files
    x = image_of(network)
    np.testing.assert_allclose(opened(name, path).run(x.numpy()), logits(network, x), atol=2e-5)
    assert str(tmp_path) not in path.read_bytes().decode("utf-8", errors="ignore")


def opened(name: str, path: Path) -> Any:
    """The exported file in its runtime, as somebody without slimnas' modules would open it."""
    if name == "executorch":
        from slimnas.runtimes.executorch_runtime import ExecuTorchSession

        return ExecuTorchSession(path.read_bytes(), threads=1)
    import openvino

    from slimnas.runtimes.openvino_runtime import OpenVinoSession

    return OpenVinoSession(openvino.Core(), str(path), threads=1)


@pytest.mark.parametrize("name", BESIDES_ONNX)
def test_other_formats_that_disagree_are_not_written(name: str, tmp_path: Path) -> None:
    network, other = mixed_network(), mixed_network()
    with torch.no_grad():
        other.head.head.bias.add_(0.1)
    path = tmp_path / f"net{FILE_SUFFIXES[name]}"
    with pytest.raises(ExportError, match=r"net\.\w+: (OpenVINO|ExecuTorch) differs .* by 0\.05"):
        get_exporter(name)(fold(network), image(), path, reference=other)
    assert not list(tmp_path.iterdir())


def test_openvino_takes_any_batch(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    network = network_of(SWIN)
    path = tmp_path / "net.xml"
    export_network(network, path, format="openvino", dynamic_batch=True)
    x = image_of(network, 3)
    np.testing.assert_allclose(
        opened("openvino", path).run(x.numpy()), logits(network, x), atol=2e-5
    )


def test_openvino_writes_both_files_or_neither(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export = get_exporter("openvino")
    with pytest.raises(ExportError, match=r"net\.onnx: an OpenVINO file must end in \.xml"):
        export(fold(mixed_network()), image(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    for blocked in ("a.xml", "b.bin"):
        (tmp_path / blocked).mkdir()
        with pytest.raises(ExportError, match=rf"{blocked}: is a folder"):
            export(fold(mixed_network()), image(), (tmp_path / blocked).with_suffix(".xml"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be written"):
        export(fold(mixed_network()), image(), tmp_path / "file" / "net.xml")
    assert {path.name for path in tmp_path.iterdir()} == {"a.xml", "b.bin", "file"}


def test_executorch_has_no_dynamic_batch(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    with pytest.raises(ExportError, match=r"one batch size; export it without --dynamic-batch"):
        export_network(
            mixed_network(), tmp_path / "net.pte", format="executorch", dynamic_batch=True
        )
    assert not list(tmp_path.iterdir())


def test_an_operator_executorch_lacks(tmp_path: Path) -> None:
    pytest.importorskip("executorch")

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1e(x)

    with pytest.raises(ExportError, match=r"^ExecuTorch export failed: Operator .*i1e.*Core ATen"):
        get_exporter("executorch")(Unknown(), torch.ones(1, 2), tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())
