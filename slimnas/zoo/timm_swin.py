"""The architecture of a Swin Transformer built by timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimnas.errors import UnsupportedModuleError
from slimnas.nn.swin import NORM_EPS
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

Pair = tuple[int, int]


def describe_swin(model: nn.Module) -> dict[str, Any]:
    """The fields of the Architecture of timm's SwinTransformer.

    Raises:
        UnsupportedModuleError: it is not built as slimnas builds it.
    """
    check_modules(model, _EXPECTED)
    must("", model, global_pool="avg")
    convolution = part(model, "patch_embed.proj", nn.Conv2d)
    part(model, "patch_embed.norm", nn.LayerNorm)
    count = len(part(model, "layers", nn.Sequential))
    return {
        "input": {
            "channels": convolution.in_channels,
            "resolution": list(attribute(model, "patch_embed", "img_size")),
        },
        "stem": {
            "type": "swin_stem",
            "width": convolution.out_channels,
            "patch": convolution.kernel_size[0],
        },
        "stages": [_stage(model, index) for index in range(count)],
        "head": {"type": "linear", "classes": part(model, "head.fc", nn.Linear).out_features},
    }


def _stage(model: nn.Module, index: int) -> dict[str, Any]:
    path = f"layers.{index}"
    count = len(part(model, f"{path}.blocks", nn.Sequential))
    blocks = [_block(model, f"{path}.blocks.{i}", _asked(model, index)) for i in range(count)]
    width = part(model, f"{path}.blocks.0.mlp.fc1", nn.Linear).in_features
    stage: dict[str, Any] = {"width": width, "blocks": blocks}
    if not isinstance(part(model, f"{path}.downsample", nn.Module), nn.Identity):
        stage["downsample"] = {"type": "patch_merging"}
    return stage


def _asked(model: nn.Module, index: int) -> int:
    """The side of the windows a stage was built with; 0 if it cannot be told."""
    windows = getattr(model, "_ref_window_sizes", ())
    return max(windows[index]) if index < len(windows) else 0


def _block(model: nn.Module, path: str, asked: int) -> dict[str, Any]:
    heads = attribute(model, f"{path}.attn", "num_heads")
    dim = part(model, f"{path}.attn.qkv", nn.Linear).out_features // (3 * heads)
    must(f"{path}.attn", part(model, f"{path}.attn", nn.Module), scale=dim**-0.5)
    grid, size, shift = (
        attribute(model, path, name) for name in ("input_resolution", "window_size", "shift_size")
    )
    # timm keeps what is left of a window on a small map, the architecture what was asked for.
    window = asked if _clipped(grid, asked) == tuple(size) else max(size)
    wanted = max(attribute(model, path, "target_shift_size"))
    if _clipped(grid, window) != tuple(size):
        raise UnsupportedModuleError(
            f"{path}.window_size: must be square but where the map is smaller, is {tuple(size)}"
        )
    if tuple(wanted if side > window else 0 for side in grid) != tuple(shift):
        raise UnsupportedModuleError(
            f"{path}.shift_size: must be {wanted} along sides longer than {window} and 0 along "
            f"others, is {tuple(shift)} on a map of {grid[0]}x{grid[1]}"
        )
    return {
        "type": "swin",
        "heads": heads,
        "qk_dim": dim,
        "v_dim": dim,
        "ffn_dim": part(model, f"{path}.mlp.fc1", nn.Linear).out_features,
        "window": window,
        "shift": wanted,
    }


def _clipped(grid: Pair, window: int) -> Pair:
    return min(grid[0], window), min(grid[1], window)


def _patches(path: str, module: nn.Module) -> None:
    assert isinstance(module, nn.Conv2d)
    has_bias(path, module)
    side = module.kernel_size[0]
    must(path, module, kernel_size=(side, side), stride=(side, side), padding=(0, 0), groups=1)


_BLOCK = r"layers\.\d+\.blocks\.\d+"
_NORM = norm_with(NORM_EPS)
_EXPECTED: Expected = {
    "patch_embed": ("PatchEmbed", None),
    r"patch_embed\.proj": ("Conv2d", _patches),
    rf"patch_embed\.norm|layers\.\d+\.downsample\.norm|{_BLOCK}\.norm[12]|norm": (
        "LayerNorm",
        _NORM,
    ),
    "layers": ("Sequential", None),
    r"layers\.\d+": ("SwinTransformerStage", None),
    r"layers\.[1-9]\d*\.downsample": ("PatchMerging", None),
    r"layers\.\d+\.downsample\.reduction": ("Linear", None),
    r"layers\.\d+\.blocks": ("Sequential", None),
    _BLOCK: ("SwinTransformerBlock", None),
    rf"{_BLOCK}\.attn": ("WindowAttention", None),
    rf"{_BLOCK}\.attn\.softmax": ("Softmax", None),
    rf"{_BLOCK}\.(attn\.(qkv|proj)|mlp\.fc[12])|head\.fc": ("Linear", has_bias),
    rf"{_BLOCK}\.mlp": ("Mlp", None),
    rf"{_BLOCK}\.mlp\.act": ("GELU", exact_gelu),
    "head": ("ClassifierHead", None),
    r"head\.global_pool": ("SelectAdaptivePool2d", None),
    r"head\.global_pool\.pool": ("FastAdaptiveAvgPool", None),
}
