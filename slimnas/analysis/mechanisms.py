"""The mechanisms that the attention study compares, and what was published about them.

The study is that of Pan et al., "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022),
Fig. 6: single layers on 14x14 tokens of 768 channels in 12 heads, 64 images at a time. Here every
mechanism is one or several block specs without their FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from slimnas.arch.litv2 import HiLoBlock, lo_heads_of
from slimnas.arch.mixers import (
    CGABlock,
    LinearSRABlock,
    LKABlock,
    MHSABlock,
    MixerBlock,
    PoolBlock,
    SRABlock,
    StridedBlock,
    TMSABlock,
    WindowBlock,
)
from slimnas.arch.shapes import NO_COST, Cost, FeatureShape
from slimnas.nn.litv2 import HiLo
from slimnas.nn.mixers import make_mixer, works_on_maps

HILO = "hilo"
"""What the others are compared with."""

ALPHA = 0.9
"""Share of the heads that are Lo-Fi heads in the study."""

Layer = MixerBlock | HiLoBlock
STUDY_SIDE, STUDY_WIDTH, STUDY_HEADS, STUDY_BATCH = 14, 768, 12, 64


@dataclass(frozen=True)
class Published:
    """A row of the study's Fig. 6.

    CPU: Intel i9-10900X, GPU: RTX 3090, PyTorch 1.8.1, fp32, no warm-up, gradients recorded.

    Attributes:
        macs: multiply-adds, in millions.
        params: parameters, in millions.
        cpu_images_per_s: throughput on the CPU.
        gpu_images_per_s: throughput on the GPU.
    """

    macs: float
    params: float
    cpu_images_per_s: float
    gpu_images_per_s: float


@dataclass(frozen=True)
class Mechanism:
    """A token mixer to time.

    Attributes:
        name: by which it is asked for.
        title: for people.
        layers: its layers for a number of heads; several are timed one by one and averaged, as
            networks alternate them.
        published: its row in the study, if it has one.
    """

    name: str
    title: str
    layers: Callable[[int], tuple[Layer, ...]]
    published: Published | None = None

    def specs(self, width: int, heads: int) -> tuple[Layer, ...]:
        """Its layers with all widths written out."""
        return tuple(spec.filled(width) for spec in self.layers(heads))

    def refusal(self, shape: FeatureShape, heads: int) -> str | None:
        """Why it cannot work on a map of `shape`; None if it can."""
        for spec in self.specs(shape.channels, heads):
            try:
                spec.check(shape)
            except ValueError as error:
                return str(error)
        return None

    def cost(self, shape: FeatureShape, heads: int) -> Cost:
        """Mean cost of its layers, without norms."""
        specs = self.specs(shape.channels, heads)
        total = sum((layer_cost(spec, shape) for spec in specs), NO_COST)
        count = len(specs)
        return Cost(total.params // count, total.macs // count, total.activation_bytes // count)


def layer_cost(spec: Layer, shape: FeatureShape) -> Cost:
    """Cost of one mixer alone."""
    if isinstance(spec, HiLoBlock):
        return spec.attention_cost(shape)
    return spec.mixer_cost(shape)


def make_layer(spec: Layer, shape: FeatureShape) -> nn.Module:
    """Make one mixer alone; it works on maps if `on_maps`, else on tokens."""
    if isinstance(spec, HiLoBlock):
        grid = shape.height, shape.width
        return HiLo(
            shape.channels, grid, spec.heads, spec.lo_heads, spec.window, qkv_bias=spec.qkv_bias
        )
    return make_mixer(spec, shape)


def on_maps(spec: Layer) -> bool:
    """Whether a mixer takes maps (B, C, H, W) rather than tokens (B, N, C)."""
    return isinstance(spec, MixerBlock) and works_on_maps(spec)


def _hilo(heads: int, lo_heads: int) -> tuple[Layer, ...]:
    return (HiLoBlock(heads=heads, lo_heads=lo_heads, window=2),)


_ALL = (
    Mechanism(
        HILO,
        "HiLo",
        lambda heads: _hilo(heads, lo_heads_of(heads, ALPHA)),
        Published(298.30, 2.20, 1029, 5104),
    ),
    Mechanism(
        "mhsa",
        "self-attention",
        lambda heads: (MHSABlock(heads=heads),),
        Published(521.43, 2.36, 505, 4403),
    ),
    Mechanism(
        "window",
        "local windows",
        lambda heads: (WindowBlock(heads=heads),),
        Published(477.17, 2.36, 631, 4537),
    ),
    Mechanism(
        "shifted_window",
        "shifted windows",
        lambda heads: (WindowBlock(heads=heads, shift=3),),
        Published(477.17, 2.36, 374, 4351),
    ),
    Mechanism(
        "sra",
        "spatial reduction",
        lambda heads: (SRABlock(heads=heads),),
        Published(419.56, 4.72, 710, 4810),
    ),
    Mechanism("linear_sra", "linear reduction", lambda heads: (LinearSRABlock(heads=heads),)),
    Mechanism(
        "tmsa",
        "Twins (LSA, GSA)",
        lambda heads: (TMSABlock(heads=heads), TMSABlock(heads=heads, part="global")),
    ),
    Mechanism(
        "lka", "large kernels (VAN)", lambda heads: (LKABlock(),), Published(357.96, 1.83, 59, 4213)
    ),
    Mechanism("cga", "cascaded groups", lambda heads: (CGABlock(heads=heads),)),
    Mechanism("strided", "strided", lambda heads: (StridedBlock(heads=heads),)),
    Mechanism("pool", "pooling", lambda heads: (PoolBlock(),)),
    Mechanism("lofi", "HiLo, Lo-Fi only", lambda heads: _hilo(heads, heads)),
    Mechanism("hifi", "HiLo, Hi-Fi only", lambda heads: _hilo(heads, 0)),
)

MECHANISMS: Mapping[str, Mechanism] = MappingProxyType({one.name: one for one in _ALL})
"""All mechanisms by name; the last two are HiLo's parts alone, the controls of its study."""
