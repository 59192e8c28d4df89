"""Swins of timm, as a reference, and the architectures they are."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from slimnas.arch.architecture import SCHEMA, Architecture

Blocks = list[dict[str, Any]]


def swin_architecture(
    *, image: tuple[int, int], stages: list[Blocks], width: int = 12, classes: int = 5
) -> Architecture:
    """A Swin whose widths double from stage to stage."""
    body = [
        {
            "width": width * 2**index,
            "blocks": [{"type": "swin", **block} for block in blocks],
            **({"downsample": {"type": "patch_merging"}} if index else {}),
        }
        for index, blocks in enumerate(stages)
    ]
    return Architecture.from_dict(
        {
            "schema": SCHEMA,
            "name": "small_swin",
            "input": {"resolution": list(image)},
            "stem": {"type": "swin_stem", "width": width, "patch": 4},
            "stages": body,
            "head": {"type": "linear", "classes": classes},
        }
    )


def like_timms(image: tuple[int, int], window: int, stages: int = 2) -> Architecture:
    """The architecture of `small_timm` with the same arguments."""
    shift = window // 2
    return swin_architecture(
        image=image,
        stages=[
            [
                {"heads": 2 * 2**i, "qk_dim": 6, "v_dim": 6, "window": window, "shift": s}
                for s in (0, shift)
            ]
            for i in range(stages)
        ],
    )


def small_timm(image: tuple[int, int], window: int, stages: int = 2) -> nn.Module:
    """A small Swin of timm, randomised."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=image,
        patch_size=4,
        num_classes=5,
        embed_dim=12,
        depths=(2,) * stages,
        num_heads=tuple(2 * 2**i for i in range(stages)),
        window_size=window,
        drop_path_rate=0.0,
    )
    return randomised(model)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter but the stem's convolution far from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(noise)
            elif parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif parameter.dim() == 2:
                parameter.add_(noise / parameter.shape[1] ** 0.5)
    return model


def images(size: tuple[int, int], count: int = 2) -> torch.Tensor:
    """Random images (count, 3, *size) in float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)
