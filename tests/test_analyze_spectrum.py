"""Spectra: of waves of known frequency, of noise, and of what HiLo's branches must give."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from cli_world import slimnas
from prune_cases import ARCHITECTURES, images, random_network
from safetensors.torch import save_file
from torch import Tensor

from slimnas.analysis.spectrum import (
    Part,
    branch_parts,
    find_part,
    mean_share,
    radii,
    relative_power,
    rings,
    spectra,
)
from slimnas.arch.architecture import Architecture
from slimnas.errors import AnalysisError
from slimnas.nn.build import build
from slimnas.nn.litv2 import HiLo
from slimnas.report.analysis_spectrum import spectra_figure
from slimnas.zoo.create import create_model

HILO = """schema: slimnas/architecture/1
name: tiny_hilo
input: {channels: 3, resolution: 32}
stem: {type: swin_stem, width: 16, patch: 4}
stages:
- width: 16
  blocks:
  - {type: hilo, heads: 4, lo_heads: 3, window: 2, ffn_dim: 8}
  - {type: hilo, heads: 4, lo_heads: 2, window: 2, ffn_dim: 8}
head: {type: linear, classes: 5}
"""


def wave(rows: int, columns: int, down: int, across: int) -> Tensor:
    """A cosine of whole cycles down and across the map."""
    y = 2 * math.pi * down * torch.arange(rows) / rows
    x = 2 * math.pi * across * torch.arange(columns) / columns
    return torch.cos(y[:, None] + x)


@pytest.mark.parametrize(
    ("size", "cycles"),
    [
        ((16, 16), (0, 3)),
        ((16, 16), (5, 0)),
        ((14, 14), (3, 4)),
        ((15, 9), (2, 1)),
        ((8, 8), (4, 4)),
    ],
)
def test_a_wave_has_its_energy_at_its_frequency(
    size: tuple[int, int], cycles: tuple[int, int]
) -> None:
    power = relative_power(7.0 + wave(*size, *cycles)[None, None])[0]
    strongest = power > 0.5 * power.max()
    expected = math.hypot(2 * cycles[0] / size[0], 2 * cycles[1] / size[1])
    found = radii(*size)[strongest]
    assert len(found) in (1, 2)
    assert found.tolist() == pytest.approx([expected] * len(found))
    assert power[strongest].sum() == pytest.approx(size[0] * size[1] - 1)


def test_the_mean_is_no_frequency() -> None:
    x = wave(8, 8, 1, 2)[None, None]
    assert torch.allclose(relative_power(x), relative_power(x + 1000), atol=1e-6)
    middle = relative_power(x + 1000)[0, 4, 4]
    assert float(middle) == 0


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 6, 6), torch.full((1, 2, 5, 7), 3.1)])
def test_a_constant_map_has_no_spectrum(x: Tensor) -> None:
    assert relative_power(x).abs().max() == 0


def test_noise_is_flat_and_scale_does_not_matter() -> None:
    x = torch.randn(40, 30, 14, 14, generator=torch.Generator().manual_seed(0))
    power = relative_power(x)
    assert torch.allclose(power, relative_power(100 * x))
    mean = power.mean(dim=0)
    mean[7, 7] = 1.0
    assert (mean - 1).abs().max() < 0.2
    assert power.sum(dim=(1, 2)).tolist() == pytest.approx([195.0] * 40)


def test_rings_hold_every_frequency_once() -> None:
    for size in ((14, 14), (7, 7), (8, 12), (15, 9)):
        ring = rings(*size)
        assert ring.shape == size
        assert int((ring == 0).sum()) == 1
        assert float(radii(*size).max()) <= math.sqrt(2) + 1e-9
        shorter = min(size)
        exact = radii(*size) * shorter / 2
        assert (exact - ring).abs().max() <= 0.5 + 1e-9


def hilo(seed: int = 0) -> torch.nn.Module:
    return random_network(Architecture.from_yaml(HILO), seed)


def test_both_branches_of_every_hilo_are_found() -> None:
    parts = branch_parts(hilo())  # type: ignore[arg-type]
    assert [part.name for part in parts] == [
        "stages.0.blocks.0.attn:hi",
        "stages.0.blocks.0.attn:lo",
        "stages.0.blocks.1.attn:hi",
        "stages.0.blocks.1.attn:lo",
    ]
    assert {part.group for part in parts} == {"Hi-Fi", "Lo-Fi"}


def test_branches_are_what_the_module_computes() -> None:
    network = hilo()
    x = images(network.architecture)
    parts = branch_parts(network)[:2]
    hi, lo = spectra(network, parts, [x])
    assert (hi.channels, lo.channels) == (4, 12)
    assert hi.size == lo.size == (8, 8)
    seen: list[Tensor] = []
    attention = network.get_submodule("stages.0.blocks.0.attn")
    assert isinstance(attention, HiLo)
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(x)
        handle.remove()
        for found, tokens in ((hi, attention.hifi(seen[0])), (lo, attention.lofi(seen[0]))):
            power = relative_power(tokens.transpose(1, 2).reshape(2, -1, 8, 8))
            high = 100 * (power * (radii(8, 8) > 0.5)).sum(dim=(1, 2)) / power.sum(dim=(1, 2))
            assert found.high_percent == pytest.approx(float(high.mean()))
            assert found.high_deviation == pytest.approx(float(high.std(correction=0)))


def test_power_and_shares_of_a_ring_add_up() -> None:
    network = hilo()
    (found,) = spectra(network, [Part("stages.0.blocks.1")], [images(network.architecture)])
    counts = torch.bincount(rings(8, 8).flatten())[1:].double()
    total = sum(n * p for n, p in zip(counts.tolist(), found.power, strict=True))
    assert total == pytest.approx(63)
    assert found.frequencies == pytest.approx([n / 4 for n in range(1, len(counts) + 1)])
    assert found.picture[4][4] is None
    assert found.white_percent == pytest.approx(100 * float((radii(8, 8) > 0.5).sum()) / 63)


def test_branches_whose_attention_is_uniform() -> None:
    """Hi-Fi outputs are then means of 2x2 windows, Lo-Fi outputs one mean of the whole map."""
    network = hilo()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, HiLo):
                hi, lo = module.hi_heads * module.dim, module.lo_heads * module.dim
                for layer, rows in ((module.h_qkv, hi), (module.l_q, lo)):
                    assert layer is not None
                    layer.weight[:rows] = 0.0
                    layer.bias[:rows] = 0.0
    hi_fi, lo_fi, *_ = spectra(network, branch_parts(network), [images(network.architecture)])
    assert lo_fi.high_percent is None
    assert lo_fi.mean_percent == pytest.approx(100)
    # Neighbours alike: the highest frequency along either axis is not there.
    assert all(value == -12.0 for value in hi_fi.picture[0])
    assert all(row[0] == -12.0 for row in hi_fi.picture)
    assert hi_fi.high_percent is not None
    assert 0 < hi_fi.high_percent < hi_fi.white_percent


def test_the_share_of_the_mean() -> None:
    x = torch.stack([torch.full((4, 4), 3.0), wave(4, 4, 1, 0)])[:, None]
    both = x + torch.tensor([0.0, 1.0])[:, None, None, None]
    assert mean_share(x).tolist() == pytest.approx([1.0, 0.0], abs=1e-9)
    assert mean_share(both).tolist() == pytest.approx([1.0, 1 / 1.5])
    assert mean_share(torch.zeros(1, 2, 4, 4)).tolist() == [0.0]


def test_blocks_with_a_class_token_and_maps_have_spectra() -> None:
    network = create_model("deit_tiny", resolution=64).eval()
    names = ["stem", "stages.0.blocks.0", "stages.0.blocks.11.attn"]
    parts = [find_part(network, name) for name in names]
    found = spectra(network, parts, [torch.randn(2, 3, 64, 64)])
    assert [one.size for one in found] == [(4, 4)] * 3
    assert [one.part.name for one in found] == names
    network = build(ARCHITECTURES["efficientformer"]).eval()
    (one,) = spectra(
        network, [find_part(network, "stages.0.blocks.0")], [torch.randn(1, 3, 32, 32)]
    )
    assert (one.size, one.channels) == ((8, 8), 8)


def test_constant_outputs_have_no_share() -> None:
    """EfficientViT starts its attention's last BatchNorm at zero."""
    network = create_model("efficientvit_m0").eval()
    parts = [name for name, m in network.named_modules() if type(m).__name__.startswith("Cascaded")]
    assert len(parts) == 6
    (found,) = spectra(network, [Part(parts[0])], [torch.randn(1, 3, 224, 224)])
    assert found.high_percent is None
    assert found.high_deviation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages.0.blocks.7", "no module of that name .did you mean 'stages.0.blocks.1'"),
        ("stages", "has no module of that name"),
        ("", "has no module of that name"),
        ("stages.0.blocks.0.attn:mid", "behind the colon must be hi or lo, got 'mid'"),
        ("stages.0.blocks.0:hi", "stages.0.blocks.0 is no HiLo attention with two branches"),
    ],
)
def test_parts_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        find_part(hilo(), text)  # type: ignore[arg-type]


