"""EfficientViTs of timm, as a reference, and the architectures they are."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.efficientvit_msra import EfficientVitMsra
from torch import Tensor, nn

from slimnas.arch.architecture import SCHEMA, Architecture

NAMES = [f"efficientvit_m{size}" for size in range(6)]
SMALL = {"widths": (16, 24, 32), "depths": (1, 2, 1), "heads": (2, 3, 4), "kernels": (7, 5, 3, 3)}
"""Of a small network of three stages; the kernels are the heads', in order, of every stage."""
CLASSES = 5
QK_DIM = 4


def small_timm(image: int | tuple[int, int], window: int = 3, **options: Any) -> nn.Module:
    """A small EfficientViT of timm, randomised."""
    torch.manual_seed(0)
    model = EfficientVitMsra(
        img_size=image,
        num_classes=CLASSES,
        embed_dim=SMALL["widths"],
        key_dim=(QK_DIM,) * 3,
        depth=SMALL["depths"],
        num_heads=SMALL["heads"],
        window_size=(window,) * 3,
        kernels=SMALL["kernels"],
        **options,
    )
    return randomised(model)


def like_timms(image: int | tuple[int, int], window: int = 3) -> Architecture:
    """The architecture of `small_timm` with the same arguments."""
    blocks = [
        {"heads": heads, "qk_dim": QK_DIM, "kernels": list(SMALL["kernels"][:heads])}
        | {"window": window, "repeat": depth}
        for heads, depth in zip(SMALL["heads"], SMALL["depths"], strict=True)
    ]
    return efficientvit(image=image, stages=[[block] for block in blocks])


def efficientvit(
    *,
    image: int | tuple[int, int],
    stages: list[list[dict[str, Any]]],
    widths: tuple[int, ...] = SMALL["widths"],
    downsample: dict[str, Any] | None = None,
    distilled: bool = False,
) -> Architecture:
    """An EfficientViT with these blocks; `downsample` are fields of the subsampling."""
    body = [
        {
            "width": width,
            "blocks": [{"type": "efficientvit", **block} for block in blocks],
            **(
                {"downsample": {"type": "efficientvit_subsample", **(downsample or {})}}
                if i
                else {}
            ),
        }
        for i, (width, blocks) in enumerate(zip(widths, stages, strict=False))
    ]
    return Architecture.from_dict(
        {
            "schema": SCHEMA,
            "name": "small_efficientvit",
            "input": {"resolution": list(image) if isinstance(image, tuple) else image},
            "stem": {"type": "efficientvit_stem", "width": widths[0]},
            "stages": body,
            "head": {"type": "pooled_bn", "classes": CLASSES, "distilled": distilled},
        }
    )


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic that starts at a constant far from it."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
                uniform(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
                uniform(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                uniform(parameter, -2.0, 2.0)
            elif parameter.dim() == 2 or name.endswith(("fc1.bias", "fc2.bias", "linear.bias")):
                uniform(parameter, -0.3, 0.3)
    return model


def images(size: int | tuple[int, int], count: int = 2) -> Tensor:
    """Random images (count, 3, *size) in float64, of unequal contrast.

    Alike ones would all but cancel in a BatchNorm over a small batch.
    """
    sides = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, *sides, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.5, 2, count, dtype=torch.float64).view(-1, 1, 1, 1)


def off(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest output."""
    assert theirs.std() > 0.05
    return float((ours - theirs).abs().max() / theirs.abs().max())
