"""Small LITv2s, and modules with weights away from their starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimnas.arch.architecture import SCHEMA, Architecture

ATTENTION = {"type": "hilo", "heads": 4, "lo_heads": 3, "window": 2}
GLOBAL = {"type": "hilo", "heads": 4, "lo_heads": 4, "window": 1}


def litv2_architecture(
    image: tuple[int, int] = (64, 64), *, deformable: bool = False, blocks: Any = None
) -> Architecture:
    """Stages of widths 8, 16, 24, 32 built as LITv2's; `blocks` are those of the third."""
    merging = {"type": "dtm", "deformable": deformable}
    third = blocks or [ATTENTION, ATTENTION]
    return Architecture.from_dict(
        {
            "schema": SCHEMA,
            "name": "small_litv2",
            "input": {"resolution": list(image)},
            "stem": {"type": "swin_stem", "width": 8, "patch": 4},
            "stages": [
                {"width": 8, "blocks": [{"type": "conv_ffn"}]},
                {"width": 16, "downsample": merging, "blocks": [{"type": "conv_ffn"}]},
                {"width": 24, "downsample": merging, "blocks": third},
                {"width": 32, "downsample": merging, "blocks": [GLOBAL]},
            ],
            "head": {"type": "linear", "classes": 5},
        }
    )


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator) * 0.3)
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                size = 0.3 if ".offset." in f".{name}" else 1.0
                parameter.copy_(size * noise / parameter[0].numel() ** 0.5)
    return module


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    """Random images (count, 3, *size)."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def varied(
    architecture: Architecture,
    *,
    deformable: bool = True,
    third: dict[str, Any] | None = None,
    fourth: dict[str, Any] | None = None,
) -> Architecture:
    """The same network with other merging and with other attention in the last two stages."""
    body = architecture.to_dict()
    for stage, fields in zip(body["stages"], (None, None, third, fourth), strict=True):
        if "downsample" in stage:
            stage["downsample"]["deformable"] = deformable
        if fields:
            stage["blocks"] = [{**block, **fields} for block in stage["blocks"]]
    return Architecture.from_dict(body)
