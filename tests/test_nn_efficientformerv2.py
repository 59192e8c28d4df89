"""EfficientFormerV2's modules: timm's outputs, closed forms of their cost, folding, resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from efficientformerv2_cases import (
    NAMES,
    images,
    published_timm,
    randomised,
    small_architecture,
    small_timm,
    with_weights_of,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.efficientformerv2 import V2FFN, V2Attention, V2AttentionDownsample
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import InputSizeError, SpecError
from slimnas.latency.features import network_features
from slimnas.latency.keys import price_keys
from slimnas.latency.points import POINTS_FILE, load_points
from slimnas.nn.build import build, build_features, make_module
from slimnas.nn.efficientformerv2 import LocalGlobalQuery, V2Head
from slimnas.nn.fold import fold
from slimnas.nn.layers import LayerScale
from slimnas.nn.resolution import adapt_state_dict
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.registry import builtin_names, get

SIZES = [(64, 96), (96, 64), (32, 64), (120, 216)]
"""The last is no multiple of 32, but its third stage still has even sides, 8x14."""

COSTS = {
    "efficientformerv2_s0": (3_600_256, 395_892_544),
    "efficientformerv2_s1": (6_185_560, 651_969_640),
    "efficientformerv2_s2": (12_710_112, 1_246_863_952),
    "efficientformerv2_l": (26_322_288, 2_552_546_880),
}
POINTS = Path(__file__).parent.parent / "lookup_tables" / "iphone12-ios16" / POINTS_FILE


# timm's outputs


@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "one head"])
@pytest.mark.parametrize("size", SIZES)
def test_same_outputs_as_timm(size: tuple[int, int], distilled: bool) -> None:
    reference = small_timm(size, distilled=distilled)
    network = with_weights_of(reference, small_architecture(size, distilled=distilled))
    x = images(size, count=3)
    compared = 0
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        for training in (False, True):
            reference.to(dtype)
            reference.train(training)  # timm's train() returns None, so it cannot be chained
            network.to(dtype).train(training)
            with torch.no_grad():
                theirs, ours = reference(x.to(dtype)), network(x.to(dtype))
            pair = training and distilled
            assert isinstance(ours, tuple) == pair
            for got, wanted in zip(*((ours, theirs) if pair else ([ours], [theirs])), strict=True):
                assert (wanted[0] - wanted[1]).abs().max() > 0.01
                assert (got - wanted).abs().max() < tolerance
                compared += 1
    assert compared == (6 if distilled else 4)


def test_gradients_as_timms() -> None:
    reference = small_timm().double()
    architecture = small_architecture()
    network = with_weights_of(reference, architecture)
    x = images((64, 96)).double()
    for model in (reference, network):
        model.train()
        sum(logits.square().sum() for logits in model(x)).backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    expected = convert_state_dict({**reference.state_dict(), **theirs}, architecture)
    compared = 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9, msg=name)
        compared += bool(parameter.grad.abs().max() > 1e-6)
    assert compared > 80


def test_feature_maps_as_timms() -> None:
    reference = small_timm().double()
    reference.eval()
    network = with_weights_of(reference, small_architecture()).eval()
    x = images((64, 96)).double()
    with torch.no_grad():
        theirs = reference.forward_intermediates(x, intermediates_only=True)
        ours = network.forward_features(x)
    sizes = [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6), (2, 24, 2, 3)]
    assert [tuple(out.shape) for out in ours] == sizes
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_backbones(name: str) -> None:
    for side in (224, 512):
        architecture = get(name).architecture.with_resolution(side)
        with torch.device("meta"):
            maps = build_features(architecture)(torch.empty(1, 3, side, side))
        expected = [
            (1, width, side // stride, side // stride)
            for width, stride in zip(architecture.widths, (4, 8, 16, 32), strict=True)
        ]
        assert [tuple(out.shape) for out in maps] == expected


# Costs


class Counter(TorchDispatchMode):
    """Counts multiply-adds and output elements of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.elements = self.axes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(out, Tensor):
            self.axes = max(self.axes, out.dim())
        inner = 0
        if name == "convolution":
            inner = args[1][0].numel()
        elif name in ("addmm", "mm", "bmm"):
            inner = args[-2].shape[-1]
        if inner:
            self.macs += inner * out.numel()
            self.elements += out.numel()
        return out


def counted(module: nn.Module, *shape: int) -> Counter:
    with torch.no_grad(), Counter() as counter:
        module.eval()(torch.empty(shape, device="meta"))
    return counter


@pytest.mark.parametrize("name", NAMES)
def test_published_costs(name: str) -> None:
    architecture = get(name).architecture
    with torch.device("meta"):
        network = build(architecture)
    report, counter = cost(architecture), counted(network, 1, 3, 224, 224)
    assert (report.params, report.macs) == COSTS[name]
    assert sum(parameter.numel() for parameter in network.parameters()) == COSTS[name][0]
    assert counter.macs == COSTS[name][1]
    assert report.activation_bytes == 4 * counter.elements
    assert counter.axes == 4
    compared = 0
    for component in walk(architecture):
        module, shape = network.get_submodule(component.name), component.input
        expected = component_cost(component)
        counter = counted(module, 1, shape.channels, shape.height, shape.width)
        assert expected.params == sum(parameter.numel() for parameter in module.parameters())
        assert (expected.macs, expected.activation_bytes) == (counter.macs, 4 * counter.elements)
        compared += 1
    assert compared == sum(architecture.depths) + 5


