"""Small networks and made-up speeds for the study of MHSA shares."""

from __future__ import annotations

from slimnas.analysis.speed import Speed
from slimnas.arch.architecture import Architecture

SMALL = """schema: slimnas/architecture/1
name: {name}
input: {{channels: 3, resolution: 32}}
stem: {{type: vit_stem, width: 24, patch: 16}}
stages:
- width: 24
  blocks: [{{type: vit, heads: 3, qk_dim: 8, v_dim: 8, ffn_dim: 48, repeat: {depth}}}]
head: {{type: token, classes: 10}}
"""


def small(depth: int = 6, name: str = "small_vit") -> Architecture:
    return Architecture.from_yaml(SMALL.format(depth=depth, name=name))


def exactly(speedup: float) -> Speed:
    return Speed(speedup, speedup, speedup, speedup, 1.0, 1)
