"""What a network does on a device: closed forms against counts made by hand and by tracing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from slimnas._resources import data_dir
from slimnas.arch.cost import cost
from slimnas.latency.features import network_features
from slimnas.latency.fit import FAMILY
from slimnas.latency.points import POINTS_FILE, load_points
from slimnas.zoo.registry import builtin_names, get
from tests.test_latency_device_model import published_network

TABLES = data_dir("lookup_tables")
OFFICIAL_MACS = (1_290_836_736, 3_906_061_312, 10_118_557_696)
"""Of L1, L3 and L7 with one classifier, counted by running the authors' code."""


def test_features_of_l1_by_hand() -> None:
    """Widths 48, 96, 224, 448; depths 3, 2, 6, 3 + 1; maps of 56, 28, 14 and 7 squared."""
    found = network_features(published_network("efficientformer_l1"))
    maps = (3136, 784, 196, 49)
    pooled = ((3, 48), (2, 96), (6, 224), (3, 448))
    down = ((48, 96), (96, 224), (224, 448))
    stem_macs = 27 * 24 * 112**2 + 9 * 24 * 48 * 3136
    down_macs = sum(9 * a * b * maps[i + 1] for i, (a, b) in enumerate(down))
    assert found.networks == 1
    assert found.conv_macs == stem_macs + down_macs
    assert found.grouped_macs == found.patch_embeddings == found.large_attention_elements == 0
    assert found.attention_macs == 49 * 49 * 8 * (32 + 128)
    ffn = sum(n * 8 * w * w * maps[i] for i, (n, w) in enumerate(pooled)) + 8 * 448**2 * 49
    assert found.pointwise_macs == ffn + 49 * 448 * (1536 + 1024) + 448 * 1000
    hidden = sum(n * 4 * w * maps[i] for i, (n, w) in enumerate(pooled)) + 4 * 448 * 49
    assert found.activation_elements == hidden
    assert found.reshaped_elements == 49 * (1536 + 1024)  # heads apart, and together again
    assert found.norm_elements == 2 * 448 * 49 + 8 * 49 * 49 + 448 * 49
    assert found.dynamic_norms == 2 + 1 + 1
    assert found.operators == 2 + 3 + 14 * 3 + 9 + 2
    streamed = 9 * (96 * 224 + 224 * 448) + 6 * 8 * 224**2 + 4 * 8 * 448**2
    assert found.streamed_weights == streamed + 448 * (1536 + 1024) + 448 * 1000


@pytest.mark.parametrize(("name", "macs"), tuple(zip(FAMILY, OFFICIAL_MACS, strict=True)))
def test_macs_are_those_of_the_official_code(name: str, macs: int) -> None:
    found = network_features(published_network(name))
    assert found.macs == macs


def test_features_of_the_points_follow_from_the_closed_forms() -> None:
    """points.csv was traced from timm; slimnas' closed forms give the same integers."""
    checked = 0
    for folder in sorted(path.parent for path in TABLES.glob(f"*/{POINTS_FILE}")):
        for point in load_points(folder / POINTS_FILE):
            if point.name in FAMILY:
                assert point.features == network_features(published_network(point.name))
                checked += 1
    assert checked == 5 * 3 + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("efficientformer_l1", "efficientformer_l1"),
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("vit_tiny_patch16", "vit_tiny_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
    ],
)
def test_closed_forms_are_what_tracing_counts(name: str, model: str) -> None:
    assert network_features(get(name).architecture) == _tracer().model_features(model, 224)


@pytest.mark.slow
def test_a_point_can_be_traced_again() -> None:
    points = {p.name: p for p in load_points(TABLES / "iphone12" / POINTS_FILE)}
    point = points["mobilenetv2_x1.0"]
    assert _tracer().model_features(point.model, point.resolution) == point.features


def test_every_built_in_network_is_counted() -> None:
    looked_at = 0
    for name in builtin_names():
        architecture = get(name).architecture
        found = network_features(architecture)
        assert found.macs > 0, name
        assert found.weights >= found.streamed_weights > 0, name
        if name.startswith("efficientvit"):  # an operator for every multiply-add
            assert found.macs == cost(architecture).macs, name
            looked_at += 1
    assert looked_at == 6


def test_attention_step_matches_its_published_growth() -> None:
    """Two blocks of width 160 are what +0.85 M parameters and +0.27 GMACs come from."""
    pytest.importorskip("timm")
    from timm.models.efficientformer_v2 import Attention2d

    block = Attention2d(160, resolution=14)
    assert 2 * sum(p.numel() for p in block.parameters()) == pytest.approx(0.85e6, rel=0.02)
    points = {p.name: p for p in load_points(TABLES / "iphone12-ios16" / POINTS_FILE)}
    step = points["step to attention at 14x14"].features
    assert step is not None
    talking = 2 * 2 * 64 * 196**2  # two layers over the heads, 1x1 convolutions on the score maps
    assert step.attention_macs == 2 * 8 * (32 + 128) * 196**2
    assert step.macs == pytest.approx(0.27e9, rel=0.05)
    assert step.pointwise_macs > talking
    assert step.large_attention_elements == 2 * 8 * 196**2


def _tracer() -> ModuleType:
    pytest.importorskip("timm")
    path = Path(__file__).parent.parent / "tools" / "trace_features.py"
    spec = importlib.util.spec_from_file_location("trace_features", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
