"""Networks that runtimes are tested on: pruned shapes, every layout change, weights away from their
starts."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network, build
from slimnas.runtimes.registry import RUNTIMES

LIBRARIES = {name: "coremltools" if name == "coreml" else name for name in RUNTIMES}
CONVERTING = [name for name in RUNTIMES if importlib.util.find_spec(LIBRARIES[name])]
RUNNING = [name for name in CONVERTING if name != "coreml" or sys.platform == "darwin"]
"""Runtimes that run on this machine."""

ATTENTION = {"type": "mb3d", "heads": 2, "qk_dim": 4, "v_dim": 6}
VIT = {
    "input": {"resolution": [32, 24]},
    "stem": {"type": "vit_stem", "width": 24, "patch": 8, "distilled": True},
    "stages": [
        {
            "width": 24,
            "blocks": [
                {"type": "vit", "heads": 3, "qk_dim": 4, "v_dim": 7, "ffn_dim": 31},
                {"type": "vit", "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 9},
                {"type": "vit", "heads": 1, "qk_dim": 5, "v_dim": 2, "ffn_dim": 0},
            ],
        }
    ],
    "head": {"type": "token", "classes": 5, "distilled": True},
}
SHIFTED = {"type": "swin", "window": 4, "shift": 2}
SWIN = {
    "input": {"resolution": [40, 24]},
    "stem": {"type": "swin_stem", "width": 12, "patch": 4},
    "stages": [
        {
            "width": 12,
            "blocks": [
                {**SHIFTED, "shift": 0, "heads": 3, "qk_dim": 2, "v_dim": 5, "ffn_dim": 7},
                {**SHIFTED, "heads": 2, "qk_dim": 4, "v_dim": 1, "ffn_dim": 0},
            ],
        },
        {
            "width": 24,
            "downsample": {"type": "patch_merging"},
            "blocks": [
                {**SHIFTED, "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 9},
                {**SHIFTED, "shift": 1, "heads": 1, "qk_dim": 3, "v_dim": 8, "ffn_dim": 5},
            ],
        },
    ],
    "head": {"type": "linear", "classes": 5},
}
CASCADED = {"type": "efficientvit", "heads": 2, "qk_dim": 3, "kernels": [5, 3], "window": 2}
EFFICIENTVIT = {
    "input": {"resolution": [96, 80]},
    "stem": {"type": "efficientvit_stem", "width": 16},
    "stages": [
        {"width": 16, "blocks": [CASCADED]},  # 6x5 is padded to windows of 2x2
        {
            "width": 18,
            "downsample": {"type": "efficientvit_subsample", "inner_dim": 24},
            "blocks": [
                {**CASCADED, "ffns": 2, "window": 7},
                {**CASCADED, "cascade": False, "v_dim": 5, "ffn_dim": 9},
            ],
        },
    ],
    "head": {"type": "pooled_bn", "classes": 5, "distilled": True},
}
V2_ATTENTION = {"type": "v2_attention", "heads": 2, "qk_dim": 4, "v_dim": 6}
EFFICIENTFORMERV2 = {
    "input": {"resolution": [64, 32]},
    "stem": {"type": "conv_stem", "width": 8, "act": "gelu"},
    "stages": [
        {"width": 8, "blocks": [{"type": "v2_ffn"}, {**V2_ATTENTION, "stride": 2}]},
        {
            "width": 12,
            "downsample": {"type": "conv3x3_attention", "heads": 3, "qk_dim": 5, "v_dim": 2},
            "blocks": [{"type": "v2_ffn", "ffn_dim": 9}, V2_ATTENTION],
        },
    ],
    "head": {"type": "bn_linear", "classes": 5, "distilled": True},
}
HILO = {"type": "hilo", "heads": 4, "lo_heads": 3, "window": 2}
LITV2 = {
    "input": {"resolution": [72, 40]},  # the second map, 9x5, is padded to windows of 2x2
    "stem": {"type": "swin_stem", "width": 8, "patch": 4},
    "stages": [
        {"width": 8, "blocks": [{"type": "conv_ffn"}]},
        {
            "width": 12,
            "downsample": {"type": "dtm"},
            "blocks": [HILO, {**HILO, "heads": 3, "lo_heads": 0}],
        },
        {
            "width": 16,
            "downsample": {"type": "dtm"},
            "blocks": [{**HILO, "lo_heads": 4, "window": 1}, HILO],
        },
    ],
    "head": {"type": "linear", "classes": 5},
}
MIXED = {
    "stem": {"type": "conv_stem", "width": 8},
    "stages": [
        {"width": 8, "blocks": [{"type": "mb4d"}, ATTENTION]},
        {
            "width": 12,
            "downsample": {"type": "conv3x3"},
            "blocks": [ATTENTION, {"type": "mb4d"}, ATTENTION],
        },
    ],
    "head": {"type": "linear", "classes": 5, "distilled": True},
}


def network_of(body: dict[str, Any]) -> Network:
    """The network, its weights away from their starts."""
    document = {"schema": "slimnas/architecture/1", "name": "small", **body}
    architecture = Architecture.from_dict(document)
    network = build(architecture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for part in network.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.add_(torch.randn(part.num_features, generator=generator))
                part.running_var.add_(torch.rand(part.num_features, generator=generator))
    return network


def logits(network: Network, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        out: np.ndarray = network.eval()(x).numpy()
    return out


def image_of(network: Network, batch: int = 1) -> Tensor:
    shape = network.architecture.input.shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator)
