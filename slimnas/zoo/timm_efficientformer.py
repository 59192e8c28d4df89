"""The architecture of an EfficientFormer built by timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimnas.nn.efficientformer import NORM_EPS
from slimnas.zoo.timm_modules import (
    Expected,
    attribute,
    check_modules,
    exact_gelu,
    has_bias,
    must,
    norm_with,
    part,
)

_RESOLUTION = 224
"""timm builds the attention for 7x7 tokens, whatever the image."""


def describe_efficientformer(model: nn.Module) -> dict[str, Any]:
    """The fields of the Architecture of timm's EfficientFormer.

    Raises:
        UnsupportedModuleError: it is not built as slimnas builds it.
    """
    must("", model, global_pool="avg")
    check_modules(model, _EXPECTED)
    first = part(model, "stem.conv1", nn.Conv2d)
    width = part(model, "stem.conv2", nn.Conv2d).out_channels
    count = len(part(model, "stages", nn.Sequential))
    return {
        "input": {"channels": first.in_channels, "resolution": _RESOLUTION},
        "stem": {"type": "conv_stem", "width": width},
        "stages": [_stage(model, f"stages.{i}") for i in range(count)],
        "head": {
            "type": "linear",
            "classes": part(model, "head", nn.Linear).out_features,
            "distilled": True,
        },
    }


def _stage(model: nn.Module, path: str) -> dict[str, Any]:
    blocks = part(model, f"{path}.blocks", nn.Sequential)
    fields: list[dict[str, Any]] = []
    width = 0
    for index, block in enumerate(blocks):
        at = f"{path}.blocks.{index}"
        if type(block).__name__ == "MetaBlock2d":
            convolution = part(model, f"{at}.mlp.fc1", nn.Conv2d)
            width = convolution.in_channels
            fields.append({"type": "mb4d", "ffn_dim": convolution.out_channels})
        elif type(block).__name__ == "MetaBlock1d":
            linear = part(model, f"{at}.mlp.fc1", nn.Linear)
            width = linear.in_features
            fields.append(_attention_block(model, at, linear.out_features))
    stage: dict[str, Any] = {"width": width, "blocks": fields}
    if not isinstance(part(model, f"{path}.downsample", nn.Module), nn.Identity):
        stage["downsample"] = {"type": "conv3x3"}
    return stage


def _attention_block(model: nn.Module, path: str, ffn_dim: int) -> dict[str, Any]:
    mixer = f"{path}.token_mixer"
    return {
        "type": "mb3d",
        "heads": attribute(model, mixer, "num_heads"),
        "qk_dim": attribute(model, mixer, "key_dim"),
        "v_dim": attribute(model, mixer, "val_dim"),
        "ffn_dim": ffn_dim,
    }


def _pool(path: str, module: nn.Module) -> None:
    must(path, module, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _halving(path: str, module: nn.Module) -> None:
    has_bias(path, module)
    must(path, module, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=1)


_NORM = norm_with(NORM_EPS)
_BLOCK = r"stages\.\d+\.blocks\.\d+"
_EXPECTED: Expected = {
    "stem": ("Stem4", None),
    r"stem\.conv[12]|stages\.\d+\.downsample\.conv": ("Conv2d", _halving),
    r"stem\.act[12]": ("ReLU", None),
    r"stem\.norm[12]|stages\.\d+\.downsample\.norm": ("BatchNorm2d", _NORM),
    "stages": ("Sequential", None),
    r"stages\.\d+": ("EfficientFormerStage", None),
    r"stages\.\d+\.blocks": ("Sequential", None),
    r"stages\.[1-9]\d*\.downsample": ("Downsample", None),
    _BLOCK: ("MetaBlock2d|Flat|MetaBlock1d", None),
    rf"{_BLOCK}\.token_mixer": ("Pooling|Attention", None),
    rf"{_BLOCK}\.norm[12]": ("LayerNorm", _NORM),
    rf"{_BLOCK}\.ls[12]": ("LayerScale2d|LayerScale", None),
    rf"{_BLOCK}\.mlp": ("ConvMlpWithNorm|Mlp", None),
    rf"{_BLOCK}\.mlp\.fc[12]": ("Conv2d|Linear", has_bias),
    rf"{_BLOCK}\.mlp\.norm[12]": ("BatchNorm2d", _NORM),
    rf"{_BLOCK}\.token_mixer\.pool": ("AvgPool2d", _pool),
    rf"{_BLOCK}\.mlp\.act": ("GELU", exact_gelu),
    rf"{_BLOCK}\.token_mixer\.(qkv|proj)|head|head_dist": ("Linear", has_bias),
    "norm": ("LayerNorm", _NORM),
}
