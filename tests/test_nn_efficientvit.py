"""EfficientViT: timm's outputs, its attention pair by pair, and the closed forms of its cost."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from efficientvit_cases import (
    NAMES,
    efficientvit,
    images,
    like_timms,
    off,
    randomised,
    small_timm,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.efficientvit import EfficientViTBlock as BlockSpec
from slimnas.arch.efficientvit import EfficientViTStem
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import InputSizeError, SpecError, WeightsError
from slimnas.latency import price_keys
from slimnas.latency.keys import format_fields, parse_fields
from slimnas.nn.build import build, build_features, make_module
from slimnas.nn.efficientvit import BatchNormHead, CascadedGroupAttention, InteractionFFN
from slimnas.nn.fold import fold
from slimnas.nn.resolution import adapt_state_dict
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.registry import builtin_names, get
from tests.test_nn_build import counted

# Of the released code: parameters, those with every BatchNorm folded, and MACs in millions.
PUBLISHED = {
    "efficientvit_m0": (2_349_436, 2_334_916, 79.19),
    "efficientvit_m1": (2_980_560, 2_964_256, 167.05),
    "efficientvit_m2": (4_187_554, 4_168_338, 201.04),
    "efficientvit_m3": (6_900_722, 6_875_890, 262.66),
    "efficientvit_m4": (8_804_228, 8_776_340, 299.31),
    "efficientvit_m5": (12_473_772, 12_436_260, 521.58),
}
SIZES = [
    pytest.param(96, 3, id="6x6 in four windows, 3x3, 2x2"),
    pytest.param(64, 7, id="windows larger than every map"),
    pytest.param(80, 2, id="5x5 padded to 6x6"),
    pytest.param((80, 160), 3, id="5x10, 3x5, 2x3, padded along both sides"),
    pytest.param((160, 64), 4, id="10x4, 5x2, 3x1"),
    pytest.param((32, 96), 3, id="2x6, 1x3, 1x2"),
]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def compare(reference: nn.Module, network: nn.Module, x: Tensor) -> int:
    """Check that both give the same outputs in every mode; returns how many were compared.

    A BatchNorm of few values in training enlarges rounding, so the reference's own is allowed for.
    """
    compared = 0
    for training in (False, True):
        made = []
        for dtype in (torch.float64, torch.float32):
            reference.to(dtype).train(training)
            network.to(dtype).train(training)
            with torch.no_grad():
                made.append((network(x.to(dtype)), reference(x.to(dtype))))
        (ours, theirs), (rough, their_rough) = made
        rounding = off(their_rough, theirs)
        assert off(ours, theirs) < 1e-10
        assert off(rough, their_rough) < max(1e-5, 10 * rounding if training else 0)
        compared += len(made)
    return compared


@pytest.mark.parametrize(("size", "window"), SIZES)
def test_same_outputs_as_timm(size: int | tuple[int, int], window: int) -> None:
    reference, architecture = small_timm(size, window), like_timms(size, window)
    network = build(architecture)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    assert compare(reference, network, images(size, 4)) == 4


def test_every_built_in_efficientvit_is_compared() -> None:
    assert [name for name in builtin_names() if name.startswith("efficientvit")] == NAMES
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_published_models_as_timms(name: str) -> None:
    reference = randomised(timm.create_model(name))
    architecture = get(name).architecture
    network = build(architecture)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    assert compare(reference, network, images(224)) == 4


@pytest.mark.parametrize("size", [160, 256, (192, 320)])
@pytest.mark.parametrize(
    "name", ["efficientvit_m1", pytest.param("efficientvit_m3", marks=pytest.mark.slow)]
)
def test_published_models_at_other_resolutions(name: str, size: int | tuple[int, int]) -> None:
    reference = randomised(timm.create_model(name, img_size=size))
    architecture = get(name).architecture.with_resolution(size)
    network = build(architecture)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    assert compare(reference, network, images(size)) == 4


def test_gradients_as_timms() -> None:
    reference, architecture = small_timm((80, 160)).double(), like_timms((80, 160))
    network = build(architecture).double()
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images((80, 160), 3)
    for model in (reference, network):
        model(x).square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    statistics = {k: v for k, v in reference.state_dict().items() if k not in theirs}
    expected = convert_state_dict({**theirs, **statistics}, architecture)  # type: ignore[arg-type]
    compared = 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9)
        compared += 1
    assert compared == len(theirs) > 200


def test_feature_maps_as_timms() -> None:
    reference, architecture = small_timm((80, 160)).double().eval(), like_timms((80, 160))
    network = build_features(architecture).double().eval()
    state = convert_state_dict(reference.state_dict(), architecture)
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    x = images((80, 160))
    with torch.no_grad():
        theirs, ours = reference.forward_intermediates(x, intermediates_only=True), network(x)
    assert [tuple(out.shape) for out in ours] == [(2, 16, 5, 10), (2, 24, 3, 5), (2, 32, 2, 3)]
    assert [off(got, wanted) < 1e-10 for got, wanted in zip(ours, theirs, strict=True)] == [
        True
    ] * 3


def attention_by_hand(attention: CascadedGroupAttention, x: Tensor) -> Tensor:
    """The attention on a map (1, C, H, W), window by window and pair by pair."""
    rows, columns = x.shape[2:]
    side, share = min(attention.windows.side, rows, columns), x.shape[1] // attention.heads
    down, right = -rows % side, -columns % side
    padded = F.pad(x, (0, right, 0, down))
    out = torch.zeros_like(padded)
    for top in range(0, rows + down, side):
        for left in range(0, columns + right, side):
            window = padded[:, :, top : top + side, left : left + side]
            heads: list[Tensor] = []
            for head in range(attention.heads):
                seen = window[:, head * share : (head + 1) * share]
                if attention.cascade and heads:
                    seen = seen + heads[-1]
                qkv = attention.qkvs[head](seen)
                q = attention.dws[head](qkv[:, : attention.qk_dim])[0]
                k = qkv[0, attention.qk_dim : 2 * attention.qk_dim]
                v = qkv[0, 2 * attention.qk_dim :]
                given = torch.zeros_like(v)
                places = [(i, j) for i in range(side) for j in range(side)]
                for i, j in places:
                    logits = torch.stack(
                        [
                            q[:, i, j] @ k[:, m, n] / attention.qk_dim**0.5
                            + attention.attention_biases[head, abs(i - m) * side + abs(j - n)]
                            for m, n in places
                        ]
                    )
                    given[:, i, j] = v.flatten(1) @ logits.softmax(0)
                heads.append(given[None])
            mixed = attention.proj(torch.cat(heads, 1).clamp(min=0))
            out[:, :, top : top + side, left : left + side] = mixed
    return out[:, :, :rows, :columns]


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize(
    ("grid", "window"),
    [((3, 3), 7), ((4, 4), 2), ((3, 5), 2), ((2, 5), 4), ((6, 4), 3), ((3, 3), 1)],
)
def test_attention_pair_by_pair(grid: tuple[int, int], window: int, cascade: bool) -> None:
    torch.manual_seed(0)
    attention = CascadedGroupAttention(
        width=6,
        grid=grid,
        heads=3,
        qk_dim=4,
        v_dim=2 if cascade else 5,
        kernels=(1, 3, 5),
        window=window,
        cascade=cascade,
    )
    randomised(attention).double().eval()
    x = torch.randn(2, 6, *grid, dtype=torch.float64)
    with torch.no_grad():
        ours, folded = attention(x), fold(attention)(x)
        expected = torch.cat([attention_by_hand(attention, image[None]) for image in x])
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-12
    assert (folded - expected).abs().max() < 1e-12


def test_one_head_sees_all_channels() -> None:
    attention = CascadedGroupAttention(
        width=4, grid=(3, 3), heads=1, qk_dim=2, v_dim=4, kernels=(3,), window=7
    )
    randomised(attention).double().eval()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (attention(x) - attention_by_hand(attention, x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_published_costs(name: str) -> None:
    architecture = get(name).architecture
    shape = architecture.input.shape
    with torch.device("meta"):
        network = build(architecture).eval()
        x = torch.empty(1, shape.channels, shape.height, shape.width)
        params, macs, activation_bytes = counted(network, x)
    assert (params, round(macs / 1e6, 2)) == (PUBLISHED[name][0], PUBLISHED[name][2])
    report = cost(architecture)
    assert (report.params, report.macs) == (params, macs)
    assert report.activation_bytes == activation_bytes


def random_efficientvit(seed: int) -> Architecture:
    """Any widths, heads, windows and numbers of FFNs, cascaded or not, on any image."""
    draw = random.Random(seed)
    stages, widths = [], []
    for index in range(draw.randint(1, 3)):
        heads = draw.randint(1, 4)
        widths.append(heads * draw.randint(1, 8) if index else 8 * draw.randint(1, 4) * heads)
        cascade = draw.random() < 0.5
        block: dict[str, Any] = {"heads": heads, "qk_dim": draw.randint(1, 9), "cascade": cascade}
        block["kernels"] = [draw.choice([1, 3, 5, 7]) for _ in range(heads)]
        block |= {"window": draw.randint(1, 8), "ffns": draw.randint(1, 3)}
        block["repeat"] = draw.randint(1, 2)
        if not cascade:
            block["v_dim"] = draw.randint(1, 9)
        if draw.random() < 0.5:
            block["ffn_dim"] = draw.randint(1, 40)
        stages.append([block])
    names = ("before_dim", "after_dim", "inner_dim", "se_dim")
    downsample = {name: draw.randint(1, 30) for name in names if draw.random() < 0.5}
    return efficientvit(
        image=(draw.randint(17, 150), draw.randint(17, 150)),
        stages=stages,
        widths=tuple(widths),
        downsample=downsample,
        distilled=seed % 2 == 0,
    )


@pytest.mark.parametrize("seed", range(12))
def test_counts_of_random_architectures(seed: int) -> None:
    architecture = random_efficientvit(seed)
    image = architecture.input.shape
    with torch.device("meta"):
        whole = counted(build(architecture).eval(), torch.empty(1, 3, image.height, image.width))
    report = cost(architecture)
    assert (report.params, report.macs, report.activation_bytes) == whole
    for component in walk(architecture):
        shape = component.input
        with torch.device("meta"):
            module = make_module(component).eval()
            found = counted(module, torch.empty(1, shape.channels, shape.height, shape.width))
        formula = component_cost(component)
        assert (formula.params, formula.macs, formula.activation_bytes) == found, component.name


@pytest.mark.parametrize("seed", range(4))
def test_files_give_the_network_back(seed: int) -> None:
    architecture = random_efficientvit(seed)
    again = Architecture.from_yaml(architecture.to_yaml())
    assert again == architecture
    assert again.to_yaml() == architecture.to_yaml()


@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_nothing(name: str) -> None:
    network = randomised(build(get(name).architecture)).eval()
    folded = fold(network)
    x = images(224).float()
    with torch.inference_mode():
        expected, got = network(x), folded(x)
        assert off(got, expected) < 1e-5
        assert torch.equal(fold(folded)(x), got)
    assert not any(isinstance(part, NORMS) for part in folded.modules())
    assert sum(parameter.numel() for parameter in folded.parameters()) == PUBLISHED[name][1]
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_folding_random_architectures(seed: int) -> None:
    architecture = random_efficientvit(seed)
    network = randomised(build(architecture)).double().eval()
    folded = fold(network)
    shape = architecture.input.shape
    x = images((shape.height, shape.width))
    with torch.inference_mode():
        assert off(folded(x), network(x)) < 1e-12
    assert not [name for name, _ in folded.named_parameters() if "head_dist" in name]
    assert not any(isinstance(part, NORMS) for part in folded.modules())


def test_folding_parts() -> None:
    parts = [
        (InteractionFFN(width=6, ffn_dim=10, silent=False), torch.randn(2, 6, 5, 4)),
        (BatchNormHead(width=6, classes=3, distilled=True), torch.randn(2, 6, 5, 4)),
        (BatchNormHead(width=6, classes=3), torch.randn(2, 20, 6)),
    ]
    for module, x in parts:
        randomised(module).eval()
        with torch.inference_mode():
            torch.testing.assert_close(fold(module)(x), module(x))


def test_a_distilled_head_gives_two_logits_in_training() -> None:
    head = randomised(BatchNormHead(width=6, classes=3, distilled=True))
    x = torch.randn(4, 6, 2, 3)
    first, second = head.train()(x)
    assert not torch.equal(first, second)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(head.eval()(tokens), head(x))
    with torch.no_grad():
        both = head.head(x.mean((2, 3))) + head.head_dist(x.mean((2, 3)))
        torch.testing.assert_close(head(x), both / 2)


def test_blocks_start_silent() -> None:
    network = build(like_timms(96))
    block = network.get_submodule("stages.1.blocks.0")
    x = torch.randn(2, 24, 3, 3)
    assert torch.equal(block(x), x)


QUICK = [("efficientvit_m0", False), ("efficientvit_m2", True)]


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(NAMES, (False, True))
    ],
)
def test_published_models_export_to_onnx(name: str, folded: bool, tmp_path: Path) -> None:
    network = randomised(build(get(name).architecture)).eval()
    given = fold(network) if folded else network
    x = images(224, 1).float()
    difference = export_onnx(given, x, tmp_path / "m.onnx", reference=network, dynamic_batch=True)
    with torch.inference_mode():
        assert difference < 1e-4 * max(1.0, float(network(x).abs().max()))


@pytest.mark.parametrize("seed", range(3))
def test_random_architectures_export_to_onnx(seed: int, tmp_path: Path) -> None:
    architecture = random_efficientvit(seed)
    network = randomised(build(architecture)).eval()
    shape = architecture.input.shape
    x = images((shape.height, shape.width), 1).float()
    assert export_onnx(network, x, tmp_path / "r.onnx", dynamic_batch=True) < 1e-3


class Axes(TorchDispatchMode):
    """Remembers the largest number of axes of any tensor made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.most = max([self.most, *(each.dim() for each in made if isinstance(each, Tensor))])
        return out


