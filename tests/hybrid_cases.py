"""Micro search spaces whose slots choose from blocks of several families."""

from __future__ import annotations

from slimnas.arch.space import SearchSpace
from slimnas.supernet.supernet import Supernet

HYBRID = """schema: slimnas/search-space/1
name: micro_hybrid
input: {channels: 1, resolution: 32}
stages:
- {width: {min: 16, max: 32, step: 16}, slots: 2, choices: [mb4d, pool, identity]}
- width: {min: 16, max: 48, step: 16}
  slots: 2
  choices: [mb4d, hilo, cga, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
blocks:
  mb4d: {ffn_ratio: 2}
  mb3d: {ffn_ratio: 2, heads: 2, qk_dim: 4, v_dim: 8}
  hilo: {heads: 4, lo_heads: 3, window: 2, ffn_ratio: 2}
  cga: {heads: 2, qk_dim: 4, kernels: [5, 3], window: 4, ffn_ratio: 2}
limits: {attention_last: false}
supernet: {resolution: 16}
"""
"""Free in the order of its blocks; `last` of `hybrid_space` puts attention last."""

EVERY_CHOICE = (
    "mb4d",
    "mb3d",
    "mhsa",
    "window",
    "shifted_window",
    "sra",
    "linear_sra",
    "tmsa",
    "hilo",
    "cga",
    "strided",
    "lka",
    "conv_ffn",
    "pool",
)

EVERY = f"""schema: slimnas/search-space/1
name: every_choice
input: {{channels: 3, resolution: 32}}
stages:
- {{width: {{min: 8, max: 24, step: 8}}, slots: 1, choices: [{", ".join(EVERY_CHOICE)}, identity]}}
- width: {{min: 16, max: 48, step: 8}}
  slots: 2
  choices: [{", ".join(EVERY_CHOICE)}, identity]
  downsample: {{type: conv3x3}}
head: {{type: linear, classes: 5}}
blocks:
  mb4d: {{ffn_ratio: 2}}
  mb3d: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5}}
  mhsa: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5}}
  window: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5, window: 3}}
  shifted_window: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5, window: 3, position_bias: true}}
  sra: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5, reduction: 2}}
  linear_sra: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5, pooled: 3, ffn: conv}}
  tmsa: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5, part: global}}
  hilo: {{ffn_ratio: 2, heads: 4, lo_heads: 3, window: 3}}
  cga: {{ffn_ratio: 2, heads: 8, qk_dim: 3, kernels: [3], window: 3, ffn: conv}}
  strided: {{ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5}}
  lka: {{ffn_ratio: 2}}
  conv_ffn: {{ffn_ratio: 2}}
  pool: {{ffn_ratio: 2}}
limits: {{attention_last: false}}
supernet: {{resolution: 32}}
"""
"""Stage maps of 8x8 and 4x4: windows that do not divide them, and that are larger than a head."""


def hybrid_space(*, last: bool = False) -> SearchSpace:
    return SearchSpace.from_yaml(HYBRID.replace("last: false", f"last: {str(last).lower()}"))


def every_space() -> SearchSpace:
    return SearchSpace.from_yaml(EVERY)


def every_supernet(seed: int = 0) -> Supernet:
    return Supernet(every_space(), resolution=32, seed=seed)
