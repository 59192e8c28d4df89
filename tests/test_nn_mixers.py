"""The mechanisms against timm's, loops and Swin's, and their costs against counted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import efficientformer_v2, efficientvit_msra, metaformer, pvt_v2, twins
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.arch import mixers as specs
from slimnas.arch.architecture import Architecture
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import InputSizeError, SpecError
from slimnas.latency import price_key
from slimnas.nn.build import build
from slimnas.nn.fold import fold
from slimnas.nn.mixers import MAKERS, SelfAttention, make_mixer, works_on_maps
from slimnas.nn.resolution import adapt_state_dict
from slimnas.nn.swin import WindowAttention, Windows
from slimnas.runtimes.onnx_export import export_onnx

STUDY = FeatureShape(768, 14, 14)
"""The layer that LITv2's study compares mechanisms on."""

HEADS = {"heads": 3}
BLOCKS: list[dict[str, Any]] = [
    {"type": "mhsa", **HEADS},
    {"type": "window", **HEADS, "window": 5},
    {"type": "window", **HEADS, "window": 4, "shift": 2},
    {"type": "window", **HEADS, "window": 4, "shift": 1, "position_bias": True},
    {"type": "sra", **HEADS},
    {"type": "sra", **HEADS, "reduction": 1},
    {"type": "linear_sra", **HEADS},
    {"type": "tmsa", **HEADS, "part": "local"},
    {"type": "tmsa", **HEADS, "part": "global", "reduction": 4},
    {"type": "lka"},
    {"type": "cga", "heads": 2, "kernels": [5, 3]},
    {"type": "strided", **HEADS},
    {"type": "pool"},
]
NAMES = [" ".join(str(value) for value in block.values()) for block in BLOCKS]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=NAMES)


def network_of(*blocks: dict[str, Any], side: int = 56, width: int = 24) -> Architecture:
    """A network of one stage whose map has a quarter of the image's side."""
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "mixers",
            "input": {"resolution": side},
            "stem": {"type": "conv_stem", "width": width},
            "stages": [{"width": width, "blocks": list(blocks)}],
            "head": {"type": "linear", "classes": 5},
        }
    )


def spec_of(block: dict[str, Any], width: int = 24) -> specs.MixerBlock:
    spec = network_of(block, width=width).stages[0].blocks[0]
    assert isinstance(spec, specs.MixerBlock)
    return spec


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(0.3 * torch.randn(part.num_features, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=generator))
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.add_(noise / fan_in**0.5)
    return module


def random_input(spec: specs.MixerBlock, shape: FeatureShape, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator)
    return x if works_on_maps(spec) else x.flatten(2).transpose(1, 2)


class Counter(TorchDispatchMode):
    """Counts multiply-adds and output elements of convolutions and products of matrices."""

    macs = outputs = axes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.axes = max(self.axes, out.dim())
        name = func.__name__.partition(".")[0]
        if name == "convolution":
            self._add(out, args[1][0].numel())
        elif name in ("mm", "bmm"):
            self._add(out, args[0].shape[-1])
        elif name in ("addmm", "baddbmm"):
            self._add(out, args[1].shape[-1])
        return out

    def _add(self, out: Tensor, terms: int) -> None:
        self.macs += out.numel() * terms
        self.outputs += out.numel()


def counted(module: nn.Module, x: Tensor) -> Counter:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        module(x)
    return counter


