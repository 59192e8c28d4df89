"""The architecture of a (memory-efficient) EfficientViT built by timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimnas.arch.efficientvit import EfficientViTStem, EfficientViTSubsample
from slimnas.arch.shapes import FeatureShape
from slimnas.nn.layers import BATCH_NORM_EPS
from slimnas.zoo.timm_modules import (
    Expected,
    attribute,
    check_modules,
    has_bias,
    must,
    norm_with,
    part,
)


def describe_efficientvit(model: nn.Module) -> dict[str, Any]:
    """The fields of the Architecture of timm's EfficientVitMsra.

    Raises:
        UnsupportedModuleError: it is not built as slimnas builds it.
    """
    check_modules(model, _EXPECTED)
    must("global_pool", part(model, "global_pool", nn.Module), pool_type="avg")
    channels = part(model, "patch_embed.conv1.conv", nn.Conv2d).in_channels
    width = part(model, "patch_embed.conv4.conv", nn.Conv2d).out_channels
    height, across = _resolution(model)
    shape = EfficientViTStem(width=width).output_shape(FeatureShape(channels, height, across))
    stages = []
    for index in range(len(part(model, "stages", nn.Sequential))):
        stage, shape = _stage(model, f"stages.{index}", shape)
        stages.append(stage)
    return {
        "input": {"channels": channels, "resolution": [height, across]},
        "stem": {"type": "efficientvit_stem", "width": width},
        "stages": stages,
        "head": {
            "type": "pooled_bn",
            "classes": part(model, "head.linear", nn.Linear).out_features,
        },
    }


def _resolution(model: nn.Module) -> tuple[int, int]:
    """The image's size; the model itself keeps only the shorter side, what made it may know both.

    A model that nothing but its class made is taken to be for squares.
    """
    shorter = attribute(model, "", "img_size")
    traits = getattr(model, "_traits", None)
    size = traits.get("img_size") if isinstance(traits, Mapping) else None
    if size is None or min(size) != shorter:
        return shorter, shorter
    return int(size[0]), int(size[1])


def _stage(model: nn.Module, path: str, shape: FeatureShape) -> tuple[dict[str, Any], FeatureShape]:
    """A stage's fields and its blocks' map, for a stage that takes a map of `shape`."""
    stage: dict[str, Any] = {}
    if not isinstance(part(model, f"{path}.downsample", nn.Module), nn.Identity):
        stage["downsample"] = _subsample(model, f"{path}.downsample", shape.channels)
        merged = part(model, f"{path}.downsample.patchmerge.conv3.conv", nn.Conv2d)
        shape = shape.halved(merged.out_channels)
    count = len(part(model, f"{path}.blocks", nn.Sequential))
    stage["width"] = shape.channels
    stage["blocks"] = [_block(model, f"{path}.blocks.{i}", shape) for i in range(count)]
    return stage, shape


def _subsample(model: nn.Module, path: str, width: int) -> dict[str, Any]:
    usual = EfficientViTSubsample()
    after = part(model, f"{path}.patchmerge.conv3.conv", nn.Conv2d).out_channels
    dims = {
        "before_dim": (f"{path}.res1.1.m.pw1.conv", usual.hidden_before(width)),
        "after_dim": (f"{path}.res2.1.m.pw1.conv", usual.hidden_after(after)),
        "inner_dim": (f"{path}.patchmerge.conv1.conv", usual.inner(width)),
        "se_dim": (f"{path}.patchmerge.se.fc1", usual.squeezed(width)),
    }
    found = {name: part(model, at, nn.Conv2d).out_channels for name, (at, _) in dims.items()}
    # What is left out is filled in, and two networks that are equal should be so written.
    unusual = {name: dim for name, dim in found.items() if dim != dims[name][1]}
    return {"type": usual.type, **unusual}


def _block(model: nn.Module, path: str, shape: FeatureShape) -> dict[str, Any]:
    attention = f"{path}.mixer.m.attn"
    key_dim = attribute(model, attention, "key_dim")
    must(attention, part(model, attention, nn.Module), scale=key_dim**-0.5)
    heads = len(part(model, f"{attention}.qkvs", nn.ModuleList))
    sides = [
        part(model, f"{attention}.dws.{head}.conv", nn.Conv2d).kernel_size[0]
        for head in range(heads)
    ]
    # timm keeps what is left of a window on a small map, the architecture what was asked for.
    asked = attribute(model, f"{path}.mixer.m", "window_resolution")
    side = attribute(model, attention, "resolution")
    clipped = min(asked, shape.height, shape.width)
    return {
        "type": "efficientvit",
        "heads": heads,
        "qk_dim": key_dim,
        "v_dim": attribute(model, attention, "val_dim"),
        "kernels": sides,
        "window": asked if clipped == side else side,
        "ffn_dim": part(model, f"{path}.ffn0.m.pw1.conv", nn.Conv2d).out_channels,
    }


def _plain(path: str, module: nn.Module) -> None:
    must(path, module, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), groups=1)


def _stem(path: str, module: nn.Module) -> None:
    must(path, module, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    must(path, module, groups=1, bias=None)


def _pointwise(path: str, module: nn.Module) -> None:
    _plain(path, module)
    must(path, module, bias=None)


def _excite(path: str, module: nn.Module) -> None:
    _plain(path, module)
    has_bias(path, module)


def _depthwise(path: str, module: nn.Module) -> None:
    assert isinstance(module, nn.Conv2d)
    side, stride = module.kernel_size[0], 2 if ".patchmerge." in path else 1
    if ".dws." not in path:
        side = 3
    padding = (side // 2, side // 2)
    must(path, module, kernel_size=(side, side), stride=(stride, stride), padding=padding)
    must(path, module, groups=module.in_channels, dilation=(1, 1), bias=None)


def _squeeze(path: str, module: nn.Module) -> None:
    must(path, module, add_maxpool=False)


_DOWN, _BLOCK = r"stages\.\d+\.downsample", r"stages\.\d+\.blocks\.\d+"
_MERGE, _ATTENTION = rf"{_DOWN}\.patchmerge", rf"{_BLOCK}\.mixer\.m\.attn"
_DEPTHWISE = rf"({_DOWN}\.res[12]\.0\.m|{_MERGE}\.conv2|{_BLOCK}\.dw[01]\.m|{_ATTENTION}\.dws\.\d+)"
_FFN = rf"({_DOWN}\.res[12]\.1\.m|{_BLOCK}\.ffn[01]\.m)"
_POINTWISE = rf"({_FFN}\.pw[12]|{_MERGE}\.conv[13]|{_ATTENTION}\.(qkvs\.\d+|proj\.1))"
_STEM = r"patch_embed\.conv[1-4]"
_EXPECTED: Expected = {
    "patch_embed": ("PatchEmbedding", None),
    rf"{_STEM}|{_DEPTHWISE}|{_POINTWISE}": ("ConvNorm", None),
    rf"{_STEM}\.conv": ("Conv2d", _stem),
    rf"{_DEPTHWISE}\.conv": ("Conv2d", _depthwise),
    rf"{_POINTWISE}\.conv": ("Conv2d", _pointwise),
    rf"({_STEM}|{_DEPTHWISE}|{_POINTWISE})\.bn": ("BatchNorm2d", norm_with(BATCH_NORM_EPS)),
    rf"patch_embed\.relu[1-3]|{_FFN}\.act|{_MERGE}\.(se\.)?act|{_ATTENTION}\.proj\.0": (
        "ReLU",
        None,
    ),
    "stages": ("Sequential", None),
    r"stages\.\d+": ("EfficientVitStage", None),
    _DOWN: ("Identity|Sequential", None),
    rf"{_DOWN}\.res[12]|stages\.\d+\.blocks|{_ATTENTION}\.proj": ("Sequential", None),
    rf"{_DOWN}\.res[12]\.[01]|{_BLOCK}\.(dw[01]|ffn[01]|mixer)": ("ResidualDrop", None),
    _FFN: ("ConvMlp", None),
    _MERGE: ("PatchMerging", None),
    rf"{_MERGE}\.se": ("SEModule", _squeeze),
    rf"{_MERGE}\.se\.fc[12]": ("Conv2d", _excite),
    rf"{_MERGE}\.se\.gate": ("Sigmoid", None),
    _BLOCK: ("EfficientVitBlock", None),
    rf"{_BLOCK}\.mixer\.m": ("LocalWindowAttention", None),
    _ATTENTION: ("CascadedGroupAttention", None),
    rf"{_ATTENTION}\.(qkvs|dws)": ("ModuleList", None),
    "global_pool": ("SelectAdaptivePool2d", None),
    r"global_pool\.pool": ("AdaptiveAvgPool2d", None),
    r"global_pool\.flatten": ("Flatten", None),
    "head": ("NormLinear", None),
    r"head\.bn": ("BatchNorm1d", norm_with(BATCH_NORM_EPS)),
    r"head\.linear": ("Linear", has_bias),
}
