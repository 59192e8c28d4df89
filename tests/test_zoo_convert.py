"""Published weights: timm's and the official code's networks give the same outputs as ours."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from slimnas.errors import WeightsError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.registry import builtin_names, get

NAMES = ["efficientformer_l1", "efficientformer_l3", "efficientformer_l7"]
FEATURE_CHANNELS = {
    "efficientformer_l1": (48, 96, 224, 448),
    "efficientformer_l3": (64, 128, 320, 512),
    "efficientformer_l7": (96, 192, 384, 768),
}


def randomised_timm(name: str, seed: int = 0) -> nn.Module:
    """timm's network with every parameter that starts at a constant moved away from it."""
    model = timm.create_model(name)
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):
                uniform(parameter, 0.3, 1.0)
            elif key.endswith("attention_biases"):
                uniform(parameter, -2.0, 2.0)
            elif key.endswith("bias") and "norm" not in key:
                uniform(parameter, -0.1, 0.1)
    model.set_distilled_training(True)
    return model


def official_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the names of snap-research/EfficientFormer."""
    official = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "stem":
            order = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4}
            key = f"patch_embed.{order[parts[1]]}.{parts[2]}"
        elif parts[0] == "stages" and parts[2] == "downsample":
            name = "proj" if parts[3] == "conv" else "norm"
            key = f"network.{2 * int(parts[1]) - 1}.{name}.{parts[4]}"
        elif parts[0] == "stages":
            rest = ".".join(parts[3:])
            rest = re.sub(r"ls([12])\.gamma", r"layer_scale_\1", rest)
            key = f"network.{2 * int(parts[1])}.{rest}"
        elif parts[0] == "head_dist":
            key = f"dist_head.{parts[1]}"
        official[key] = tensor
    return official


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def test_every_built_in_model_is_compared() -> None:
    assert builtin_names() == NAMES
    assert timm.list_models("efficientformer_*") == NAMES


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_same_outputs_as_timm(name: str) -> None:
    reference = randomised_timm(name)
    architecture = get(name).architecture
    network = build(architecture, seed=5)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    before = network.stem.norm1.running_mean.clone()
    x = images()
    with torch.inference_mode():
        ours, theirs = network.eval()(x), reference.eval()(x)
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-5

        # timm's train() returns None, so it cannot be chained
        reference.train()
        pair, expected = network.train()(x), reference(x)
        assert isinstance(pair, tuple)
        assert len(pair) == len(expected) == 2
        assert not torch.equal(pair[0], pair[1])
        for got, wanted in zip(pair, expected, strict=True):
            assert (got - wanted).abs().max() < 1e-5

    # One batch in training moved BatchNorm's statistics alike.
    moved = convert_state_dict(reference.state_dict(), architecture)
    assert not torch.equal(moved["stem.norm1.running_mean"], before)
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, moved[key], msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_official_names_give_the_same_tensors(name: str) -> None:
    with torch.device("meta"):
        names = timm.create_model(name).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in names.items()}
    official = official_layout(state)
    assert not any(key.startswith(("stem.", "stages.")) for key in official)
    assert len(official) == len(state) == {"l1": 281, "l3": 457, "l7": 649}[name[-2:]]
    architecture = get(name).architecture
    from_official = convert_state_dict(official, architecture)
    from_timm = convert_state_dict(state, architecture)
    assert list(from_official) == list(from_timm)
    assert all(from_official[key] is from_timm[key] for key in from_timm)


def test_our_own_names_stay() -> None:
    architecture = get("efficientformer_l1").architecture
    state = build(architecture).state_dict()
    assert convert_state_dict(state, architecture) == state


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_as_timms(name: str) -> None:
    architecture = get(name).architecture
    with torch.device("meta"):
        maps = build(architecture).forward_features(torch.empty(1, 3, 224, 224))
        theirs = timm.create_model(name, features_only=True)(torch.empty(1, 3, 224, 224))
    expected = [
        (1, channels, side, side)
        for channels, side in zip(FEATURE_CHANNELS[name], (56, 28, 14, 7), strict=True)
    ]
    assert [tuple(x.shape) for x in maps] == [tuple(x.shape) for x in theirs] == expected


def test_feature_values_as_timms() -> None:
    reference = randomised_timm("efficientformer_l1").eval()
    architecture = get("efficientformer_l1").architecture
    network = build(architecture).eval()
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    x = images(1)
    with torch.inference_mode():
        theirs = reference.forward_intermediates(x, intermediates_only=True)
        ours = network.forward_features(x)
    assert len(ours) == len(theirs) == 4
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("patch_embed.0.weight", "official"),
        ("stem.conv1.weight", "timm"),
    ],
)
def test_layout_is_detected(key: str, layout: str) -> None:
    assert detect_layout({key: torch.zeros(1)}) == layout


@pytest.mark.parametrize("state", [{}, {"features.0.weight": torch.zeros(1)}])
def test_unknown_layout(state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"no known layout .*first tensors: "):
        detect_layout(state)


def test_another_size_of_model_does_not_fit() -> None:
    state = timm.create_model("efficientformer_l1").state_dict()
    with pytest.raises(WeightsError, match=r"x\.pth: does not fit efficientformer_l3: missing"):
        convert_state_dict(state, get("efficientformer_l3").architecture, source="x.pth")


def test_shapes_are_checked() -> None:
    state = timm.create_model("efficientformer_l1", num_classes=10).state_dict()
    wanted = r"head\.head\.weight: efficientformer_l1 needs shape \(1000, 448\), got \(10, 448\)"
    with pytest.raises(WeightsError, match=wanted):
        convert_state_dict(state, get("efficientformer_l1").architecture)
