"""Accuracy against the Q/K dimension per head and the V ratio, as in EfficientViT's ablation.

Liu et al., "EfficientViT" (CVPR 2023), Fig. 7: one axis changes at a time. The V ratio is
heads x V dimension over the width of the stage, 1 in EfficientViT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slimnas.analysis.finished import Finished
from slimnas.analysis.share_run import Step, Train
from slimnas.arch.architecture import AnyBlock, Architecture
from slimnas.arch.cost import cost
from slimnas.arch.documents import parse_spec
from slimnas.errors import AnalysisError

Axis = Literal["qk_dim", "v_ratio"]
AXES: Mapping[Axis, str] = {"qk_dim": "Q/K dimension per head", "v_ratio": "V ratio"}
FIELDS: Mapping[Axis, str] = {"qk_dim": "qk_dim", "v_ratio": "v_dim"}
"""The field of a block that an axis changes."""


@dataclass(frozen=True)
class Point:
    """One network of an ablation.

    Attributes:
        axis: what is changed.
        value: to what.
        architecture: the network.
    """

    axis: Axis
    value: float
    architecture: Architecture


@dataclass(frozen=True)
class AblationPoint:
    """A point with its accuracies in percent, one per seed."""

    point: Point
    top1: tuple[float, ...]

    @property
    def mean_top1(self) -> float:
        """Mean over the seeds."""
        return sum(self.top1) / len(self.top1)


@dataclass(frozen=True)
class Ablation:
    """A finished ablation.

    Attributes:
        base: the model as it is.
        points: by axis and value.
        cascade_off: whether the V axis's networks have their cascades switched off.
    """

    base: Architecture
    points: tuple[AblationPoint, ...]
    cascade_off: bool

    def of(self, axis: Axis) -> tuple[AblationPoint, ...]:
        """The points of one axis, by value."""
        return tuple(one for one in self.points if one.point.axis == axis)


def own_values(architecture: Architecture, axis: Axis) -> tuple[float, ...]:
    """The values that the blocks of `architecture` have, each once, ascending.

    Raises:
        AnalysisError: no block has such a dimension.
    """
    return tuple(
        sorted({_value(block, width, axis) for block, width in _blocks(architecture, axis)})
    )


def has_cascade(architecture: Architecture) -> bool:
    """Whether a block adds one head's values to the next one's input, which fixes their width."""
    return any(
        getattr(block, "cascade", False) for stage in architecture.stages for block in stage.blocks
    )


def with_qk_dim(architecture: Architecture, qk_dim: int) -> Architecture:
    """`architecture` with that Q/K dimension in every head.

    Raises:
        AnalysisError: no block has attention with such a field, or the dimension is below 1.
    """
    if qk_dim < 1:
        raise AnalysisError(f"qk_dims: must be at least 1, got {qk_dim}; leave it out")
    return _changed(architecture, "qk_dim", lambda block, width: {"qk_dim": qk_dim})


def with_v_ratio(architecture: Architecture, v_ratio: float) -> Architecture:
    """`architecture` with heads x V dimension about `v_ratio` x the width, cascades off.

    A cascade adds a head's values to the next one's input and so needs the ratio 1; networks with
    and without are not compared, so it is off at every ratio.

    Raises:
        AnalysisError: no block has attention with such a field, or the ratio is not above 0.
    """
    if v_ratio <= 0:
        raise AnalysisError(f"v_ratios: must be above 0, got {v_ratio:g}; leave it out")

    def change(block: AnyBlock, width: int) -> dict[str, Any]:
        heads = getattr(block, "heads", 1)
        dims = {"v_dim": max(1, int(v_ratio * width / heads + 0.5))}
        return {**dims, "cascade": False} if hasattr(block, "cascade") else dims

    return _changed(architecture, "v_ratio", change)


def ablation_points(
    base: Architecture, *, qk_dims: Sequence[int], v_ratios: Sequence[float]
) -> tuple[Point, ...]:
    """The networks to train: one axis changes, the other stays as it is in `base`.

    Raises:
        AnalysisError: `base` lacks what an axis changes, or there is nothing to compare.
    """
    points = [Point("qk_dim", dim, with_qk_dim(base, dim)) for dim in sorted(set(qk_dims))]
    points += [
        Point("v_ratio", ratio, with_v_ratio(base, ratio)) for ratio in sorted(set(v_ratios))
    ]
    if len(points) < 2:
        raise AnalysisError(
            f"qk_dims and v_ratios: must be at least two values to compare, got {len(points)}; "
            "add some"
        )
    return tuple(points)


def run_ablation(
    base: Architecture,
    points: Sequence[Point],
    train: Train,
    finished: Finished,
    *,
    seeds: Sequence[int],
    on_step: Callable[[Step], None] = lambda step: None,
) -> Ablation:
    """Train every point with every seed; what `finished` has is not trained again.

    Two points of the same network are trained once.

    Raises:
        RunFolderError: a damaged result in `finished`.
    """
    total = len(points) * len(seeds)
    found = []
    for number, point in enumerate(points):
        top1 = []
        for place, seed in enumerate(seeds):
            what = f"{AXES[point.axis]} {point.value:g}, seed {seed}"
            on_step(Step(number * len(seeds) + place, total, what))
            key = f"top1 {point.architecture.digest} {seed}"
            result = finished.number(key)
            if result is None:
                result = float(finished.add(key, train(point.architecture, seed=seed)))
            top1.append(result)
        found.append(AblationPoint(point, tuple(top1)))
    on_step(Step(total, total, "done"))
    changed = has_cascade(base) and any(point.axis == "v_ratio" for point in points)
    return Ablation(base, tuple(found), changed)


def row(found: AblationPoint) -> dict[str, Any]:
    """One point as plain data: what the CSV and the JSON have of it."""
    cost_of = cost(found.point.architecture)
    return {
        "axis": found.point.axis,
        "value": found.point.value,
        "top1": found.mean_top1,
        "top1_by_seed": list(found.top1),
        "params": cost_of.params,
        "macs": cost_of.macs,
        "digest": found.point.architecture.digest,
    }


def _changed(
    architecture: Architecture, axis: Axis, change: Callable[[AnyBlock, int], Mapping[str, Any]]
) -> Architecture:
    chosen = {id(block) for block, _ in _blocks(architecture, axis)}
    data = architecture.model_dump()
    for stage, dumped in zip(architecture.stages, data["stages"], strict=True):
        for block, fields in zip(stage.blocks, dumped["blocks"], strict=True):
            if id(block) in chosen:
                fields.update(change(block, stage.width))
    return parse_spec(Architecture, data, source=architecture.name)


def _blocks(architecture: Architecture, axis: Axis) -> list[tuple[AnyBlock, int]]:
    """Blocks whose attention has what the axis changes, each with its stage's width."""
    found = list(_with_field(architecture, FIELDS[axis]))
    if not found:
        kinds = dict.fromkeys(b.type for stage in architecture.stages for b in stage.blocks)
        raise AnalysisError(
            f"{architecture.name}: has no attention with a {AXES[axis]} of its own "
            f"({FIELDS[axis]}), its blocks are {', '.join(kinds)}; choose an EfficientViT, ViT, "
            "DeiT, Swin or EfficientFormer"
        )
    return found


def _with_field(architecture: Architecture, field: str) -> Iterator[tuple[AnyBlock, int]]:
    for stage in architecture.stages:
        for block in stage.blocks:
            if getattr(block, field, None) and getattr(block, "heads", 0):
                yield block, stage.width


def _value(block: AnyBlock, width: int, axis: Axis) -> float:
    fields = block.model_dump()
    if axis == "qk_dim":
        return float(fields["qk_dim"])
    return float(fields["heads"] * fields["v_dim"] / width)
