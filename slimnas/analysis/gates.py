"""What Q/K and V channels of trained attention are worth: first-order Taylor importance.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), with a gate on
each channel: the loss changes by the gate's gradient when the channel goes, which is the sum over
images and positions of activation x gradient; squared per batch, then averaged (equations 8, 9).
The gate of a Q/K pair is on the product that the pair adds to the logits; K enters nowhere else,
so that its gradient is the one at K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray
from torch import Tensor, nn

from slimnas.analysis.ablate import Axis
from slimnas.errors import AnalysisError
from slimnas.nn import efficientformer, efficientvit, mixers, swin, vit
from slimnas.nn.build import Network

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ChannelImportance:
    """Importance of the channels of one attention, a row per head: loss squared.

    Attributes:
        block: name of its component.
        width: of its stage.
        qk: of pairs of a query and a key channel (heads, qk_dim).
        v: of value channels (heads, v_dim).
    """

    block: str
    width: int
    qk: FloatArray
    v: FloatArray

    @property
    def ratio(self) -> float:
        """Its V ratio: V channels over the stage's width."""
        return self.v.size / self.width


@dataclass(frozen=True)
class Kept:
    """How much importance stays when every head keeps its most important channels.

    Attributes:
        axis: Q/K dimension or V ratio.
        value: what it is cut to.
        share: kept importance over all of it, 0 to 1, in the whole network.
        by_block: likewise in each attention, in order; None where nothing is of importance, such
            as Q and K of a window of one position.
    """

    axis: Axis
    value: float
    share: float
    by_block: tuple[float | None, ...]


def channel_importance(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[ChannelImportance, ...]:
    """Importance of all Q/K pairs and V channels by cross entropy; the network runs as deployed.

    Args:
        network: trained, on the batches' device.
        batches: images (B, c, H, W) and labels (B,); at least one pair.

    Raises:
        AnalysisError: no attention whose channels can be told apart, or no images.
    """
    meters = _meters(network)
    was_training = network.training
    network.eval()
    count = 0
    try:
        for images, labels in batches:
            logits = network(images)
            F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            for meter in meters:
                meter.end_batch()
            count += 1
    finally:
        for meter in meters:
            meter.remove()
        network.zero_grad(set_to_none=True)
        network.train(was_training)
    if not count:
        raise AnalysisError("images: at least one batch is needed to weigh channels, got none")
    return tuple(meter.result(count) for meter in meters)


def kept_importance(
    found: Sequence[ChannelImportance], axis: Axis, values: Sequence[float]
) -> tuple[Kept, ...]:
    """What stays of the importance along one axis; values above a block's own keep all of it."""
    curves = []
    for value in values:
        kept, whole = [], []
        for one in found:
            rows = one.qk if axis == "qk_dim" else one.v
            count = value if axis == "qk_dim" else value * one.width / len(rows)
            number = min(rows.shape[1], max(1, int(count + 0.5)))
            ordered = -np.sort(-rows, axis=1)
            kept.append(float(ordered[:, :number].sum()))
            whole.append(float(ordered.sum()))
        by_block = tuple(_share(part, of) for part, of in zip(kept, whole, strict=True))
        curves.append(Kept(axis, value, _share(sum(kept), sum(whole)) or 0.0, by_block))
    return tuple(curves)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


class _Meter:
    """Adds up gate gradients of one attention, whose projections are watched while it runs.

    Args:
        block: name of the component.
        width: of its stage.
        projections: module, axis of its output's channels, and where K and V are in it: arrays of
            channel numbers, one row per head; the rows of all projections are one after another.
    """

    def __init__(
        self, block: str, width: int, projections: Sequence[tuple[nn.Module, int, Any, Any]]
    ) -> None:
        self._block, self._width = block, width
        self._places = [(keys, values) for _, _, keys, values in projections]
        self._gates: list[Tensor | None] = [None] * len(projections)
        self._squares: list[FloatArray | None] = [None] * len(projections)
        self._hooks = [
            module.register_forward_hook(partial(self._watch, number, axis))
            for number, (module, axis, _, _) in enumerate(projections)
        ]

    def _watch(self, number: int, axis: int, module: nn.Module, given: Any, out: Tensor) -> None:
        activation = out.detach()
        axes = [i for i in range(out.dim()) if i != axis % out.dim()]

        def add(gradient: Tensor) -> None:
            gate = (activation * gradient).sum(dim=axes)
            before = self._gates[number]
            self._gates[number] = gate if before is None else before + gate

        out.register_hook(add)  # type: ignore[no-untyped-call]

    def end_batch(self) -> None:
        """Square what this batch added up."""
        for number, gate in enumerate(self._gates):
            if gate is None:
                continue
            square = gate.double().cpu().numpy() ** 2
            before = self._squares[number]
            self._squares[number] = square if before is None else before + square
            self._gates[number] = None

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def result(self, batches: int) -> ChannelImportance:
        """Averages over the batches."""
        qk, v = [], []
        for squares, (keys, values) in zip(self._squares, self._places, strict=True):
            assert squares is not None
            qk.append(squares[keys] / batches)
            v.append(squares[values] / batches)
        return ChannelImportance(self._block, self._width, np.concatenate(qk), np.concatenate(v))


def _meters(network: Network) -> list[_Meter]:
    meters = []
    for index, stage in enumerate(network.architecture.stages):
        for number in range(len(stage.blocks)):
            name = f"stages.{index}.blocks.{number}"
            for part in network.get_submodule(name).modules():
                projections = _PROJECTIONS.get(type(part))
                if projections is not None:
                    meters.append(_Meter(name, stage.width, projections(part)))
    if not meters:
        raise AnalysisError(
            f"{network.architecture.name}: has no attention whose Q, K and V channels this "
            "analysis can tell apart; choose an EfficientViT, ViT, DeiT, Swin or EfficientFormer"
        )
    return meters


def _in_rows(part: Any) -> list[tuple[nn.Module, int, Any, Any]]:
    """One projection to all queries, then all keys, then all values, each by head."""
    heads, qk, v = part.heads, part.qk_dim, part.v_dim
    keys = heads * qk + np.arange(heads * qk).reshape(heads, qk)
    values = 2 * heads * qk + np.arange(heads * v).reshape(heads, v)
    return [(part.qkv, -1, keys, values)]


def _by_head(part: Any) -> list[tuple[nn.Module, int, Any, Any]]:
    """One projection to queries, keys and values of the first head, then of the second, ..."""
    heads, qk, v = part.heads, part.qk_dim, part.v_dim
    starts = (2 * qk + v) * np.arange(heads)[:, None]
    return [(part.qkv, -1, starts + qk + np.arange(qk), starts + 2 * qk + np.arange(v))]


def _per_head(part: Any) -> list[tuple[nn.Module, int, Any, Any]]:
    """A convolution per head, on maps."""
    keys = part.qk_dim + np.arange(part.qk_dim)[None]
    values = 2 * part.qk_dim + np.arange(part.v_dim)[None]
    return [(module, 1, keys, values) for module in cast("nn.ModuleList", part.qkvs)]


_PROJECTIONS: dict[type[nn.Module], Callable[[Any], list[tuple[nn.Module, int, Any, Any]]]] = {
    vit.Attention: _in_rows,
    swin.WindowAttention: _in_rows,
    mixers.SelfAttention: _in_rows,
    efficientformer.Attention: _by_head,
    efficientvit.CascadedGroupAttention: _per_head,
}
"""Where the channels of each attention are."""
