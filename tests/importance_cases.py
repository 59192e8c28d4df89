"""What tests of importance share: images, the units there are, and how to compare scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network
from slimnas.prune.scores import Scores, blocks_of

Batch = tuple[Tensor, Tensor]
KINDS = ("qk", "v", "ffn", "head", "attention_layer", "ffn_layer")


def batches(architecture: Architecture, sizes: tuple[int, ...] = (3, 2)) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    shape = architecture.input.shape
    size = (sum(sizes), shape.channels, shape.height, shape.width)
    images = torch.randn(size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, architecture.head.classes, (sum(sizes),), generator=generator)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def singles(given: list[Batch]) -> list[Batch]:
    return [
        (x[None], y[None]) for images, labels in given for x, y in zip(images, labels, strict=True)
    ]


def has_attention(block: Any) -> bool:
    return getattr(block.spec, "heads", 0) > 0


def attention_name(block: Any) -> str:
    return "token_mixer" if block.spec.type == "mb3d" else "attn"


def qkv_rows(block: Any, kind: str, head: int, dim: int) -> int:
    """Row of the joint projection, counted from the layouts' descriptions."""
    spec = block.spec
    if spec.type == "mb3d":
        start = {"q": 0, "k": spec.qk_dim, "v": 2 * spec.qk_dim}[kind]
        return int(head * (2 * spec.qk_dim + spec.v_dim) + start + dim)
    start = {"q": 0, "k": spec.heads * spec.qk_dim, "v": 2 * spec.heads * spec.qk_dim}[kind]
    return int(start + head * (spec.v_dim if kind == "v" else spec.qk_dim) + dim)


def losses(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    logits = network(images)
    assert isinstance(logits, Tensor)
    return cross_entropy(logits, labels, reduction="none")


def unit_count(architecture: Architecture, *, layers: bool = True) -> int:
    """Units there are; a sub-layer that is not there is none."""
    count = sum(architecture.widths)
    for block in blocks_of(architecture):
        spec: Any = block.spec
        if has_attention(block):
            count += spec.heads * (spec.qk_dim + spec.v_dim + 1) + layers
        count += spec.ffn_dim + (layers and spec.ffn_dim > 0)
    return count


def assert_same_units(one: Scores, other: Scores, rtol: float = 0.0) -> int:
    compared = 0
    for name, block in one.blocks.items():
        for kind in KINDS:
            mine, theirs = np.asarray(getattr(block, kind)), getattr(other.blocks[name], kind)
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=0 if not rtol else 1e-18)
            compared += mine.size
    for mine, theirs in zip(one.embedding, other.embedding, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=0 if not rtol else 1e-18)
        compared += mine.size
    return compared
