"""The two layouts of a feature map, and the one place that changes between them.

Convolutional modules work on maps (B, C, H, W), attention modules on tokens (B, H*W, C). Each
module class says which in its class attribute `layout`. A network converts only where the layout
changes: reshapes between neighbouring blocks cost time on a device (EfficientFormer, section 3.1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from slimnas.arch.shapes import FeatureShape

Layout = Literal["map", "tokens"]


def to_tokens(x: Tensor) -> Tensor:
    """Turn a map (B, C, H, W) into tokens (B, H*W, C), row by row."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, shape: FeatureShape) -> Tensor:
    """Turn tokens (B, extra + H*W, C) into a map (B, C, H, W) of `shape`; extra tokens go.

    Without extra tokens it is the inverse of `to_tokens`.
    """
    if shape.extra_tokens:
        x = x[:, shape.extra_tokens :]
    # All sizes but the batch are Python ints: exporters trip over sizes read from tensors. In this
    # order PyTorch makes a channels-last view, and knows it for one even of a single image.
    return x.reshape(-1, shape.height, shape.width, shape.channels).permute(0, 3, 1, 2)


def layout_of(module: nn.Module) -> Layout:
    """The layout `module` takes and gives: its class attribute `layout`, by default map."""
    return "tokens" if getattr(module, "layout", "map") == "tokens" else "map"


def as_layout(x: Tensor, layout: Layout, shape: FeatureShape) -> Tensor:
    """Return `x`, a map or tokens of one `shape`, in `layout`; unchanged if it has it already."""
    if layout == "tokens" and x.dim() == 4:
        return to_tokens(x)
    if layout == "map" and x.dim() == 3:
        return to_map(x, shape)
    return x


def run_module(module: nn.Module, x: Tensor, shape: FeatureShape) -> Tensor:
    """Call `module` on `x`, a map or tokens of `shape`, in the layout it works in."""
    out: Tensor = module(as_layout(x, layout_of(module), shape))
    return out


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is running; sizes are tensors then and must not be compared."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
