"""Small networks of every family with random weights, and plans for them, for tests of pruning."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from slimnas.arch.architecture import Architecture
from slimnas.nn.build import Network, build
from slimnas.prune.scores import BlockScores, FloatArray, Scores, blocks_of, unit_shapes
from slimnas.prune.widths import (
    BlockPlan,
    Indexes,
    WidthPlan,
    attention_dims,
    block_components,
    embedding_groups,
    removable_layers,
)

VIT = """schema: slimnas/architecture/1
name: tiny_vit
input: {channels: 3, resolution: 32}
stem: {type: vit_stem, width: 24, patch: 16, distilled: true}
stages:
- width: 24
  blocks:
  - {type: vit, heads: 3, qk_dim: 4, v_dim: 5, ffn_dim: 8, repeat: 2}
  - {type: vit, heads: 2, qk_dim: 3, v_dim: 6, ffn_dim: 0}
head: {type: token, classes: 7, distilled: true}
"""
# 11x11 tokens in windows of 4: padded to 12x12; merging pads 11 to 12; then 6x6 padded to 8x8.
SWIN = """schema: slimnas/architecture/1
name: tiny_swin
input: {channels: 3, resolution: 22}
stem: {type: swin_stem, width: 8, patch: 2}
stages:
- width: 8
  blocks:
  - {type: swin, heads: 2, qk_dim: 4, v_dim: 5, ffn_dim: 6, window: 4}
  - {type: swin, heads: 3, qk_dim: 3, v_dim: 4, ffn_dim: 5, window: 4, shift: 2}
- width: 14
  downsample: {type: patch_merging}
  blocks:
  - {type: swin, heads: 2, qk_dim: 4, v_dim: 3, ffn_dim: 7, window: 4, shift: 1}
head: {type: linear, classes: 7}
"""
EFFICIENTFORMER = """schema: slimnas/architecture/1
name: tiny_efficientformer
input: {channels: 3, resolution: 32}
stem: {type: conv_stem, width: 8}
stages:
- {width: 8, blocks: [{type: mb4d, ffn_dim: 6}]}
- width: 12
  downsample: {type: conv3x3}
  blocks:
  - {type: mb4d, ffn_dim: 5}
  - {type: mb3d, heads: 3, qk_dim: 4, v_dim: 5, ffn_dim: 7}
  - {type: mb3d, heads: 2, qk_dim: 5, v_dim: 3, ffn_dim: 5}
head: {type: linear, classes: 7, distilled: true}
"""
ARCHITECTURES = {
    name: Architecture.from_yaml(text)
    for name, text in (("vit", VIT), ("swin", SWIN), ("efficientformer", EFFICIENTFORMER))
}
FAMILIES = sorted(ARCHITECTURES)


def random_network(architecture: Architecture, seed: int = 0) -> Network:
    """A float64 network in evaluation mode whose every weight, bias and statistic matters."""
    network = build(architecture).double().eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + normal(tensor).square())
            elif (".norm" in name and name.endswith("weight")) or name.endswith("gamma"):
                tensor.copy_(1 + 0.3 * normal(tensor))
            elif tensor.is_floating_point():
                tensor.copy_(0.3 * normal(tensor))
    return network


def images(architecture: Architecture, seed: int = 1) -> torch.Tensor:
    shape = architecture.input.shape
    generator = torch.Generator().manual_seed(seed)
    size = (2, shape.channels, shape.height, shape.width)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def with_block(plan: WidthPlan, name: str, block: BlockPlan) -> WidthPlan:
    return replace(plan, blocks={**plan.blocks, name: block})


def some(rng: random.Random, size: int, at_least: int = 1) -> Indexes:
    return tuple(sorted(rng.sample(range(size), rng.randint(min(at_least, size), size))))


def random_plan(architecture: Architecture, seed: int, *, embedding: bool = False) -> WidthPlan:
    """A legal plan that mixes all kinds of units, sub-layers and blocks that go included."""
    rng = random.Random(seed)
    blocks = {}
    for part, block in block_components(architecture):
        heads, qk_dim, v_dim = attention_dims(block)
        layers_may_go = removable_layers(block)
        kept = some(rng, heads) if heads else ()
        ffn = some(rng, block.hidden(part.input.channels))
        if layers_may_go and rng.random() < 0.35:
            kept = ()
        if layers_may_go and rng.random() < 0.35 and not part.name.endswith("blocks.0"):
            ffn = ()
        d, e = (rng.randint(1, size) if kept else 0 for size in (qk_dim, v_dim))
        qk = tuple(tuple(sorted(rng.sample(range(qk_dim), d))) for _ in kept)
        v = tuple(tuple(sorted(rng.sample(range(v_dim), e))) for _ in kept)
        blocks[part.name] = BlockPlan(kept, qk, v, ffn)
    plan = WidthPlan(architecture.digest, blocks)
    return replace(plan, embedding=random_embedding(architecture, rng)) if embedding else plan


def random_embedding(architecture: Architecture, rng: random.Random) -> tuple[Indexes, ...]:
    kept: list[Indexes] = []
    for i, first in enumerate(embedding_groups(architecture)):
        width = architecture.stages[i].width
        count = 2 * rng.randint(1, width // 2)  # even, for the convolutional stem
        fresh = tuple(sorted(rng.sample(range(width), count)))
        kept.append(kept[first] if first < i else fresh)
    return tuple(kept)


def random_scores(architecture: Architecture, seed: int = 0) -> Scores:
    """Lognormal importance of every unit; a head is worth more than its dims."""
    generator = np.random.default_rng(seed)

    def some(shape: tuple[int, ...]) -> FloatArray:
        return generator.lognormal(size=shape)

    blocks = {}
    for part in blocks_of(architecture):
        shapes = unit_shapes(part)
        values: dict[str, Any] = {kind: some(shape) for kind, shape in shapes.items()}
        values["head"] = values["qk"].sum(1) + values["v"].sum(1) + 1
        attention = float(values["head"].sum() * 1.1)
        values |= {"attention_layer": attention, "ffn_layer": float(values["ffn"].sum() * 1.1)}
        blocks[part.name] = BlockScores(**values)
    return Scores(
        criterion="random",
        architecture=architecture.digest,
        weights="",
        data="",
        images=0,
        batch_size=0,
        seed=seed,
        blocks=blocks,
        embedding=tuple(some((width,)) for width in architecture.widths),
    )
