"""LITv2's published weights: the official code's names, and the offsets they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from litv2_cases import images, litv2_architecture, randomised, varied
from torch import Tensor

from slimnas.arch.cost import cost
from slimnas.errors import WeightsError
from slimnas.nn.build import build
from slimnas.zoo.card import model_card
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.create import create_model
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights

MERGING = {"offset.": "dconv.conv_offset.", "conv.": "dconv.", "bn.": "norm_layer."}


def official_name(name: str) -> str:
    """The released code's name of a tensor of ours."""
    first, _, rest = name.partition(".")
    if first == "stem":
        return f"patch_embed.{rest}"
    if first == "head":
        return rest
    merging = re.fullmatch(r"stages\.(\d+)\.downsample\.(.+)", name)
    if merging:
        part = next(ours for ours in MERGING if merging[2].startswith(ours))
        theirs = MERGING[part] + merging[2].removeprefix(part)
        return f"layers.{int(merging[1]) - 1}.downsample.{theirs}"
    return name.replace("stages.", "layers.").replace(".dwconv.", ".dwconv.dwconv.")


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {official_name(name): tensor for name, tensor in sorted(state.items())}


@pytest.mark.parametrize("deformable", [False, True])
def test_official_names(deformable: bool) -> None:
    architecture = litv2_architecture(deformable=deformable)
    state = randomised(build(architecture)).state_dict()
    theirs = official(state)
    assert not set(theirs) & set(state)
    assert detect_layout(theirs, architecture) == "official"
    assert detect_layout(state, architecture) == "slimnas"
    converted = convert_state_dict(theirs, architecture)
    assert list(converted) == list(state)
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_names_of_the_published_model() -> None:
    """Every tensor of LITv2-S as released, name and shape written out."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    layer("patch_embed.proj", 96, 3, 4, 4)
    layer("patch_embed.norm", 96)
    for i, depth in enumerate((2, 2, 6, 2)):
        width = 96 * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            if i == 2:
                layer(f"{block}.attn.l_q", 320, width)
                layer(f"{block}.attn.l_kv", 640, width)
                layer(f"{block}.attn.l_proj", 320, 320)
                layer(f"{block}.attn.h_qkv", 192, width)
                layer(f"{block}.attn.h_proj", 64, 64)
            if i == 3:
                layer(f"{block}.attn.l_q", width, width)
                layer(f"{block}.attn.l_kv", 2 * width, width)
                layer(f"{block}.attn.l_proj", width, width)
            if i >= 2:
                layer(f"{block}.norm1", width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.mlp.fc1", 4 * width, width)
            layer(f"{block}.mlp.dwconv.dwconv", 4 * width, 1, 3, 3)
            layer(f"{block}.mlp.fc2", width, 4 * width)
        if i < 3:
            merging = f"layers.{i}.downsample"
            layer(f"{merging}.dconv", 2 * width, width, 2, 2)
            layer(f"{merging}.dconv.conv_offset", 8, width, 2, 2)
            layer(f"{merging}.norm_layer", 2 * width)
            shapes[f"{merging}.norm_layer.running_mean"] = (2 * width,)
            shapes[f"{merging}.norm_layer.running_var"] = (2 * width,)
            shapes[f"{merging}.norm_layer.num_batches_tracked"] = ()
    layer("norm", 768)
    layer("head", 1000, 768)
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    architecture = varied(get("litv2_s").architecture)
    converted = convert_state_dict(state, architecture)
    assert len(converted) == len(state) == 219
    learned = sum(t.numel() for n, t in state.items() if "running" not in n and t.dim())
    assert learned == cost(architecture).params


@pytest.mark.parametrize("name", ["litv2_s", "litv2_m", "litv2_b"])
def test_offsets_need_a_deformable_network(name: str) -> None:
    shipped = get(name).architecture
    state = {"layers.0.downsample.dconv.conv_offset.weight": torch.zeros(1)}
    wanted = (
        rf"\(layers\.0\.downsample\.dconv\.conv_offset\.weight\), which {name} would leave out: "
        r"its stages\[1\]\.downsample must have `deformable: true`"
    )
    with pytest.raises(WeightsError, match=wanted) as error:
        convert_state_dict(state, shipped)
    assert len(str(error.value).splitlines()) == 1


def test_a_deformable_network_needs_offsets() -> None:
    state = official(build(litv2_architecture()).state_dict())
    with pytest.raises(WeightsError, match=r"missing stages\.1\.downsample\.offset\.weight"):
        convert_state_dict(state, litv2_architecture(deformable=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.2.blocks.0.attn.h_qkv.bias"), "missing stages.2.blocks.0.attn"),
        (lambda s: s.update({"layers.9.norm.weight": torch.zeros(1)}), "unknown layers.9.norm"),
        (
            lambda s: s.update({"layers.3.downsample.dconv.conv_offset.bias": torch.zeros(8)}),
            "unknown stages.4.downsample.offset.bias",
        ),
        (
            lambda s: s.update({"layers.0.blocks.0.mlp.dwconv.dwconv.bias": torch.zeros(3)}),
            r"needs shape \(32,\), got \(3,\)",
        ),
        (lambda s: [s.pop(name) for name in list(s) if ".1." in name], "missing .* and .* more"),
        (dict.clear, "in no known layout of LITv2 weights"),
    ],
)
def test_damaged_weights(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = official(build(litv2_architecture(deformable=True)).state_dict())
    change(state)
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(state, litv2_architecture(deformable=True))


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    architecture = litv2_architecture(deformable=True)
    network = randomised(build(architecture)).eval()
    path = tmp_path / "litv2.pth"
    torch.save({"model": official(network.state_dict())}, path)
    architecture.save(tmp_path / "deformable.yaml")
    loaded = create_model(tmp_path / "deformable.yaml", pretrained=path).eval()
    x = images((64, 64))
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
    with pytest.raises(WeightsError, match="deformable: true"):
        load_weights(path, litv2_architecture())


def test_card() -> None:
    entry = get("litv2_s")
    card = model_card(entry.architecture, entry.metrics)
    assert "- stage depths: 2, 2, 6, 2, 8 of them with attention" in card
    assert "| imagenet_top1 | 82 | official README" in card
    with pytest.raises(WeightsError, match="litv2_s: no weights beside the architecture"):
        create_model("litv2_s", pretrained=True)