def test_no_tensor_has_five_axes() -> None:
    network = build(like_timms((80, 160))).eval()
    with torch.no_grad(), Axes() as axes:
        network(images((80, 160)).float())
    assert axes.most == 4


def test_another_image_size_is_refused() -> None:
    network = build(like_timms(96))
    with pytest.raises(InputSizeError, match=r"built for 96x96 images, got 64x64"):
        network(torch.zeros(1, 3, 64, 64))
    block = network.get_submodule("stages.0.blocks.0")
    with pytest.raises(InputSizeError, match=r"built for a map of 6x6, got 4x4"):
        block(torch.zeros(1, 16, 4, 4))


def test_weights_move_to_another_resolution() -> None:
    source = get("efficientvit_m0").architecture
    target = source.with_resolution((160, 256))  # maps of 10x16, 5x8, 3x4
    state = randomised(build(source)).state_dict()
    adapted = adapt_state_dict(state, source=source, target=target)
    build(target).load_state_dict(adapted)
    changed = {name: adapted[name].shape for name in state if adapted[name] is not state[name]}
    assert changed == {
        **{f"stages.1.blocks.{i}.mixer.attention_biases": (4, 25) for i in range(2)},
        **{f"stages.2.blocks.{i}.mixer.attention_biases": (4, 9) for i in range(3)},
    }
    for name in changed:  # the zero and the largest offset keep their biases
        torch.testing.assert_close(adapted[name][:, [0, -1]], state[name][:, [0, -1]])
    name = "stages.2.blocks.0.mixer.attention_biases"
    with pytest.raises(WeightsError, match=rf"{name} is missing"):
        adapt_state_dict(
            {k: v for k, v in state.items() if k != name}, source=source, target=target
        )


