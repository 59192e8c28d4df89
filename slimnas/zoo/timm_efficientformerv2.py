"""The architecture of an EfficientFormerV2 built by timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimnas.errors import UnsupportedModuleError
from slimnas.nn.layers import BATCH_NORM_EPS
from slimnas.zoo.timm_modules import (
    Check,
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
"""What timm builds for by default; only attention depends on it."""

_STEM_STRIDE = 4


def describe_efficientformerv2(model: nn.Module) -> dict[str, Any]:
    """The fields of the Architecture of timm's EfficientFormerV2.

    Raises:
        UnsupportedModuleError: it is not built as slimnas builds it.
    """
    must("", model, global_pool="avg")
    check_modules(model, _EXPECTED)
    first = part(model, "stem.conv1.conv", nn.Conv2d)
    width = part(model, "stem.conv2.conv", nn.Conv2d).out_channels
    stages = [
        _stage(model, f"stages.{i}") for i in range(len(part(model, "stages", nn.Sequential)))
    ]
    return {
        "input": {"channels": first.in_channels, "resolution": _resolution(model, stages)},
        "stem": {"type": "conv_stem", "width": width, "act": "gelu"},
        "stages": stages,
        "head": {
            "type": "bn_linear",
            "classes": part(model, "head", nn.Linear).out_features,
            "distilled": getattr(model, "head_dist", None) is not None,
        },
    }


def _stage(model: nn.Module, path: str) -> dict[str, Any]:
    count = len(part(model, f"{path}.blocks", nn.Sequential))
    blocks = [_block(model, f"{path}.blocks.{i}") for i in range(count)]
    width = part(model, f"{path}.blocks.0.mlp.fc1.conv", nn.Conv2d).in_channels
    stage: dict[str, Any] = {"width": width, "blocks": blocks}
    if isinstance(part(model, f"{path}.downsample", nn.Module), nn.Identity):
        return stage
    attention = attribute(model, f"{path}.downsample", "attn") is not None
    downsample: dict[str, Any] = {"type": "conv3x3"}
    if attention:
        downsample = {
            "type": "conv3x3_attention",
            **_heads(model, f"{path}.downsample.attn", f"{path}.downsample.attn.q.proj.conv"),
        }
    return {**stage, "downsample": downsample}


def _block(model: nn.Module, path: str) -> dict[str, Any]:
    hidden = part(model, f"{path}.mlp.fc1.conv", nn.Conv2d).out_channels
    mixer = f"{path}.token_mixer"
    if attribute(model, path, "token_mixer") is None:
        return {"type": "v2_ffn", "ffn_dim": hidden}
    stride = 1
    if attribute(model, mixer, "stride_conv") is not None:
        stride = part(model, f"{mixer}.stride_conv.conv", nn.Conv2d).stride[0]
    return {
        "type": "v2_attention",
        **_heads(model, mixer, f"{mixer}.q.conv"),
        "stride": stride,
        "ffn_dim": hidden,
    }


def _heads(model: nn.Module, path: str, queries: str) -> dict[str, int]:
    heads: int = attribute(model, path, "num_heads")
    qk_dim = part(model, queries, nn.Conv2d).out_channels // heads
    must(path, part(model, path, nn.Module), key_dim=qk_dim, scale=qk_dim**-0.5)
    values = part(model, f"{path}.v.conv", nn.Conv2d).out_channels
    return {"heads": heads, "qk_dim": qk_dim, "v_dim": values // heads}


def _resolution(model: nn.Module, stages: list[dict[str, Any]]) -> list[int]:
    """The largest image that attention was built for; timm keeps no other trace of it."""
    stride = _STEM_STRIDE
    for index, stage in enumerate(stages):
        path = f"stages.{index}"
        if "downsample" in stage:
            if stage["downsample"]["type"] == "conv3x3_attention":
                grid = attribute(model, f"{path}.downsample.attn", "resolution")
                return [side * stride for side in grid]
            stride *= 2
        for number, block in enumerate(stage["blocks"]):
            if block["type"] == "v2_attention":
                grid = attribute(model, f"{path}.blocks.{number}.token_mixer", "resolution")
                return [side * stride * block["stride"] for side in grid]
    return [_RESOLUTION, _RESOLUTION]


def _convolution(kernel: int, stride: int = 1, *, depthwise: bool = False) -> Check:
    """A check of a convolution with bias and the padding that keeps a map's size."""

    def check(path: str, module: nn.Module) -> None:
        assert isinstance(module, nn.Conv2d)
        has_bias(path, module)
        groups = module.in_channels if depthwise else 1
        same = (kernel // 2, kernel // 2)
        must(path, module, kernel_size=(kernel, kernel), padding=same, groups=groups)
        must(path, module, stride=(stride, stride), dilation=(1, 1))

    return check


def _upsampling(path: str, module: nn.Module) -> None:
    must(path, module, scale_factor=2.0, mode="bilinear")
    if getattr(module, "align_corners", None):
        raise UnsupportedModuleError(f"{path}.align_corners: must not be set")


def _every_second(path: str, module: nn.Module) -> None:
    must(path, module, kernel_size=1, stride=2, padding=0)


_NORM = norm_with(BATCH_NORM_EPS)
_BLOCK = r"stages\.\d+\.blocks\.\d+"
_MIXER = rf"{_BLOCK}\.token_mixer"
_DOWN = r"stages\.\d+\.downsample"
_ACTIVATED = rf"stem\.conv[12]|{_BLOCK}\.mlp\.(fc1|mid)"
_PROJECTIONS = rf"{_MIXER}\.(q|k|v|proj)|{_DOWN}\.attn\.(k|v|proj|q\.proj)|{_BLOCK}\.mlp\.fc2"
_DEPTHWISE = rf"{_MIXER}\.v_local"
_HALVING = rf"{_MIXER}\.stride_conv|{_DOWN}\.attn\.v_local"
_EXPECTED: Expected = {
    "stem": ("Stem4", None),
    "stages": ("Sequential", None),
    r"stages\.\d+": ("EfficientFormerV2Stage", None),
    r"stages\.\d+\.blocks": ("Sequential", None),
    r"stages\.[1-9]\d*\.downsample": ("Downsample|Identity", None),
    rf"{_DOWN}\.attn": ("Attention2dDownsample", None),
    rf"{_DOWN}\.attn\.q": ("LocalGlobalQuery", None),
    rf"{_DOWN}\.attn\.q\.pool": ("AvgPool2d", _every_second),
    _BLOCK: ("EfficientFormerV2Block", None),
    _MIXER: ("Attention2d", None),
    rf"{_MIXER}\.upsample": ("Upsample", _upsampling),
    rf"{_MIXER}\.talking_head[12]": ("Conv2d", _convolution(1)),
    rf"{_BLOCK}\.ls[12]": ("LayerScale2d", None),
    rf"{_BLOCK}\.mlp": ("ConvMlpWithNorm", None),
    _ACTIVATED: ("ConvNormAct", None),
    rf"({_ACTIVATED})\.bn": ("BatchNormAct2d", _NORM),
    rf"({_ACTIVATED})\.bn\.act|({_MIXER}|{_DOWN}\.attn)\.act": ("GELU", exact_gelu),
    rf"{_PROJECTIONS}|{_DEPTHWISE}|{_HALVING}|{_DOWN}\.conv": ("ConvNorm", None),
    rf"({_PROJECTIONS}|{_DEPTHWISE}|{_HALVING}|{_DOWN}\.conv)\.bn|norm": ("BatchNorm2d", _NORM),
    rf"stem\.conv[12]\.conv|{_DOWN}\.conv\.conv": ("Conv2d", _convolution(3, 2)),
    rf"{_BLOCK}\.mlp\.fc1\.conv|({_PROJECTIONS})\.conv": ("Conv2d", _convolution(1)),
    rf"({_DEPTHWISE}|{_BLOCK}\.mlp\.mid)\.conv": ("Conv2d", _convolution(3, depthwise=True)),
    rf"({_HALVING})\.conv|{_DOWN}\.attn\.q\.local": (
        "Conv2d",
        _convolution(3, 2, depthwise=True),
    ),
    "head|head_dist": ("Linear", has_bias),
}
