"""Runtimes give PyTorch's numbers; exported files are checked before they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.errors import ExportError, RuntimeUnavailableError
from slimnas.nn.build import Network, build
from slimnas.nn.efficientformer import MB4D
from slimnas.nn.fold import fold
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.runtimes.registry import RUNTIMES, get_runtime
from slimnas.runtimes.torch_runtime import TorchRuntime


def mixed_network(resolution: tuple[int, int] = (64, 96)) -> Network:
    """A small network with every layout change, weights away from their starts."""
    attention = {"type": "mb3d", "heads": 2, "qk_dim": 4, "v_dim": 6}
    architecture = Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "mixed",
            "input": {"resolution": list(resolution)},
            "stem": {"type": "conv_stem", "width": 8},
            "stages": [
                {"width": 8, "blocks": [{"type": "mb4d"}, attention]},
                {
                    "width": 12,
                    "downsample": {"type": "conv3x3"},
                    "blocks": [attention, {"type": "mb4d"}, attention],
                },
            ],
            "head": {"type": "linear", "classes": 5, "distilled": True},
        }
    )
    network = build(architecture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.add_(torch.randn(part.num_features, generator=generator))
                part.running_var.add_(torch.rand(part.num_features, generator=generator))
    return network


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def logits(network: Network, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        out: np.ndarray = network.eval()(x).numpy()
    return out


@pytest.mark.parametrize("name", sorted(RUNTIMES))
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


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_runtime_runs_one_block(name: str) -> None:
    block = MB4D(width=6, ffn_dim=9)
    x = torch.randn(1, 6, 8, 8)
    got = get_runtime(name).load(block, x).run(x.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(got, block.eval()(x).numpy(), atol=1e-5)


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