def test_prices_have_names_that_a_table_keeps() -> None:
    keys = [key for part in walk(get("efficientvit_m2").architecture) for key in price_keys(part)]
    assert str(keys[1]) == (
        "block efficientvit cascade=1;ffn_dim=256;ffns=1;heads=4;kernels=7-5-3-3;qk_dim=16;"
        "v_dim=32;window=7 128->128 @ 14x14"
    )
    one_head = efficientvit(image=64, stages=[[{"heads": 1, "kernels": 3}]])
    keys += [key for part in walk(one_head) for key in price_keys(part)]
    assert all(parse_fields(format_fields(key.fields)) == key.fields for key in keys)
    heads = [
        efficientvit(image=64, stages=[[{"heads": 1}]], distilled=each) for each in (False, True)
    ]
    priced = [price_keys(list(walk(architecture))[-1]) for architecture in heads]
    assert priced[0] == priced[1]


def test_what_is_left_out_is_filled_in() -> None:
    short = efficientvit(image=64, stages=[[{"heads": 2}]])
    written = {"heads": 2, "qk_dim": 16, "v_dim": 8, "kernels": [5, 5], "window": 7}
    full = efficientvit(image=64, stages=[[{**written, "cascade": True, "ffns": 1, "ffn_dim": 32}]])
    assert short == full
    assert short.to_yaml() == full.to_yaml()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"heads": 3},
            r"stages\[0\]\.blocks\[0\]: heads: must divide the stage's width, 16, .*; got 3$",
        ),
        ({"heads": 32}, r"heads: must divide the stage's width, 16, .*; got 32$"),
        (
            {"heads": 2, "v_dim": 4},
            r"blocks\[0\]: v_dim: must be width / heads = 8 in a cascade, .*; got 4; .*false$",
        ),
        ({"heads": 2, "kernels": [3, 5, 7]}, r"one per head, which are 2; got 3$"),
        ({"heads": 2, "kernels": [3, 4]}, r"kernels\[1\]: must be odd, .*; got 4$"),
        ({"heads": 2, "kernels": 4}, r"kernels.*: must be odd, .*; got 4$"),
        ({"heads": 2, "kernels": []}, r"kernels: must have at least 1 item"),
        ({"heads": 2, "cascade": 1}, r"cascade: must be true or false"),
    ],
)
def test_blocks_that_cannot_be(block: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        efficientvit(image=64, stages=[[block]])
    assert "\n" not in str(caught.value)


def test_the_stems_width() -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of 8, .*; got 12"):
        EfficientViTStem(width=12)
    with pytest.raises(ValueError, match=r"at least 1|greater than or equal to 1"):
        BlockSpec(heads=0)