def test_without_heads() -> None:
    """Parameters with one classifier, and of the backbone and its last norm alone."""
    found = {}
    for name in NAMES:
        architecture = get(name).architecture
        single = architecture.with_head(distilled=False)
        classifier = (single.widths[-1] + 1) * 1000
        found[name] = (cost(single).params, cost(single).params - classifier)
    assert found == {
        "efficientformerv2_s0": (3_423_256, 3_246_256),
        "efficientformerv2_s1": (5_960_560, 5_735_560),
        "efficientformerv2_s2": (12_421_112, 12_132_112),
        "efficientformerv2_l": (25_937_288, 25_552_288),
    }


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (6, 10)])
@pytest.mark.parametrize("width", [96, 144])
def test_published_closed_forms(width: int, grid: tuple[int, int]) -> None:
    """Per block, as functions of the width alone: heads and their dimensions do not grow."""
    shape = FeatureShape(width, *grid)
    high, wide = grid
    for ratio in (3, 4):
        hidden = ratio * width
        ffn = V2FFN(ffn_dim=hidden).cost(shape)
        assert ffn.params == 2 * width * hidden + 15 * hidden + 4 * width
        assert ffn.macs == (2 * width * hidden + 9 * hidden) * high * wide
    for stride in (1, 2):
        tokens = -(-high // stride) * -(-wide // stride)
        attention = V2Attention(stride=stride).attention_cost(shape)
        params = 2 * (256 * width + 768) + (1024 * width + 3072) + 12_288 + 144
        params += (1024 * width + 3 * width) + 8 * tokens + width
        macs = tokens * (1536 * width + 9216) + 1408 * tokens**2 + 1024 * width * high * wide
        if stride == 2:
            params, macs = params + 12 * width, macs + 9 * width * tokens
        assert (attention.params, attention.macs) == (params, macs)
    wider = width + 80
    down = V2AttentionDownsample().cost(shape, wider)
    params = (10 * width + 128 * width + 384) + (128 * width + 384) + (512 * width + 1536) + 6144
    params += (512 * wider + 3 * wider) + 8 * high * wide + (9 * width * wider + 3 * wider)
    assert down.params == params


def test_heads_may_differ() -> None:
    """The closed forms hold for other heads, too."""
    data = small_architecture().to_dict()
    narrow = {"heads": 3, "qk_dim": 5, "v_dim": 7}
    data["stages"][2]["blocks"][1].update(narrow)
    data["stages"][3]["downsample"].update({"heads": 2, "qk_dim": 3, "v_dim": 9})
    architecture = Architecture.from_dict(data)
    for component in walk(architecture):
        module, shape = make_module(component), component.input
        expected = component_cost(component)
        counter = counted(module.to("meta"), 1, shape.channels, shape.height, shape.width)
        assert expected.params == sum(parameter.numel() for parameter in module.parameters())
        assert (expected.macs, expected.activation_bytes) == (counter.macs, 4 * counter.elements)


def test_devices_are_fitted_on_the_same_counts() -> None:
    """The phone's points were traced through timm's networks, ours are counted by closed form."""
    points = {point.name: point for point in load_points(POINTS)}
    for name in NAMES:
        assert network_features(get(name).architecture) == points[name].features, name


def test_both_classifiers_have_one_price() -> None:
    for name in NAMES:
        architecture = get(name).architecture
        single = architecture.with_head(distilled=False)
        keys = [[k for part in walk(a) for k in price_keys(part)] for a in (architecture, single)]
        assert keys[0] == keys[1]
        assert len(set(keys[0])) < len(keys[0])
        assert any("stride=2" in str(key) for key in keys[0])


# Folding


@pytest.mark.parametrize("size", SIZES)
def test_folding_changes_nothing(size: tuple[int, int]) -> None:
    network = randomised(build(small_architecture(size)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = fold(network)
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    x = images(size)
    with torch.inference_mode():
        expected, got = network.eval()(x), folded(x)
        assert (expected[0] - expected[1]).abs().max() > 0.01
        assert (got - expected).abs().max() < 1e-5
        assert torch.equal(fold(folded)(x), got)
        double = fold(network.double())(x.double())
        assert (double - network(x.double())).abs().max() < 1e-12
    assert not any(isinstance(part, (nn.BatchNorm2d, LayerScale)) for part in folded.modules())
    names = [name for name, _ in folded.named_parameters()]
    left = ("gamma", "attention_biases")
    assert not [name for name in names if "head_dist" in name or name.endswith(left)]
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folding_published_networks(name: str) -> None:
    network = randomised(build(get(name).architecture)).eval()
    x = images((224, 224))
    with torch.inference_mode():
        expected = network(x)
        assert (expected[0] - expected[1]).abs().max() > 0.1
        assert (fold(network)(x) - expected).abs().max() < 1e-5


def test_folded_networks_gather_nothing() -> None:
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    folded, x = fold(build(small_architecture())), images((64, 96))
    with torch.no_grad(), Names():  # inference mode would keep operators together
        folded(x)
    assert "index" not in seen
    assert "native_batch_norm" not in seen
    assert "mul" not in seen
    assert seen.count("bmm") == 6


def test_a_query_is_its_position_and_what_lies_around_it() -> None:
    query = LocalGlobalQuery(width_in=2, width_out=3).double()
    with torch.no_grad():
        query.local.weight.zero_()
        query.local.bias.zero_()
        query.proj.conv.bias.zero_()
        query.proj.conv.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]])[..., None, None])
        query.eval()
        x = torch.arange(30, dtype=torch.double).reshape(1, 2, 3, 5)
        picked = x[:, :, ::2, ::2]
        expected = torch.cat([picked, picked.sum(1, keepdim=True)], dim=1) / (1 + 1e-5) ** 0.5
        torch.testing.assert_close(query(x), expected)
        torch.testing.assert_close(fold(query)(x), expected)