def test_outputs_that_are_no_maps() -> None:
    network = hilo()
    for name, message in (
        ("head", "its output must be a map or its tokens"),
        ("stages.0.blocks.0.attn.l_kv", "its output must be a map or its tokens"),
    ):
        with pytest.raises(AnalysisError, match=message):
            spectra(network, [find_part(network, name)], [images(network.architecture)])
    small = random_network(ARCHITECTURES["vit"])
    with pytest.raises(AnalysisError, match="a map of 2x2 is too small for a spectrum"):
        spectra(small, [Part("stages.0.blocks.0")], [images(small.architecture)])
    with pytest.raises(AnalysisError, match="at least one image"):
        spectra(network, [Part("stages.0.blocks.0")], [])


def test_a_model_without_hilo_names_what_is_missing() -> None:
    network = build(ARCHITECTURES["vit"])
    with pytest.raises(AnalysisError, match=r"tiny_vit: has no HiLo attention .* with --part"):
        branch_parts(network)


@pytest.mark.parametrize("width_in", [9.0, 4.0])
@pytest.mark.parametrize("with_control", [True, False])
def test_the_figure_shows_every_group(width_in: float, with_control: bool) -> None:
    network = hilo()
    found = spectra(network, branch_parts(network), [images(network.architecture)])
    figure = spectra_figure(found, found if with_control else [], width_in)
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == (4 if with_control else 2)
    scales = {image.get_clim() for axes in pictures for image in axes.images}
    assert len(scales) == 1  # brightness can be compared


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Architecture.from_yaml(HILO).save(tmp_path / "hilo.yaml")
    command = ("analyze", "spectrum", "hilo.yaml", "--weights", "none", "--images", "5")
    answer = slimnas(capsys, *command)
    assert answer.code == 0, answer.err
    assert "stages.0.blocks.1.attn:lo" in answer.out
    folder = Path("runs/analyze-spectrum-tiny_hilo")
    names = ["rings.csv", "spectrum.csv", "spectrum.json", "spectrum.png", "spectrum.svg"]
    assert sorted(path.name for path in folder.iterdir()) == names
    parts = json.loads((folder / "spectrum.json").read_text())["parts"]
    assert [part["group"] for part in parts] == ["Hi-Fi", "Lo-Fi"] * 2
    with (folder / "spectrum.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= {"part", "high_percent", "mean_percent", "white_noise_percent"}
    assert "control_high_percent" not in rows[0]  # random weights are their own control
    two = ("--part", "stages.0.blocks.0", "--part", "stages.0.blocks.1", "--no-control")
    again = slimnas(capsys, *command, *two, "--output", "other", "--json")
    body = again.json()
    assert [part["part"] for part in body["parts"]] == ["stages.0.blocks.0", "stages.0.blocks.1"]
    assert Path(body["files"]["png"]).is_file()
    network = random_network(Architecture.from_yaml(HILO)).float()
    save_file(network.state_dict(), "weights.safetensors")
    command = ("analyze", "spectrum", "hilo.yaml", "--weights", "weights.safetensors", "--json")
    body = slimnas(
        capsys, *command, "--images", "3", "--resolution", "48", "--output", "third"
    ).json()
    assert body["resolution"] == [48, 48]
    assert all(part["high_percent"] != part["control_high_percent"] for part in body["parts"])


def test_a_model_without_hilo_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = slimnas(capsys, "analyze", "spectrum", "deit_tiny")
    assert answer.code == 1
    (error,) = answer.errors
    assert "deit_tiny: has no HiLo attention with two branches" in error
    assert list(tmp_path.iterdir()) == []
