"""EfficientViT's published weights: both layouts give the same tensors, timm's objects networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
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

from slimnas.arch.architecture import Architecture
from slimnas.convert import from_timm
from slimnas.errors import UnsupportedModuleError, WeightsError
from slimnas.nn.build import build
from slimnas.zoo.convert import convert_state_dict, detect_layout
from slimnas.zoo.keys_efficientvit import KEYS
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights

# Tensors of the official checkpoints and of timm's.
KEY_COUNTS = {
    "efficientvit_m0": (699, 693),
    "efficientvit_m1": (615, 609),
    "efficientvit_m2": (603, 597),
    "efficientvit_m3": (675, 669),
    "efficientvit_m4": (699, 693),
    "efficientvit_m5": (835, 827),
}


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict under the official names, some kernels as matrices."""
    made = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            parts[1] = str(2 * (int(parts[1].removeprefix("conv")) - 1))
        elif parts[0] == "stages":
            stage = int(parts[1])
            if parts[2] == "blocks":
                index = int(parts[3]) + (3 if stage else 0)
                parts = [f"blocks{stage + 1}", str(index), *parts[4:]]
            else:
                index = ["res1", "patchmerge", "res2"].index(parts[3])
                parts = [f"blocks{stage + 1}", str(index), *parts[4:]]
        renamed = ".".join({"conv": "c", "linear": "l"}.get(part, part) for part in parts)
        is_pointwise = tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and tensor.shape[1] > 1
        made[renamed] = tensor.squeeze() if is_pointwise and ".pw" in renamed else tensor
        if name.endswith("attention_biases"):
            made[renamed.replace("attention_biases", "attention_bias_idxs")] = torch.zeros(1)
    return dict(sorted(made.items()))