PUBLISHED = [
    pytest.param({"type": "mhsa", "heads": 12}, 521_428_992, 2_362_368, id="MSA"),
    pytest.param({"type": "window", "heads": 12}, 477_173_760, 2_362_368, id="W-MSA"),
    pytest.param({"type": "sra", "heads": 12}, 419_371_008, 4_723_968, id="SRA"),
    pytest.param({"type": "linear_sra", "heads": 12}, 332_666_880, 2_954_496, id="linear SRA"),
    pytest.param({"type": "tmsa", "heads": 12}, 477_173_760, 2_362_368, id="LSA"),
    pytest.param({"type": "tmsa", "heads": 12, "part": "global"}, 419_371_008, 4_723_968, id="GSA"),
    pytest.param({"type": "lka"}, 357_955_584, 1_830_144, id="LKA"),
    pytest.param({"type": "cga", "heads": 12}, 140_216_832, 673_164, id="CGA in windows of 7"),
    pytest.param(
        {"type": "cga", "heads": 12, "window": 14}, 167_876_352, 674_928, id="CGA, global"
    ),
    pytest.param({"type": "pool"}, 0, 0, id="pooling"),
]
"""Multiply-adds and parameters of single layers, as published (in M) and recounted from them."""


@pytest.mark.parametrize(("block", "macs", "params"), PUBLISHED)
def test_costs_of_the_studys_layers(block: dict[str, Any], macs: int, params: int) -> None:
    cost = spec_of(block, width=768).mixer_cost(STUDY)
    assert (cost.macs, cost.params) == (macs, params)


def test_costs_as_printed() -> None:
    costs = {case.id: case.values[1:] for case in PUBLISHED}
    in_m = {
        name: (round(macs / 1e6, 2), round(params / 1e6, 3))
        for name, (macs, params) in costs.items()
    }
    assert in_m["MSA"] == (521.43, 2.362)
    assert in_m["W-MSA"] == (477.17, 2.362)
    assert in_m["SRA"] == (419.37, 4.724)
    assert in_m["linear SRA"] == (332.67, 2.954)
    assert in_m["LKA"] == (357.96, 1.830)
    assert round((costs["LSA"][0] + costs["GSA"][0]) / 2e6, 1) == 448.3
    assert round(costs["CGA in windows of 7"][0] / 1e6, 1) == 140.2
    assert round(costs["CGA, global"][0] / 1e6, 1) == 167.9


@every_block
@pytest.mark.parametrize("ffn", ["mlp", "conv"])
def test_costs_are_what_runs(block: dict[str, Any], ffn: str) -> None:
    architecture = network_of({**block, "ffn": ffn, "ffn_dim": 36})
    component = next(part for part in walk(architecture) if part.kind == "block")
    spec = component.spec
    assert isinstance(spec, specs.MixerBlock)
    module = build(architecture).stages[0].blocks[0].eval()  # type: ignore[index, union-attr]
    for part, cost in (
        (module, component_cost(component)),
        (module.mixer, spec.mixer_cost(component.input)),
    ):
        seen = counted(part, random_input(spec, component.input, batch=1))
        assert cost.params == sum(parameter.numel() for parameter in part.parameters())
        assert cost.macs == seen.macs
        assert cost.activation_bytes == 4 * seen.outputs
        assert seen.axes <= 4


def test_every_type_is_looked_at() -> None:
    assert {type(spec_of(block)) for block in BLOCKS} == set(MAKERS)
    assert len(MAKERS) == 9


def test_head_dimensions_hold_while_the_width_changes() -> None:
    given = {"heads": 3, "qk_dim": 5, "v_dim": 7}
    for kind in ("mhsa", "window", "sra", "linear_sra", "tmsa", "strided"):
        assert spec_of({"type": kind, "heads": 3}).dims(24) == (8, 8)  # type: ignore[attr-defined]
        spec = spec_of({"type": kind, **given}, width=32)
        assert spec.dims(32) == (5, 7)  # type: ignore[attr-defined]
        mixer = make_mixer(spec, FeatureShape(32, 8, 8)).eval()
        x = random_input(spec, FeatureShape(32, 8, 8))
        assert mixer(x).shape == x.shape


GRIDS = [(8, 8), (12, 6), (7, 7), (15, 10)]


