"""Channels of components one by one, with those of attention whose heads share a stage's channels.

HiLo and cascaded group attention give every head width / heads dimensions. A narrower stage keeps
equally many channels of each head's share, so that what stays of a head is a head again.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from slimnas.arch.block import Block
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import ConvStem
from slimnas.arch.litv2 import HiLoBlock
from slimnas.arch.mixers import CGABlock
from slimnas.nn.channels import (
    CHANNEL_AXES,
    FFN_AXES,
    HIDDEN,
    OUT,
    RUN_AXES,
    Channels,
    Run,
    Runs,
    TensorAxes,
    norm_axes,
    plain,
)

HI_QK, HI_V, LO_QK, LO_V = "hi_qk", "hi_v", "lo_qk", "lo_v"
"""Dimensions inside HiLo's heads; queries share theirs with keys."""

QK = "qk"
"""Queries and keys of a head whose number does not follow the width: all stay."""


def channels_of(spec: Spec, width: int) -> Channels:
    """How the tensors of a component hold its channels.

    Args:
        spec: the component.
        width: channels after it, all of them for a residual block.

    Raises:
        KeyError: a component that nobody has declared.
    """
    if isinstance(spec, HiLoBlock):
        return _hilo(spec, width)
    if isinstance(spec, CGABlock):
        return _cga(spec, width)
    sizes = {}
    if isinstance(spec, ConvStem):
        sizes[HIDDEN] = width // 2
    elif isinstance(spec, Block):
        sizes[HIDDEN] = spec.hidden(width)
    known = RUN_AXES.get(type(spec))
    return Channels(plain(CHANNEL_AXES[type(spec)]) if known is None else known, sizes, {})


def _hilo(spec: HiLoBlock, width: int) -> Channels:
    dim = width // spec.heads
    lo_heads = spec.heads if spec.window == 1 else spec.lo_heads
    hi_heads = spec.heads - lo_heads
    hi_q, lo_q = Run(HI_QK, keeps_logits=True), Run(LO_QK, keeps_logits=True)
    cut = Fraction(hi_heads, spec.heads)  # Hi-Fi's outputs come first
    hi_out, lo_out = (Run(OUT, last=cut),), (Run(OUT, first=cut),)
    block: dict[str, TensorAxes] = {
        **norm_axes("norm1", OUT),
        **norm_axes("norm2", OUT),
        **FFN_AXES,
    }
    axes = {
        **plain(block),
        **dict(_layer("attn.h_qkv", (hi_q, Run(HI_QK), Run(HI_V)), (Run(OUT),))),
        **dict(_layer("attn.h_proj", hi_out, (Run(HI_V),))),
        **dict(_layer("attn.l_q", (lo_q,), (Run(OUT),))),
        **dict(_layer("attn.l_kv", (Run(LO_QK), Run(LO_V)), (Run(OUT),))),
        **dict(_layer("attn.l_proj", lo_out, (Run(LO_V),))),
    }
    sizes = {HIDDEN: spec.hidden(width)}
    chunks = {OUT: spec.heads}
    for heads, groups in ((hi_heads, (HI_QK, HI_V)), (lo_heads, (LO_QK, LO_V))):
        if heads:
            sizes |= dict.fromkeys(groups, heads * dim)
            chunks |= dict.fromkeys(groups, heads)
    return Channels(axes, sizes, chunks)


def _cga(spec: CGABlock, width: int) -> Channels:
    """A head's values are added to the next head's share: both keep the same channels.

    The last head's are added to nothing; they go with the first share.
    """
    heads = spec.heads
    shares = [Run(OUT, Fraction(i, heads), Fraction(i + 1, heads)) for i in range(heads)]
    values = [*shares[1:], shares[0]]
    block: dict[str, TensorAxes] = {**norm_axes("norm2", OUT), **FFN_AXES}
    axes = {
        **plain(block),
        "mixer.proj.conv.weight": ((Run(OUT),), tuple(values)),
        **plain(norm_axes("mixer.proj.bn", OUT)),
    }
    for i in range(heads):
        rows = (Run(QK), values[i])
        axes[f"mixer.qkvs.{i}.conv.weight"] = (rows, (shares[i],))
        axes |= dict.fromkeys(norm_axes(f"mixer.qkvs.{i}.bn", OUT), (rows,))
    sizes = {HIDDEN: spec.hidden(width), QK: 2 * spec.qk_dim}
    return Channels(axes, sizes, {OUT: heads})


def _layer(prefix: str, rows: Runs, columns: Runs) -> Iterator[tuple[str, tuple[Runs, ...]]]:
    yield f"{prefix}.weight", (rows, columns)
    yield f"{prefix}.bias", (rows,)
