"""A simulated machine: networks cost what they are said to, and time passes only by running."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import Component, component_cost
from slimnas.latency import price_parts
from slimnas.measure.scope import Parts
from slimnas.measure.timing import Call, Clocks

CALL_MS = 0.004

SMALL_SPACE = """\
schema: slimnas/search-space/1
name: small
input: {channels: 3, resolution: 64}
stages:
- {width: {min: 16, max: 48, step: 16}, slots: 2, choices: [mb4d, identity]}
- width: {min: 32, max: 96, step: 16}
  slots: 2
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
"""

SMALL_MODELS = {
    "vit": """\
schema: slimnas/architecture/1
name: small_vit
input: {resolution: 32}
stem: {type: vit_stem, width: 24, patch: 8}
stages:
- width: 24
  blocks: [{type: vit, heads: 3, qk_dim: 8, v_dim: 8, repeat: 2}]
head: {type: token, classes: 10}
""",
    "swin": """\
schema: slimnas/architecture/1
name: small_swin
input: {resolution: 32}
stem: {type: swin_stem, width: 16}
stages:
- width: 16
  blocks:
  - {type: swin, heads: 2, qk_dim: 8, v_dim: 8, window: 4, shift: 0}
  - {type: swin, heads: 2, qk_dim: 8, v_dim: 8, window: 4, shift: 2}
- width: 32
  downsample: {type: patch_merging}
  blocks:
  - {type: swin, heads: 4, qk_dim: 8, v_dim: 8, window: 4, shift: 0}
  - {type: swin, heads: 4, qk_dim: 8, v_dim: 8, window: 4, shift: 2}
head: {type: linear, classes: 10}
""",
    "efficientformer": """\
schema: slimnas/architecture/1
name: small_efficientformer
input: {resolution: 32}
stem: {type: conv_stem, width: 16}
stages:
- {width: 16, blocks: [{type: mb4d, repeat: 2}]}
- width: 32
  downsample: {type: conv3x3}
  blocks: [{type: mb4d}, {type: mb3d, heads: 2, qk_dim: 8, v_dim: 16, repeat: 2}]
head: {type: linear, classes: 10, distilled: true}
""",
    "efficientvit": """\
schema: slimnas/architecture/1
name: small_efficientvit
input: {resolution: 64}
stem: {type: efficientvit_stem, width: 16}
stages:
- {width: 16, blocks: [{type: efficientvit, heads: 2, qk_dim: 4, kernels: [3], window: 2}]}
- width: 24
  downsample: {type: efficientvit_subsample}
  blocks:
  - {type: efficientvit, heads: 3, qk_dim: 4, kernels: [5, 3, 3], window: 2, repeat: 2}
head: {type: pooled_bn, classes: 10}
""",
    "efficientformerv2": """\
schema: slimnas/architecture/1
name: small_efficientformerv2
input: {resolution: 32}
stem: {type: conv_stem, width: 8, act: gelu}
stages:
- {width: 8, blocks: [{type: v2_ffn, repeat: 2}]}
- width: 12
  downsample: {type: conv3x3}
  blocks: [{type: v2_ffn}, {type: v2_attention, heads: 2, qk_dim: 4, v_dim: 8, stride: 2}]
- width: 16
  downsample: {type: conv3x3_attention, heads: 2, qk_dim: 4, v_dim: 8}
  blocks:
  - {type: v2_ffn, ffn_dim: 40}
  - {type: v2_attention, heads: 2, qk_dim: 4, v_dim: 8, repeat: 2}
head: {type: bn_linear, classes: 10, distilled: true}
""",
    "litv2": """\
schema: slimnas/architecture/1
name: small_litv2
input: {resolution: 32}
stem: {type: swin_stem, width: 16}
stages:
- {width: 16, blocks: [{type: conv_ffn, repeat: 2}]}
- width: 32
  downsample: {type: dtm}
  blocks: [{type: hilo, heads: 4, lo_heads: 3, window: 2, repeat: 2}]
head: {type: linear, classes: 10}
""",
}


def small_model(family: str) -> Architecture:
    return Architecture.from_yaml(SMALL_MODELS[family])


def small_space() -> SearchSpace:
    return SearchSpace.from_yaml(SMALL_SPACE)


def cost_ms(parts: Parts) -> float:
    """What a network of `parts` takes: a call, and per component a share of its MACs."""
    return CALL_MS + sum(part_ms(part) for part in parts)


def part_ms(component: Component) -> float:
    """A fixed part and a share of its MACs, for each sub-layer of a ViT or Swin block."""
    return sum(0.003 + component_cost(part).macs / 20e6 for part in price_parts(component))


@dataclass
class FakeMachine:
    """Time, and a loader of networks that spend it.

    Attributes:
        pace: how much slower everything is at a time in seconds.
        noise: relative standard deviation of one call.
        fail_after: loads after which loading raises, as a kill would stop it.
    """

    pace: Callable[[float], float] = lambda _: 1.0
    noise: float = 0.0
    threads: int = 1
    fail_after: int | None = None
    now: float = 100.0
    loads: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def clocks(self) -> Clocks:
        return Clocks(lambda: self.now, lambda: self.now, lambda: self.now * self.threads)

    def spend(self, ms: float) -> None:
        self.now += ms * self.pace(self.now) * (1 + abs(self.rng.gauss(0, self.noise))) / 1e3

    def loader(self, parts: Parts) -> Call:
        self.loads += 1
        if self.fail_after is not None and self.loads > self.fail_after:
            raise KeyboardInterrupt
        ms = cost_ms(parts)
        return lambda: self.spend(ms)


@dataclass(frozen=True)
class FakeRuntime:
    """Says what it is; a `FakeMachine` loads in its place."""

    threads: int = 1
    name: str = "fake"
    version: str = "1"
    compute_unit: str = "cpu"
    dtype: str = "fp32"

    def load(self, module: object, example: object) -> None:  # pragma: no cover
        raise AssertionError("the fake machine loads networks")
