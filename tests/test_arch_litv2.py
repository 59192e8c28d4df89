"""LITv2's specs: published costs, costs as computed, heads of alpha, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from litv2_cases import ATTENTION, GLOBAL, images, litv2_architecture, varied
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.litv2 import HiLoBlock, lo_heads_of
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import SpecError
from slimnas.latency.features import network_features
from slimnas.nn.build import build
from slimnas.nn.litv2 import HiLo
from slimnas.prune.found import measured_macs
from slimnas.zoo.registry import builtin_names, get

NAMES = ["litv2_b", "litv2_m", "litv2_s"]


@pytest.mark.parametrize(
    ("heads", "alpha", "lo_heads"),
    [
        (12, 0.9, 10),
        (16, 0.9, 14),
        (12, 0.5, 6),
        (12, 0.2, 2),
        (12, 0.7, 8),
        (3, 0.9, 2),
        (6, 0.9, 5),
        (24, 0, 0),
        (24, 1, 24),
    ],
)
def test_heads_of_alpha(heads: int, alpha: float, lo_heads: int) -> None:
    assert lo_heads_of(heads, alpha) == lo_heads


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, got {alpha}"):
        lo_heads_of(12, alpha)


@pytest.mark.parametrize(
    ("width", "heads", "lo_heads", "window", "bias", "macs", "params"),
    [
        (384, 12, 6, 2, False, 83_467_776, 516_480),
        (384, 12, 10, 2, True, 77_697_536, 550_400),
        (512, 16, 14, 2, True, 135_550_464, 993_280),
        (768, 12, 10, 2, True, 298_296_320, 2_198_528),
        (384, 12, 12, 1, True, 4 * 196 * 384**2 + 2 * 196**2 * 384, 591_360),
    ],
)
def test_published_layers(
    width: int, heads: int, lo_heads: int, window: int, bias: bool, macs: int, params: int
) -> None:
    spec = HiLoBlock(heads=heads, lo_heads=lo_heads, window=window, qkv_bias=bias)
    counted = spec.attention_cost(FeatureShape(width, 14, 14))
    assert (counted.macs, counted.params) == (macs, params)
    module = HiLo(width, (14, 14), heads, lo_heads, window, qkv_bias=bias)
    assert sum(parameter.numel() for parameter in module.parameters()) == params
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module(torch.zeros(1, 196, width))
    assert counter.get_total_flops() == 2 * macs


def test_cost_of_a_layer_against_alpha() -> None:
    published = {0: 463.63, 0.1: 432.64, 0.25: 380.31, 0.5: 325.89, 0.75: 300.38, 0.9: 298.30}
    for alpha, millions in {**published, 1: 303.77}.items():
        spec = HiLoBlock(heads=12, lo_heads=lo_heads_of(12, alpha), window=2)
        assert round(spec.attention_cost(FeatureShape(768, 14, 14)).macs / 1e6, 2) == millions


def repository_macs(architecture: Architecture) -> int:
    """What the released code counts: norms, biases of convolutions, too many offsets as well."""
    total = cost(architecture).macs
    for part in walk(architecture):
        before, after = part.input, part.output
        if part.kind == "stem":
            total += after.channels * after.positions
            total += architecture.widths[-1] * after.positions // 16
        elif part.kind == "block":
            norms = 2 if part.spec.type == "hilo" else 1
            total += (norms * before.channels + part.spec.ffn_dim) * before.positions
        elif part.kind == "downsample":
            total += 2 * after.channels * after.positions
            if part.spec.deformable:
                total += (4 * before.channels * 4 + 12) * after.positions
    return total


def test_every_built_in_litv2_is_counted() -> None:
    assert [name for name in builtin_names() if name.startswith("litv2")] == NAMES


@pytest.mark.parametrize(
    ("name", "side", "plain", "deformable", "published"),
    [
        ("litv2_s", 224, (27.822, 3.728), (27.844, 3.734), (28, 3.7)),
        ("litv2_m", 224, (48.809, 7.473), (48.830, 7.479), (49, 7.5)),
        ("litv2_b", 224, (86.492, 13.185), (86.521, 13.194), (87, 13.2)),
        ("litv2_b", 384, (86.492, 39.685), (86.521, 39.709), (87, 39.7)),
    ],
)
def test_published_models(
    name: str,
    side: int,
    plain: tuple[float, float],
    deformable: tuple[float, float],
    published: tuple[float, float],
) -> None:
    shipped = get(name).architecture.with_resolution(side)
    assert shipped == varied(shipped, deformable=False)
    for architecture, wanted in ((shipped, plain), (varied(shipped), deformable)):
        counted = cost(architecture)
        assert round(counted.params / 1e6, 3) == wanted[0]
        assert round(repository_macs(architecture) / 1e9, 3) == wanted[1]
        assert counted.macs == pytest.approx(repository_macs(architecture), rel=0.003)
        assert round(repository_macs(architecture) / 1e9, 1) == published[1]
    assert round(counted.params / 1e6) == published[0]


@pytest.mark.parametrize(
    ("third", "fourth", "published"),
    [
        ({}, {}, {224: 3.73, 384: 11.23, 512: 20.48, 640: 33.07, 1024: 96.4}),
        ({"window": 4}, {}, {224: 3.78, 512: 19.46, 1024: 83.25}),
        (
            {"lo_heads": 12, "window": 1},
            {},
            {224: 4.14, 384: 13.21, 512: 25.69, 640: 44.56, 1024: 163.2},
        ),
        (
            {"lo_heads": 0, "window": 7},
            {"lo_heads": 0, "window": 7},
            {224: 4.01},  # the others are no whole windows
        ),
    ],
    ids=["HiLo", "HiLo, window 4", "MSA", "W-MSA"],
)
def test_costs_at_other_resolutions(
    third: dict[str, Any], fourth: dict[str, Any], published: dict[int, float]
) -> None:
    architecture = varied(get("litv2_s").architecture, third=third, fourth=fourth)
    for side, giga in published.items():
        digits = len(str(giga).split(".")[1])
        counted = repository_macs(architecture.with_resolution(side)) / 1e9
        assert round(counted, digits) == giga, side


def test_costs_against_alpha() -> None:
    published = {
        0: (3.965, 28.09),
        0.2: (3.881, 27.84),
        0.4: (3.815, 27.70),
        0.5: (3.769, 27.65),
        0.7: (3.742, 27.70),
        0.9: (3.734, 27.84),
        1: (3.746, 28.09),
    }
    for alpha, (giga, millions) in published.items():
        third = {"lo_heads": lo_heads_of(12, alpha)}
        architecture = varied(get("litv2_s").architecture, third=third)
        assert round(repository_macs(architecture) / 1e9, 3) == giga
        assert round(cost(architecture).params / 1e6, 2) == millions


class Outputs(TorchDispatchMode):
    """Counts the elements that convolutions, linear layers and attention products write."""

    elements = 0
    names = ("mm", "addmm", "bmm", "convolution")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.names:
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("deformable", [False, True])
def test_counted_as_computed(deformable: bool) -> None:
    draw, compared = random.Random(0), 0
    for size in ((64, 64), (72, 88), (120, 52), (33, 68)):
        blocks = []
        for _ in range(2):
            heads = draw.choice([1, 2, 3, 4, 6])
            window = draw.choice([1, 2, 3])
            block = {"type": "hilo", "heads": heads, "window": window}
            block["lo_heads"] = heads if window == 1 else draw.randint(0, heads)
            block |= {"ffn": draw.choice(["conv", "mlp"]), "qkv_bias": draw.choice([True, False])}
            blocks.append({**block, "ffn_dim": draw.randint(1, 50)})
        architecture = litv2_architecture(size, deformable=deformable, blocks=blocks)
        network = build(architecture).eval()
        assert measured_macs(network) == cost(architecture).macs
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Outputs() as outputs:
            network(images(size, count=1))
        assert 4 * outputs.elements == cost(architecture).activation_bytes
        for component in walk(architecture):
            module = network.get_submodule(component.name)
            params = sum(parameter.numel() for parameter in module.parameters())
            assert component_cost(component).params == params, component
            compared += 1
    assert compared == 4 * (1 + 3 + 5 + 1)


def test_shipped_structure() -> None:
    shipped = get("litv2_s").architecture
    assert (shipped.count("hilo"), shipped.count("conv_ffn")) == (8, 4)
    assert shipped.depths == (2, 2, 6, 2)
    assert {block.ffn_dim for block in shipped.stages[2].blocks} == {4 * 384}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"heads": 5}, r"stages\[2\]\.blocks\[0\]: heads must divide the width .*, 24, got 5"),
        ({"lo_heads": 5}, "lo_heads must be at most heads, 4, got 5"),
        ({"window": 1}, "lo_heads must be heads, 4, where window is 1.* got 3"),
        ({"window": 0}, "window: must be at least 1, got 0"),
        ({"heads": 0}, "heads: must be at least 1, got 0"),
        ({"ffn": "con"}, "ffn: must be 'conv' or 'mlp', got 'con' .did you mean 'conv'"),
        ({"qkv_bias": 1}, "qkv_bias: must be true or false"),
        ({"alpha": 0.9}, "alpha"),
    ],
)
def test_blocks_that_cannot_be(block: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        litv2_architecture(blocks=[{**ATTENTION, **block}])
    assert len(str(error.value).splitlines()) == 1


def test_maps_too_small_to_merge() -> None:
    with pytest.raises(SpecError, match=r"merges 2x2 tokens, got a map of 1x8; use a larger"):
        litv2_architecture((16, 128), blocks=[GLOBAL])


def test_round_trip() -> None:
    architecture = litv2_architecture(deformable=True, blocks=[ATTENTION, GLOBAL, ATTENTION])
    again = Architecture.from_yaml(architecture.to_yaml())
    assert again == architecture
    assert again.digest != litv2_architecture(blocks=[ATTENTION, GLOBAL, ATTENTION]).digest


@pytest.mark.parametrize("deformable", [False, True])
def test_a_device_model_counts_the_same_macs(deformable: bool) -> None:
    blocks = [ATTENTION, {**ATTENTION, "ffn": "mlp", "lo_heads": 0}, GLOBAL]
    small = litv2_architecture((76, 100), deformable=deformable, blocks=blocks)
    compared = 0
    for architecture in (small, *(varied(get(n).architecture) for n in NAMES)):
        found, counted = network_features(architecture), cost(architecture)
        assert found.macs == counted.macs
        assert found.weights < counted.params
        assert 4 * found.traffic_elements > counted.activation_bytes
        compared += 1
    assert compared == 4