@pytest.mark.parametrize("distilled", [True, False])
def test_the_head_takes_tokens_too(distilled: bool) -> None:
    head = V2Head(width=6, classes=4, distilled=distilled)
    randomised(head)
    x = torch.randn(3, 6, 2, 5)
    tokens = x.flatten(2).transpose(1, 2)
    for mode in (False, True):
        head.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(head(x), head(tokens))
    head.eval()
    with torch.no_grad():
        both = [head.head] if head.head_dist is None else [head.head, head.head_dist]
        by_hand = sum(layer(head.norm(x).mean(dim=(2, 3))) for layer in both) / len(both)
        torch.testing.assert_close(head(x), by_hand)


# Export


@pytest.mark.parametrize("folds", [True, False], ids=["folded", "as trained"])
@pytest.mark.parametrize("size", [(64, 96), (120, 216)])
def test_exports_to_onnx(size: tuple[int, int], folds: bool, tmp_path: Path) -> None:
    network = randomised(build(small_architecture(size))).eval()
    module = fold(network) if folds else network
    difference = export_onnx(
        module, images(size, 1), tmp_path / "v2.onnx", reference=network, dynamic_batch=True
    )
    assert difference < 1e-5


# Other sizes of images


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_cannot_be_taken(name: str) -> None:
    architecture = get(name).architecture
    for size, grid in ((240, "15x15"), ((224, 336), "14x21")):
        with pytest.raises(SpecError) as caught:
            architecture.with_resolution(size)
        message = str(caught.value)
        assert "\n" not in message
        assert f"takes maps whose sides are even, got {grid};" in message
        assert message.endswith("multiples of 32")
    for side in (192, 256, 384, 512):
        assert architecture.with_resolution(side).input.resolution == side


def test_another_image_size_is_refused() -> None:
    network = build(small_architecture())
    with pytest.raises(InputSizeError, match=r"built for 64x96 images, got 96x64"):
        network(images((96, 64)))
    block = network.get_submodule("stages.2.blocks.1")
    with pytest.raises(InputSizeError, match=r"built for maps of 4x6, got 6x4"):
        block(torch.zeros(1, 16, 6, 4))
    downsample = network.get_submodule("stages.3.downsample")
    with pytest.raises(InputSizeError, match=r"built for maps of 4x6, got 4x4"):
        downsample(torch.zeros(1, 16, 4, 4))


def test_bias_tables_move_to_other_sizes() -> None:
    source, target = small_architecture((64, 96)), small_architecture((128, 64))
    state = randomised(build(source)).state_dict()
    adapted = adapt_state_dict(state, source=source, target=target)
    build(target).load_state_dict(adapted)
    changed = {
        name: tuple(adapted[name].shape) for name in state if adapted[name] is not state[name]
    }
    assert changed == {
        "stages.2.blocks.1.token_mixer.attention_biases": (8, 4 * 2),  # after its stride
        "stages.3.downsample.attn.attention_biases": (8, 8 * 4),
        "stages.3.blocks.1.token_mixer.attention_biases": (8, 4 * 2),
    }
    for name in changed:
        torch.testing.assert_close(adapted[name][:, 0], state[name][:, 0])  # offset zero


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"), [("efficientformerv2_s0", 192), ("efficientformerv2_s1", 256)]
)
def test_published_models_at_other_sizes(name: str, side: int) -> None:
    reference = published_timm(name, img_size=side)
    reference.eval()
    network = with_weights_of(reference, get(name).architecture.with_resolution(side)).eval()
    x = images((side, side), 1)
    with torch.inference_mode():
        theirs, ours = reference(x), network(x)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


def test_every_built_in_model_is_compared() -> None:
    assert [name for name in builtin_names() if name.startswith("efficientformerv2")] == NAMES
    assert set(COSTS) == set(NAMES)