def zeros_like_timms(name: str) -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def test_layouts_give_the_same_tensors() -> None:
    reference, architecture = small_timm((80, 160)), like_timms((80, 160))
    state = reference.state_dict()
    made = official(state)
    assert any(tensor.dim() == 2 for name, tensor in made.items() if name.endswith("c.weight"))
    assert detect_layout(state, architecture) == "timm"
    assert detect_layout(made, architecture) == "official"
    ours, theirs = convert_state_dict(state, architecture), convert_state_dict(made, architecture)
    assert list(ours) == list(theirs) == list(build(architecture).state_dict())
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_published_models(name: str) -> None:
    state = zeros_like_timms(name).state_dict()
    made = official(state)
    assert (len(made), len(state)) == KEY_COUNTS[name]
    for layout in (state, made):
        convert_state_dict(layout, get(name).architecture)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_weights_are(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    provenance = get(name).architecture.provenance
    assert provenance["weights"]["repository"] == f"timm/{config.architecture}.{config.tag}"
    assert provenance["preprocessing"] == {"mean": list(config.mean), "std": list(config.std)}


def test_our_own_names_stay() -> None:
    architecture = like_timms(96)
    state = build(architecture).state_dict()
    assert detect_layout(state, architecture) == "slimnas"
    assert convert_state_dict(state, architecture) == state


def test_a_distilled_head_of_the_official_code() -> None:
    architecture = efficientvit(image=64, stages=[[{"heads": 2}]], distilled=True)
    theirs = [
        f"{head}.{part}" for head in ("head", "head_dist") for part in ("bn.bias", "l.weight")
    ]
    renamed = KEYS.rename(
        {name: torch.full((1, 1), i) for i, name in enumerate(theirs)}, architecture, "official"
    )
    expected = [
        f"head.{head}.{part}"
        for head in ("head", "head_dist")
        for part in ("bn.bias", "linear.weight")
    ]
    assert {name: int(tensor) for name, tensor in renamed.items()} == {
        name: i for i, name in enumerate(expected)
    }
    assert set(expected) < set(build(architecture).state_dict())


def test_a_file_of_the_official_code(tmp_path: Path) -> None:
    reference, architecture = small_timm(96).eval(), like_timms(96)
    path = tmp_path / "efficientvit.pth"
    torch.save({"model": official(reference.state_dict())}, path)
    network = build(architecture).eval()
    network.load_state_dict(load_weights(path, architecture))
    x = images(96).float()
    with torch.no_grad():
        assert off(network(x), reference(x)) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.linear.bias"), r"missing head\.head\.linear\.bias"),
        (lambda s: s.update({"stages.9.x": torch.zeros(1)}), r"unknown stages\.9\.x"),
        (
            lambda s: s.update({"stages.0.blocks.0.mixer.m.attn.attention_biases": torch.zeros(2)}),
            r"mixer\.attention_biases: small_efficientvit needs shape \(2, 9\), got \(2,\)",
        ),
    ],
)
def test_damaged_weights(change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = small_timm(96).state_dict()
    change(state)
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(state, like_timms(96))


def test_weights_of_others() -> None:
    with pytest.raises(WeightsError, match="no known layout of EfficientViT weights"):
        convert_state_dict({"conv1.weight": torch.zeros(1)}, like_timms(96))


@pytest.mark.parametrize("name", NAMES)
def test_timms_objects_are_the_built_in_models(name: str) -> None:
    assert from_timm(zeros_like_timms(name)).architecture == get(name).architecture


@pytest.mark.parametrize(("size", "window"), [(96, 3), (64, 7), (80, 2), (104, 7), (72, 5)])
def test_timms_objects(size: int, window: int) -> None:
    reference = small_timm(size, window).double().eval()
    network = from_timm(reference)
    assert not network.training
    x = images(size)
    with torch.no_grad():
        assert off(network(x), reference(x)) < 1e-10


@pytest.mark.parametrize("size", [(192, 320), (120, 232), (256, 128)])
def test_timms_objects_for_other_images(size: tuple[int, int]) -> None:
    reference = randomised(timm.create_model("efficientvit_m0", img_size=size)).eval()
    network = from_timm(reference)
    assert network.architecture.input.resolution == size
    x = images(size).float()
    with torch.no_grad():
        assert off(network(x), reference(x)) < 1e-5
    reference.set_input_size((224, 288))
    assert from_timm(reference).architecture.input.resolution == (224, 288)


def fused(model: nn.Module) -> None:
    merge = model.get_submodule("stages.1.downsample.patchmerge")
    merge.conv1 = merge.conv1.fuse()


def another_activation(model: nn.Module) -> None:
    model.get_submodule("stages.0.blocks.0.ffn0.m").act = nn.GELU()


def another_epsilon(model: nn.Module) -> None:
    model.get_submodule("head.bn").eps = 1e-3


def another_scale(model: nn.Module) -> None:
    model.get_submodule("stages.2.blocks.0.mixer.m.attn").scale = 1.0


def another_stride(model: nn.Module) -> None:
    model.get_submodule("stages.2.downsample.patchmerge.conv2.conv").stride = (1, 1)


def max_pooled(model: nn.Module) -> None:
    model.get_submodule("stages.1.downsample.patchmerge.se").add_maxpool = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fused, r"stages\.1\.downsample\.patchmerge\.conv1: must be a ConvNorm, is a Conv2d"),
        (another_activation, r"stages\.0\.blocks\.0\.ffn0\.m\.act: must be a ReLU, is a GELU"),
        (another_epsilon, r"head\.bn\.eps: must be 1e-05 in a BatchNorm1d, is 0\.001"),
        (another_scale, r"mixer\.m\.attn\.scale: must be 0\.5 in a CascadedGroupAttention, is 1"),
        (another_stride, r"patchmerge\.conv2\.conv\.stride: must be \(2, 2\) in a Conv2d"),
        (max_pooled, r"patchmerge\.se\.add_maxpool: must be False"),
    ],
)
def test_other_modules_are_refused(change: Callable[[nn.Module], None], message: str) -> None:
    model = small_timm(96)
    change(model)
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max"}, r"global_pool\.pool: must be a AdaptiveAvgPool2d"),
        ({"num_classes": 0}, r"head: must be a NormLinear, is a Identity"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = timm.create_model("efficientvit_m0", **options)
    with pytest.raises(UnsupportedModuleError, match=message):
        from_timm(model)


def test_other_widths_inside_the_subsampling_are_kept() -> None:
    model = small_timm(96)
    path = "stages.1.downsample.res1.1.m"
    ffn = model.get_submodule(path)
    width = 7
    ffn.pw1.conv, ffn.pw1.bn = nn.Conv2d(16, width, 1, bias=False), nn.BatchNorm2d(width)
    ffn.pw2.conv = nn.Conv2d(width, 16, 1, bias=False)
    model.double().eval()
    network = from_timm(model)
    architecture: Architecture = network.architecture
    downsample = architecture.stages[1].downsample
    assert downsample is not None
    assert downsample.model_dump() == {
        "type": "efficientvit_subsample",
        "before_dim": width,
        "after_dim": None,
        "inner_dim": None,
        "se_dim": None,
    }
    x = images(96)
    with torch.no_grad():
        assert off(network(x), model(x)) < 1e-10
