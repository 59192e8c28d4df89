"""Swin's modules: timm's outputs, a loop over pairs of tokens, and the closed forms of its cost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from swin_cases import images, like_timms, randomised, small_timm, swin_architecture
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimnas.arch.cost import cost
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.swin import SwinBlock as SwinSpec
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import InputSizeError, WeightsError
from slimnas.nn.build import build, build_features
from slimnas.nn.resolution import adapt_state_dict
from slimnas.nn.swin import PatchMerging, SwinBlock, Windows, resize_relative_position_table
from slimnas.runtimes.onnx_export import export_onnx
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.registry import builtin_names, get

NAMES = ["swin_base", "swin_small", "swin_tiny"]
SIZES = [
    pytest.param((32, 32), 4, id="whole windows"),
    pytest.param((56, 56), 7, id="second stage is one window"),
    pytest.param((40, 24), 4, id="not square, padded"),
    pytest.param((56, 16), 5, id="shifted along one side only"),
    pytest.param((16, 56), 5, id="shifted along the other side only"),
    pytest.param((36, 44), 4, id="odd sides are merged"),
    pytest.param((20, 12), 7, id="windows larger than the map"),
    pytest.param((30, 50), 3, id="image of broken patches"),
]
PRUNED: list[list[dict[str, Any]]] = [
    [
        {"heads": 3, "qk_dim": 2, "v_dim": 5, "ffn_dim": 7, "window": 4},
        {"heads": 2, "qk_dim": 4, "v_dim": 1, "ffn_dim": 0, "window": 4, "shift": 2},
    ],
    [
        {"heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 9, "window": 4},
        {"heads": 1, "qk_dim": 3, "v_dim": 8, "ffn_dim": 5, "window": 4, "shift": 1},
    ],
]


@pytest.mark.parametrize(("size", "window"), SIZES)
def test_same_outputs_as_timm(size: tuple[int, int], window: int) -> None:
    padded = tuple(-(-side // 4) * 4 for side in size)  # timm's stem refuses broken patches
    reference = small_timm(padded, window)
    architecture = like_timms(size, window)
    network = build(architecture)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images(size)
    wide = nn.functional.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0]))
    compared = 0
    for training in (False, True):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            reference.to(dtype).train(training)
            network.to(dtype).train(training)
            with torch.no_grad():
                theirs, ours = reference(wide.to(dtype)), network(x.to(dtype))
            assert theirs.std() > 0.1
            assert (ours - theirs).abs().max() < tolerance
            compared += 1
    assert compared == 4


def test_gradients_as_timms() -> None:
    reference = small_timm((40, 24), 4).double()
    architecture = like_timms((40, 24), 4)
    network = build(architecture).double()
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images((40, 24))
    for model in (reference, network):
        model(x).square().sum().backward()
    theirs = {name: tensor.grad for name, tensor in reference.named_parameters()}
    expected = convert_state_dict(theirs, architecture)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0 or "qkv.bias" in name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9)


def test_feature_maps_as_timms() -> None:
    reference = small_timm((40, 24), 4).double()
    architecture = like_timms((40, 24), 4)
    network = build_features(architecture).double()
    state = convert_state_dict(reference.state_dict(), architecture)
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    x = images((40, 24))
    with torch.no_grad():
        theirs = reference.forward_intermediates(x, intermediates_only=True)
        ours = network(x)
    assert [tuple(out.shape) for out in ours] == [(2, 12, 10, 6), (2, 24, 5, 3)]
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-10


def test_every_built_in_swin_is_compared() -> None:
    assert [name for name in builtin_names() if name.startswith("swin")] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_published_models_as_timms(name: str) -> None:
    torch.manual_seed(0)
    reference = randomised(timm.create_model(f"{name}_patch4_window7_224", drop_path_rate=0.0))
    architecture = get(name).architecture
    network = build(architecture)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images((224, 224), count=1)
    for training in (False, True):
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            reference.to(dtype).train(training)
            network.to(dtype).train(training)
            with torch.no_grad():
                theirs, ours = reference(x.to(dtype)), network(x.to(dtype))
            assert theirs.std() > 0.1
            assert (ours - theirs).abs().max() < tolerance


def attention_by_hand(block: SwinBlock, spec: SwinSpec, x: Tensor, shape: FeatureShape) -> Tensor:
    """What the attention sub-layer adds to one image's tokens (N, C), pair by pair."""
    assert block.norm1 is not None
    assert block.attn is not None
    (rows, columns), (high, wide) = (shape.height, shape.width), spec.windows(shape)
    shift, padded = spec.shifts(shape), spec.padded(shape)
    table = block.attn.relative_position_bias_table
    seen = block.norm1(x)
    zero = torch.zeros_like(seen[0])
    places = [(r, c) for r in range(padded[0]) for c in range(padded[1])]

    def region(place: int, axis: int) -> int:
        if not shift[axis]:
            return 0
        length, size = padded[axis], (high, wide)[axis]
        return (place >= length - size) + (place >= length - shift[axis])

    def token(r: int, c: int) -> int | None:
        """Which token lies at a place of the shifted and padded map."""
        if r >= rows or c >= columns:
            return None
        return (r + shift[0]) % rows * columns + (c + shift[1]) % columns

    def project(index: int | None) -> Tensor:
        return block.attn.qkv(zero if index is None else seen[index])  # type: ignore[union-attr]

    out = torch.zeros_like(seen)
    qk, v, heads = spec.qk_dim, spec.v_dim, spec.heads
    for r, c in places:
        mine = token(r, c)
        if mine is None:
            continue
        near = [(i, j) for i, j in places if (i // high, j // wide) == (r // high, c // wide)]
        keys = torch.stack([project(token(i, j)) for i, j in near])
        mixed = []
        for head in range(heads):
            q = project(mine)[head * qk : (head + 1) * qk]
            k = keys[:, (heads + head) * qk : (heads + head + 1) * qk]
            value = keys[:, 2 * heads * qk + head * v : 2 * heads * qk + (head + 1) * v]
            logits = k @ q / qk**0.5
            for n, (i, j) in enumerate(near):
                offset = (r - i + high - 1) * (2 * wide - 1) + c - j + wide - 1
                apart = (region(i, 0), region(j, 1)) != (region(r, 0), region(c, 1))
                logits[n] += table[offset, head] - 100 * apart
            mixed.append(logits.softmax(0) @ value)
        out[mine] = block.attn.proj(torch.cat(mixed))
    return out


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grid", [(4, 4), (6, 4), (5, 7), (2, 6)])
def test_attention_pair_by_pair(grid: tuple[int, int], shift: int) -> None:
    spec = SwinSpec(heads=2, qk_dim=3, v_dim=5, ffn_dim=0, window=4, shift=shift)
    shape = FeatureShape(8, *grid)
    torch.manual_seed(0)
    made = SwinBlock(
        width=8, heads=2, qk_dim=3, v_dim=5, ffn_dim=0, windows=Windows.of(spec, shape)
    )
    block = randomised(made).double()
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    with torch.no_grad():
        ours = block(x) - x
        expected = torch.stack([attention_by_hand(made, spec, image, shape) for image in x])
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 1e-12


def test_neighbours_are_merged_column_by_column() -> None:
    merging = PatchMerging(shape=FeatureShape(1, 3, 2), width_out=4)
    merging.norm = nn.Identity()  # type: ignore[assignment]
    nn.init.eye_(merging.reduction.weight)
    tokens = torch.arange(1.0, 7.0).view(1, 6, 1)
    assert merging(tokens).tolist() == [[[1, 3, 2, 4], [5, 0, 6, 0]]]


def test_published_costs() -> None:
    costs = {name: cost(get(name).architecture) for name in NAMES}
    assert costs["swin_tiny"].params == 28_288_354
    assert round(costs["swin_tiny"].macs / 1e6, 2) == 4490.57
    for name in NAMES:
        with torch.device("meta"):
            reference = timm.create_model(f"{name}_patch4_window7_224")
        assert costs[name].params == sum(p.numel() for p in reference.parameters())


def test_parameters_of_pruned_networks() -> None:
    draw, compared = random.Random(0), 0
    for _ in range(20):
        stages = []
        for _ in range(2):
            blocks = []
            for shift in (0, 2):
                heads = draw.choice([0, 1, 2, 3])
                dims = [draw.randint(1, 6) if heads else 0 for _ in range(2)]
                hidden = draw.choice([0, 1, 17]) if heads else draw.randint(1, 20)
                fields = {"heads": heads, "qk_dim": dims[0], "v_dim": dims[1], "ffn_dim": hidden}
                blocks.append({**fields, "window": 4, "shift": shift})
            stages.append(blocks)
        architecture = swin_architecture(image=(24, 40), stages=stages)
        network = build(architecture)
        for component in walk(architecture):
            module = network.get_submodule(component.name)
            params = sum(parameter.numel() for parameter in module.parameters())
            assert component_cost(component).params == params, component
            compared += 1
        assert network(images((24, 40)).float()).shape == (2, 5)
    assert compared == 20 * (1 + 1 + 4 + 1)


def test_absent_sublayers_have_no_tensors() -> None:
    network = build(swin_architecture(image=(32, 32), stages=PRUNED))
    names = {
        name.split(".blocks.")[1].split(".")[1]
        for name in network.state_dict()
        if ".blocks." in name
    }
    assert names == {"norm1", "attn", "norm2", "mlp"}
    assert not any(name.startswith("stages.1.blocks.0.attn") for name in network.state_dict())
    assert not any(name.startswith("stages.1.blocks.0.norm1") for name in network.state_dict())
    assert not any(name.startswith("stages.0.blocks.1.mlp") for name in network.state_dict())
    assert not any(name.startswith("stages.0.blocks.1.norm2") for name in network.state_dict())


@pytest.mark.parametrize("image", [(32, 32), (40, 28)])
def test_exports_to_onnx(image: tuple[int, int], tmp_path: Path) -> None:
    network = randomised(build(swin_architecture(image=image, stages=PRUNED))).eval()
    x = images(image).float()
    difference = export_onnx(network, x, tmp_path / "swin.onnx", dynamic_batch=True)
    assert difference < 1e-4


class Axes(TorchDispatchMode):
    """Remembers the largest number of axes of any tensor made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.dim())
        return out


def test_no_tensor_has_five_axes() -> None:
    network = build(like_timms((40, 24), 4)).eval()
    with torch.no_grad(), Axes() as axes:
        network(images((40, 24)).float())
    assert axes.most == 4


def test_another_image_size_is_refused() -> None:
    network = build(like_timms((32, 32), 4))
    with pytest.raises(InputSizeError, match=r"built for 32x32 images, got 64x64"):
        network(torch.zeros(1, 3, 64, 64))
    block = network.get_submodule("stages.0.blocks.0")
    with pytest.raises(InputSizeError, match=r"built for 8x8 = 64 tokens, got 16"):
        block(torch.zeros(1, 16, 12))


def test_smaller_windows_keep_the_bias_of_each_offset() -> None:
    source, target = like_timms((64, 64), 7), like_timms((40, 64), 7)
    state = randomised(build(source)).state_dict()
    adapted = adapt_state_dict(state, source=source, target=target)
    network = build(target)
    network.load_state_dict(adapted)
    name = "stages.1.blocks.0.attn.relative_position_bias_table"
    before, after = state[name].view(13, 13, 4), adapted[name].view(9, 13, 4)
    assert torch.equal(after, before[2:11])  # 5x8 tokens: windows of 5x7
    unchanged = "stages.0.blocks.0.attn.relative_position_bias_table"
    assert adapted[unchanged] is state[unchanged]


def test_larger_windows_keep_the_ends_of_the_table() -> None:
    table = torch.randn(5 * 7, 3, dtype=torch.float64)
    made = resize_relative_position_table(table, (3, 4), (5, 2))
    before, after = table.view(5, 7, 3), made.view(9, 3, 3)
    assert made.dtype == torch.float64
    torch.testing.assert_close(after[[0, 4, 8]], before[[0, 2, 4], 2:5], rtol=1e-6, atol=1e-6)


def test_resolution_of_a_network_without_attention_in_a_block() -> None:
    source = swin_architecture(image=(32, 32), stages=PRUNED)
    target = source.with_resolution((16, 24))
    adapted = adapt_state_dict(build(source).state_dict(), source=source, target=target)
    build(target).load_state_dict(adapted)


def test_a_table_of_other_windows_is_refused() -> None:
    wanted = r"table of 4x4 windows must be \(49, heads\), got \(169, 2\)"
    with pytest.raises(WeightsError, match=wanted):
        resize_relative_position_table(torch.zeros(169, 2), (4, 4), (3, 3))


def test_a_shift_stays_within_its_window() -> None:
    with pytest.raises(ValueError, match="shift must be less than the window, 4, got 4"):
        SwinSpec(heads=1, qk_dim=2, v_dim=2, window=4, shift=4)
