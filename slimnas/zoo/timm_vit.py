"""The architecture of a ViT or DeiT built by timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimnas.errors import UnsupportedModuleError
from slimnas.nn.vit import NORM_EPS
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


def describe_vit(model: nn.Module) -> dict[str, Any]:
    """The fields of the Architecture of timm's VisionTransformer or VisionTransformerDistilled.

    Raises:
        UnsupportedModuleError: it is not built as slimnas builds it.
    """
    _check_attributes(model)
    check_modules(model, _EXPECTED)
    convolution = part(model, "patch_embed.proj", nn.Conv2d)
    classes = part(model, "head", nn.Linear).out_features
    distilled = attribute(model, "", "dist_token") is not None
    width = convolution.out_channels
    depth = len(part(model, "blocks", nn.Sequential))
    blocks = [_block(model, f"blocks.{i}") for i in range(depth)]
    return {
        "input": {
            "channels": convolution.in_channels,
            "resolution": list(attribute(model, "patch_embed", "img_size")),
        },
        "stem": {
            "type": "vit_stem",
            "width": width,
            "patch": convolution.kernel_size[0],
            "distilled": distilled,
        },
        "stages": [{"width": width, "blocks": blocks}],
        "head": {"type": "token", "classes": classes, "distilled": distilled},
    }


def _block(model: nn.Module, path: str) -> dict[str, Any]:
    dim = attribute(model, f"{path}.attn", "head_dim")
    return {
        "type": "vit",
        "heads": attribute(model, f"{path}.attn", "num_heads"),
        "qk_dim": dim,
        "v_dim": dim,
        "ffn_dim": part(model, f"{path}.mlp.fc1", nn.Linear).out_features,
    }


def _check_attributes(model: nn.Module) -> None:
    must("", model, global_pool="token", no_embed_class=False)
    if getattr(model, "reg_token", None) is not None:
        raise UnsupportedModuleError("reg_token: register tokens; slimnas's ViT has none")
    for name in ("cls_token", "pos_embed"):
        if getattr(model, name, None) is None:
            raise UnsupportedModuleError(f"{name}: missing; slimnas's ViT has one")
    if attribute(model, "patch_embed", "img_size") is None:
        raise UnsupportedModuleError("patch_embed.img_size: missing; build it for one image size")


def _patches(path: str, module: nn.Module) -> None:
    assert isinstance(module, nn.Conv2d)
    has_bias(path, module)
    side = module.kernel_size[0]
    must(path, module, kernel_size=(side, side), stride=(side, side), padding=(0, 0), groups=1)


def _attention(path: str, module: nn.Module) -> None:
    dim = getattr(module, "head_dim", None)
    if not isinstance(dim, int):
        raise UnsupportedModuleError(f"{path}.head_dim: missing")
    must(path, module, scale=dim**-0.5)


_EXPECTED: Expected = {
    "patch_embed": ("PatchEmbed", None),
    r"patch_embed\.proj": ("Conv2d", _patches),
    "blocks": ("Sequential", None),
    r"blocks\.\d+": ("Block", None),
    r"blocks\.\d+\.norm[12]|norm": ("LayerNorm", norm_with(NORM_EPS)),
    r"blocks\.\d+\.attn": ("Attention", _attention),
    r"blocks\.\d+\.mlp": ("Mlp", None),
    r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])|head|head_dist": ("Linear", has_bias),
    r"blocks\.\d+\.mlp\.act": ("GELU", exact_gelu),
}
