"""ViT and DeiT for tests: timm's networks with every parameter moved, and small architectures."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.zoo.registry import get

TIMM_NAMES = {
    **{f"deit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{
        f"deit_{size}_distilled": f"deit_{size}_distilled_patch16_224"
        for size in ("tiny", "small", "base")
    },
    **{
        f"vit_{size}_patch16": f"vit_{size}_patch16_224"
        for size in ("tiny", "small", "base", "large")
    },
    **{f"vit_{size}_patch32": f"vit_{size}_patch32_224" for size in ("small", "base", "large")},
}
"""The zoo's name -> timm's."""

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
"""Arguments of a small network of timm's."""


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every parameter that starts at or near a constant moved away from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator).to(parameter.dtype) - 0.5
            if parameter.dim() == 1 or "token" in name:
                parameter.add_(noise)
            elif name.endswith("qkv.weight"):
                parameter.mul_(4)
    return model


def timm_model(name: str, depth: int | None = None, **options: Any) -> nn.Module:
    """timm's randomised model of a zoo name, in evaluation mode; `depth` blocks if given."""
    if depth is not None:
        options["depth"] = depth
    model = timm.create_model(TIMM_NAMES[name], **{"num_classes": 1000, **options})
    return randomised(model).eval()


def with_depth(name: str, depth: int | None) -> Architecture:
    """The zoo's architecture, with `depth` blocks if given."""
    data = get(name).architecture.to_dict()
    if depth is not None:
        data["stages"][0]["blocks"][0]["repeat"] = depth
    return Architecture.from_dict(data)


def hugging_face_layout(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """timm's state dict under the names of transformers' `kind`ForImageClassification."""
    heads = {"head": "classifier", "head_dist": "distillation_classifier"}
    if "head_dist.weight" in state:
        heads["head"] = "cls_classifier"
    whole = {
        "cls_token": f"{kind}.embeddings.cls_token",
        "dist_token": f"{kind}.embeddings.distillation_token",
        "pos_embed": f"{kind}.embeddings.position_embeddings",
    }
    modules = {
        "patch_embed.proj": f"{kind}.embeddings.patch_embeddings.projection",
        "norm": f"{kind}.layernorm",
        **heads,
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if name in whole:
            renamed[whole[name]] = tensor
        elif module in modules:
            renamed[f"{modules[module]}.{last}"] = tensor
        else:
            _, number, part = module.split(".", 2)
            layer = f"{kind}.encoder.layer.{number}"
            if part == "attn.qkv":
                for which, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{layer}.attention.attention.{which}.{last}"] = chunk
            else:
                renamed[f"{layer}.{parts[part]}.{last}"] = tensor
    return renamed


def mixed_architecture(distilled: bool = True) -> Architecture:
    """Four blocks of unequal widths, one without attention, one without FFN."""
    blocks = [
        {"type": "vit", "heads": 3, "qk_dim": 5, "v_dim": 8},
        {"type": "vit", "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 7},
        {"type": "vit", "heads": 1, "qk_dim": 8, "v_dim": 4, "ffn_dim": 0},
        {"type": "vit", "heads": 2, "qk_dim": 1, "v_dim": 3, "ffn_dim": 50},
    ]
    data = {
        "schema": "slimnas/architecture/1",
        "name": "mixed",
        "input": {"resolution": [32, 24]},
        "stem": {"type": "vit_stem", "width": 24, "patch": 8, "distilled": distilled},
        "stages": [{"width": 24, "blocks": blocks}],
        "head": {"type": "token", "classes": 7, "distilled": distilled},
    }
    return Architecture.from_dict(data)
