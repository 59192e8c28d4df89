"""A micro search space with attention in its last two stages, and supernets of it."""

from __future__ import annotations

import torch
from torch import Tensor

from slimnas.arch.space import SearchSpace
from slimnas.supernet.supernet import Supernet

RESOLUTION = 48
CLASSES = 5

MICRO = """
schema: slimnas/search-space/1
name: micro
input: {channels: 3, resolution: 48}
stem: {type: conv_stem, act: relu}
stages:
- {width: {min: 4, max: 8, step: 2}, slots: 2, choices: [mb4d, identity]}
- {width: {min: 6, max: 12, step: 2}, slots: 1, choices: [mb4d, identity],
   downsample: {type: conv3x3}}
- {width: {min: 8, max: 16, step: 4}, slots: 3, choices: [mb4d, mb3d, identity],
   downsample: {type: conv3x3}}
- {width: {min: 12, max: 20, step: 4}, slots: 2, choices: [mb4d, mb3d, identity],
   downsample: {type: conv3x3}}
head: {type: linear, classes: 5, distilled: false}
blocks:
  mb4d: {ffn_ratio: 2}
  mb3d: {heads: 2, qk_dim: 3, v_dim: 5, ffn_ratio: 2}
limits: {attention_last: true, monotone_widths: true}
supernet: {resolution: 48}
"""


def micro_space(*, distilled: bool = False) -> SearchSpace:
    return SearchSpace.from_yaml(MICRO.replace("distilled: false", f"distilled: {distilled}"))


def lively(supernet: Supernet, seed: int = 0) -> Supernet:
    """Give every tensor values far from their initial ones, so that none can be left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in supernet.state_dict().items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + drawn.abs())
            elif tensor.dim() > 1 and not name.endswith("_biases"):
                tensor.copy_(drawn * (2.0 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.5 + 0.5 * drawn)
    return supernet


def micro_supernet(seed: int = 0, *, distilled: bool = False) -> Supernet:
    """A supernet of the micro space in evaluation mode, every tensor lively."""
    supernet = Supernet(micro_space(distilled=distilled), resolution=RESOLUTION, seed=seed)
    return lively(supernet, seed).eval()


def images(count: int = 3, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, RESOLUTION, RESOLUTION, generator=generator, dtype=dtype)