def timm_state(theirs: nn.Module, **renamed: str) -> dict[str, Tensor]:
    """Weights by our names, modules renamed as given: old="new"."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            if name.startswith(f"{old}."):
                name = f"{new}.{name.removeprefix(f'{old}.')}"
                break
        state[name] = tensor
    return state


def assert_same(
    ours: nn.Module, theirs: nn.Module, x: Tensor, *extra: Any, double: float = 1e-10
) -> None:
    compared = 0
    for training in (False, True):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, double)):
            ours.to(dtype).train(training)
            theirs.to(dtype).train(training)
            with torch.no_grad():
                expected, got = theirs(x.to(dtype), *extra), ours(x.to(dtype))
            assert expected.std() > 0.05
            assert (got - expected).abs().max() < tolerance * max(1.0, float(expected.abs().max()))
            compared += 1
    assert compared == 4


def test_mhsa_as_timms() -> None:
    theirs = randomised(TimmAttention(24, num_heads=3, qkv_bias=True))
    spec = spec_of({"type": "mhsa", "heads": 3})
    ours = make_mixer(spec, FeatureShape(24, 5, 4))
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, random_input(spec, FeatureShape(24, 5, 4)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_spatial_reduction_as_timms(grid: tuple[int, int], reduction: int) -> None:
    theirs = randomised(pvt_v2.Attention(24, num_heads=3, sr_ratio=reduction))
    if reduction > 1:
        theirs.norm.eps = 1e-5  # PVT's; timm's own default is another
    spec = spec_of({"type": "sra", "reduction": reduction, "heads": 3})
    shape = FeatureShape(24, *grid)
    ours = make_mixer(spec, shape)
    ours.load_state_dict(timm_state(theirs, sr="reduce.conv", norm="reduce.norm"))
    assert_same(ours, theirs, random_input(spec, shape), grid)


@pytest.mark.parametrize("grid", [*GRIDS, (14, 21), (5, 3)])
def test_linear_spatial_reduction_as_timms(grid: tuple[int, int]) -> None:
    theirs = randomised(pvt_v2.Attention(24, num_heads=3, linear_attn=True))
    theirs.norm.eps = 1e-5
    spec, shape = spec_of({"type": "linear_sra", "heads": 3}), FeatureShape(24, *grid)
    ours = make_mixer(spec, shape)
    state = timm_state(theirs, sr="reduce.conv", norm="reduce.norm")
    # a 1x1 convolution there, a linear layer here
    state["reduce.conv.weight"] = state["reduce.conv.weight"].flatten(1)
    ours.load_state_dict(state)
    # overlapping averages are taken with weights of single precision
    exact = all(side % 7 == 0 for side in grid)
    assert_same(ours, theirs, random_input(spec, shape), grid, double=1e-10 if exact else 1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("part", ["local", "global"])
def test_parts_of_twins_as_timms(grid: tuple[int, int], part: str) -> None:
    theirs: nn.Module = (
        twins.LocallyGroupedAttn(24, num_heads=3, ws=4)
        if part == "local"
        else twins.GlobalSubSampleAttn(24, num_heads=3, sr_ratio=2)
    )
    randomised(theirs)
    spec = spec_of({"type": "tmsa", "heads": 3, "part": part, "window": 4})
    shape = FeatureShape(24, *grid)
    ours = make_mixer(spec, shape)
    ours.load_state_dict(timm_state(theirs, sr="reduce.conv", norm="reduce.norm"))
    assert_same(ours, theirs, random_input(spec, shape), grid)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (4, 10), (3, 3)])
def test_windows_as_swins_without_their_bias(grid: tuple[int, int], shift: int) -> None:
    shape = FeatureShape(24, *grid)
    spec = spec_of({"type": "window", "heads": 3, "window": 4, "shift": shift})
    assert isinstance(spec, specs.WindowBlock)
    windows = Windows.of(spec.swin(24), shape)
    theirs = WindowAttention(width=24, heads=3, qk_dim=8, v_dim=8, windows=windows)
    randomised(theirs)
    nn.init.zeros_(theirs.relative_position_bias_table)
    ours = make_mixer(spec, shape)
    assert isinstance(ours, SelfAttention)
    state = theirs.state_dict()
    del state["relative_position_bias_table"]
    ours.load_state_dict(state)
    assert_same(ours, theirs, random_input(spec, shape))


def test_windows_with_their_bias_are_swins() -> None:
    spec = spec_of({"type": "window", "heads": 3, "position_bias": True})
    assert type(make_mixer(spec, FeatureShape(24, 14, 14))) is WindowAttention


def test_pooling_as_timms() -> None:
    spec = spec_of({"type": "pool"})
    shape = FeatureShape(24, 6, 9)
    assert_same(make_mixer(spec, shape), metaformer.Pooling(), random_input(spec, shape))


def test_cascaded_group_attention_as_timms() -> None:
    theirs = efficientvit_msra.CascadedGroupAttention(
        24, key_dim=4, num_heads=3, attn_ratio=2, resolution=5, kernels=(5, 3, 3)
    )
    randomised(theirs)
    spec = spec_of({"type": "cga", "heads": 3, "qk_dim": 4, "kernels": [5, 3, 3]})
    shape = FeatureShape(24, 5, 5)
    ours = make_mixer(spec, shape)
    state = timm_state(theirs, **{"proj.1": "proj"})
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    assert_same(ours, theirs, random_input(spec, shape))


def test_strided_attention_as_timms() -> None:
    theirs = efficientformer_v2.Attention2d(
        24, key_dim=4, num_heads=3, attn_ratio=2, resolution=(8, 6), stride=2
    )
    randomised(theirs)
    spec = spec_of({"type": "strided", "heads": 3, "qk_dim": 4, "v_dim": 8})
    shape = FeatureShape(24, 8, 6)
    ours = make_mixer(spec, shape)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, random_input(spec, shape))


def test_large_kernels_by_loops() -> None:
    spec, shape = spec_of({"type": "lka"}, width=2), FeatureShape(2, 6, 5)
    module: Any = randomised(make_mixer(spec, shape)).double()
    x = random_input(spec, shape, batch=1).double()

    def depthwise(layer: nn.Conv2d, image: Tensor, spacing: int) -> Tensor:
        half = layer.weight.shape[-1] // 2
        out = torch.zeros_like(image)
        for c in range(2):
            for y in range(6):
                for z in range(5):
                    total = layer.bias[c].clone()  # type: ignore[index]
                    for i in range(-half, half + 1):
                        for j in range(-half, half + 1):
                            row, column = y + spacing * i, z + spacing * j
                            if 0 <= row < 6 and 0 <= column < 5:
                                weight = layer.weight[c, 0, i + half, j + half]
                                total += weight * image[c, row, column]
                    out[c, y, z] = total
        return out

    def pointwise(layer: nn.Conv2d, image: Tensor) -> Tensor:
        mixed = torch.einsum("oc,chw->ohw", layer.weight.flatten(1), image)
        assert layer.bias is not None
        return mixed + layer.bias.view(-1, 1, 1)

    with torch.no_grad():
        seen = nn.functional.gelu(pointwise(module.proj_1, x[0]))
        far = depthwise(module.far, depthwise(module.near, seen, 1), 3)
        expected = pointwise(module.proj_2, seen * pointwise(module.point, far)) + x[0]
        got = module(x)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected)


@every_block
@pytest.mark.parametrize("ffn", ["mlp", "conv"])
def test_blocks_are_two_residual_sublayers(block: dict[str, Any], ffn: str) -> None:
    architecture = network_of({**block, "ffn": ffn})
    module: Any = randomised(build(architecture)).stages[0].blocks[0].eval()  # type: ignore[index, union-attr]
    spec = spec_of(block)
    x = random_input(spec, FeatureShape(24, 14, 14))
    with torch.no_grad():
        y = x + module.mixer(module.norm1(x))
        expected = y + module.mlp(module.norm2(y))
        assert torch.equal(module(x), expected)
        assert (expected - x).std() > 0.1
    assert isinstance(module.norm1, nn.Identity) == (block["type"] in ("cga", "strided"))


@every_block
@pytest.mark.parametrize("ffn", ["mlp", "conv"])
def test_folding_and_export_keep_the_outputs(
    block: dict[str, Any], ffn: str, tmp_path: Path
) -> None:
    network = randomised(build(network_of({**block, "ffn": ffn, "ffn_dim": 20}))).eval()
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    folded = fold(network)
    with torch.no_grad():
        expected, got = network(x), folded(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    statistics = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(statistics) == (block["type"] in ("lka", "pool"))
    difference = export_onnx(folded, x, tmp_path / "mixer.onnx", reference=network)
    assert difference < 1e-3


def test_files_say_everything() -> None:
    architecture = network_of(*BLOCKS)
    again = Architecture.from_yaml(architecture.to_yaml())
    assert again == architecture
    keys = {str(price_key(part)) for part in walk(architecture) if part.kind == "block"}
    assert len(keys) == len(BLOCKS)
    assert any("kernels=5-3" in key for key in keys)
    assert any("part=global" in key for key in keys)


REFUSED = [
    ({"type": "mhsa", "heads": 5}, r"blocks\[0\]: heads must divide the stage's width, 24, got 5"),
    ({"type": "strided", "heads": 5}, r"heads must divide the stage's width, 24, got 5"),
    ({"type": "cga", "heads": 5}, r"heads: must divide the stage's width, 24.*got 5"),
    ({"type": "cga", "heads": 3, "kernels": [5, 3]}, r"one side for all heads or one per head"),
    ({"type": "cga", "heads": 3, "kernels": [4]}, r"must be odd"),
    ({"type": "sra", "heads": 3, "reduction": 15}, r"reduction must be at most .* got 15 on 14x14"),
    ({"type": "tmsa", "heads": 3, "part": "global", "reduction": 15}, r"reduction must be at most"),
    ({"type": "tmsa", "heads": 3, "part": "locale"}, r"did you mean 'local'"),
    ({"type": "window", "heads": 3, "shift": 7}, r"shift must be less than the window, 7, got 7"),
    ({"type": "linear-sra", "heads": 3}, r"did you mean 'linear_sra'"),
    ({"type": "pool", "heads": 3}, r"unknown key 'heads'"),
    ({"type": "mhsa", "heads": 3, "qk_dim": 0}, r"qk_dim: must be at least 1"),
]


@pytest.mark.parametrize(("block", "message"), REFUSED)
def test_what_no_block_can_be_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        network_of(block)
    assert len(str(caught.value).splitlines()) == 1


def test_strided_attention_needs_even_sides() -> None:
    with pytest.raises(SpecError, match=r"blocks\[0\].*sides are even, got 15x15"):
        network_of({"type": "strided", "heads": 3}, side=60)


@every_block
def test_another_map_is_refused_by_name(block: dict[str, Any]) -> None:
    network = build(network_of(block)).eval()
    x = torch.zeros(1, 3, 64, 64)
    if block["type"] in ("lka", "pool"):
        assert network(x).shape == (1, 5)
        return
    with pytest.raises(InputSizeError, match="built for 56x56 images, got 64x64"):
        network(x)
    spec = spec_of(block)
    with pytest.raises(InputSizeError, match=r"14x14"):
        make_mixer(spec, FeatureShape(24, 14, 14))(random_input(spec, FeatureShape(24, 16, 16)))


@every_block
def test_weights_move_to_another_resolution(block: dict[str, Any]) -> None:
    source = network_of(block)
    target = source.with_resolution((48, 80))
    adapted = adapt_state_dict(randomised(build(source)).state_dict(), source=source, target=target)
    network = build(target)
    network.load_state_dict(adapted)
    assert network.eval()(torch.zeros(1, 3, 48, 80)).isfinite().all()
