"""EfficientFormerV2s of timm, as a reference, and the architectures they are."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.efficientformer_v2 import EfficientFormerV2
from torch import Tensor, nn

from slimnas.arch.architecture import SCHEMA, Architecture
from slimnas.nn.build import Network, build
from slimnas.zoo.convert import convert_state_dict

NAMES = [f"efficientformerv2_{size}" for size in ("l", "s0", "s1", "s2")]

ATTENTION = {"type": "v2_attention", "heads": 8, "qk_dim": 32, "v_dim": 128}


def small_architecture(
    image: tuple[int, int] = (64, 96), *, distilled: bool = True, classes: int = 5
) -> Architecture:
    """The architecture of `small_timm` with the same arguments."""
    plain = {"type": "conv3x3"}
    stages: list[dict[str, Any]] = [
        {"width": 8, "blocks": [{"type": "v2_ffn", "ffn_dim": 16}]},
        {"width": 12, "downsample": plain, "blocks": [{"type": "v2_ffn", "ffn_dim": 36}]},
        {
            "width": 16,
            "downsample": plain,
            "blocks": [
                {"type": "v2_ffn", "ffn_dim": 32},
                {**ATTENTION, "stride": 2, "ffn_dim": 64},
            ],
        },
        {
            "width": 24,
            "downsample": {"type": "conv3x3_attention", "heads": 8, "qk_dim": 16, "v_dim": 64},
            "blocks": [{"type": "v2_ffn", "ffn_dim": 72}, {**ATTENTION, "ffn_dim": 48}],
        },
    ]
    return Architecture.from_dict(
        {
            "schema": SCHEMA,
            "name": "small_v2",
            "input": {"resolution": list(image)},
            "stem": {"type": "conv_stem", "width": 8, "act": "gelu"},
            "stages": stages,
            "head": {"type": "bn_linear", "classes": classes, "distilled": distilled},
        }
    )


def small_timm(
    image: tuple[int, int] = (64, 96), *, distilled: bool = True, **options: Any
) -> nn.Module:
    """A small EfficientFormerV2 of timm, randomised."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "depths": (1, 1, 2, 2),
        "embed_dims": (8, 12, 16, 24),
        "mlp_ratios": (2, 3, (2, 4), (3, 2)),
        "num_vit": 1,
        "img_size": image,
        "num_classes": 5,
        "distillation": distilled,
    }
    return randomised(EfficientFormerV2(**{**fields, **options}))


def published_timm(name: str, **options: Any) -> nn.Module:
    """timm's model of that name without its weights, randomised."""
    torch.manual_seed(0)
    return randomised(timm.create_model(name, drop_path_rate=0.0, **options))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move everything far from where it starts, so that every part counts in the output."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
        tensor.copy_(values.to(tensor.dtype))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                uniform(parameter, -2.0, 2.0)
            elif name.endswith("gamma"):
                uniform(parameter, 0.05, 0.2)
            elif parameter.dim() > 1:
                reach = (3 / parameter[0].numel()) ** 0.5  # keeps variances
                uniform(parameter, -reach, reach)
            else:
                uniform(parameter, -0.1, 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
                uniform(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    return model


def with_weights_of(reference: nn.Module, architecture: Architecture) -> Network:
    """The network of `architecture` with timm's weights."""
    network = build(architecture, seed=5)
    network.load_state_dict(convert_state_dict(reference.state_dict(), architecture))
    return network.to(next(reference.parameters()).dtype)


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    """Images (count, 3, *size) of noise over a colour each, so that they differ after pooling."""
    generator = torch.Generator().manual_seed(1)
    colours = 3 * torch.randn(count, 3, 1, 1, generator=generator)
    return colours + torch.randn(count, 3, *size, generator=generator)
