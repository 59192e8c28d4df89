"""Sub-networks of a ViT or Swin in which attention has a given share of the layers.

Liu et al., "EfficientViT" (CVPR 2023), section 2.1 and Fig. 3: Swin-T and DeiT-T are scaled down
to 1.25 and 1.5 x their throughput with different shares #MHSA / (#MHSA + #FFN), and 20 to 40 % do
best. How the paper makes them is not published. Here a share is made by leaving out attention or
FFN sub-layers, evenly over the depth, and a throughput by the width, which is solved for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimnas.analysis.speed import Speed
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.vit import TransformerBlock
from slimnas.errors import AnalysisError

LEAST, MOST = 1 / 16, 4.0
"""Bounds of the factor on all widths."""

STEEPNESS = 0.7
"""First steps change the width by the missing speed-up to this power: far enough to pass it."""

Measure = Callable[[Architecture], Speed]


@dataclass(frozen=True)
class Layers:
    """How many attention and how many FFN sub-layers a network has."""

    attention: int
    ffn: int

    @property
    def share(self) -> float:
        """Attention's part of the sub-layers."""
        return self.attention / (self.attention + self.ffn)


@dataclass(frozen=True)
class Goal:
    """What a sub-network must reach.

    Attributes:
        speedup: throughput over the base's.
        tolerance: how far from it a network may be, as a share of it.
        step: widths are multiples of it, dimensions of heads of half of it.
        trials: how many widths are measured at most.
    """

    speedup: float
    tolerance: float = 0.02
    step: int = 4
    trials: int = 16

    def met(self, speed: Speed) -> bool:
        """Whether a measured speed-up is inside the tolerance."""
        return abs(speed.speedup / self.speedup - 1) <= self.tolerance


@dataclass(frozen=True)
class Trial:
    """A width that was measured: the factor on all widths, the network, its speed."""

    scale: float
    architecture: Architecture
    speed: Speed


@dataclass(frozen=True)
class Solved:
    """The width that came closest; `met` says whether it is inside the tolerance.

    Its speed comes from a measurement of its own, not from the one it was chosen by.
    """

    trial: Trial
    met: bool
    trials: int


def count_layers(architecture: Architecture) -> Layers:
    """Count the attention and FFN sub-layers of `architecture`.

    Raises:
        AnalysisError: a block whose sub-layers cannot be left out one by one, or one kind of
            sub-layer is not there at all.
    """
    layers = Layers(*(len(places) for places in _places(architecture)))
    for kind, count in (("attention", layers.attention), ("FFN", layers.ffn)):
        if not count:
            raise AnalysisError(
                f"{architecture.name}: has no {kind} layer, whose share this analysis studies; "
                "choose a model with attention and FFN layers, such as deit_tiny"
            )
    return layers


def layers_of_share(share: float, most: Layers) -> Layers:
    """The layers to keep of `most` so that attention's share is closest to `share`.

    Layers of the kind that is too many go, none is added; one of each kind stays.

    Raises:
        AnalysisError: the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise AnalysisError(
            f"shares: must lie between 0 and 100 %, got {100 * share:g} %; leave it out"
        )
    fewer_attention = share <= most.share
    whole = most.ffn if fewer_attention else most.attention
    exact = whole * share / (1 - share) if fewer_attention else whole * (1 - share) / share
    counts = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
    layers = [Layers(n, whole) if fewer_attention else Layers(whole, n) for n in sorted(counts)]
    return min(layers, key=lambda one: abs(one.share - share))


def distinct_shares(
    architecture: Architecture, shares: Sequence[float]
) -> tuple[tuple[float, Layers], ...]:
    """The asked shares with what they become; of several that become the same, the closest."""
    most = count_layers(architecture)
    closest: dict[Layers, float] = {}
    for share in sorted(shares):
        layers = layers_of_share(share, most)
        before = closest.get(layers)
        if before is None or abs(share - layers.share) < abs(before - layers.share):
            closest[layers] = share
    return tuple((share, layers) for layers, share in closest.items())


def with_layers(architecture: Architecture, layers: Layers) -> Architecture:
    """`architecture` with that many of its sub-layers, the others left out evenly.

    Where a stage of shifted windows loses attention, what stays alternates again between windows
    that are not shifted and windows that are, by half, as in Swin.

    Raises:
        AnalysisError: it has fewer, or a stage would be left without any.
    """
    most = count_layers(architecture)
    if layers.attention > most.attention or layers.ffn > most.ffn:
        raise AnalysisError(
            f"{architecture.name}: has {most.attention} attention and {most.ffn} FFN layers, "
            f"{layers.attention} and {layers.ffn} are wanted; ask for fewer"
        )
    attention, ffn = _places(architecture)
    lost = {*attention} - {attention[i] for i in spread(layers.attention, most.attention)}
    lost_ffn = {*ffn} - {ffn[i] for i in spread(layers.ffn, most.ffn)}
    data = architecture.model_dump()
    for index, stage in enumerate(data["stages"]):
        for number, block in enumerate(stage["blocks"]):
            if (index, number) in lost:
                block.update(heads=0, qk_dim=0, v_dim=0)
            if (index, number) in lost_ffn:
                block["ffn_dim"] = 0
        blocks = [block for block in stage["blocks"] if block["heads"] or block["ffn_dim"]]
        if not blocks:
            raise AnalysisError(
                f"stages[{index}] of {architecture.name}: would lose all its layers at a share of "
                f"{100 * layers.share:.0f} %; ask for shares closer to {100 * most.share:.0f} %"
            )
        if any(place == index for place, _ in lost):
            _alternate([block for block in blocks if block["heads"]])
        stage["blocks"] = blocks
    return Architecture.model_validate(data)


def spread(count: int, most: int) -> tuple[int, ...]:
    """`count` of the numbers 0 to `most` - 1, evenly apart and in the middle of their parts."""
    return tuple((2 * i + 1) * most // (2 * count) for i in range(count))


def scaled(architecture: Architecture, scale: float, *, step: int) -> Architecture:
    """`architecture` with all widths times `scale`, rounded.

    Widths become multiples of `step`, dimensions of heads of `step` // 2, so that heads x dimension
    stays about the width. The number of heads stays, and so does each FFN's ratio.
    """
    data = architecture.model_dump()
    data["stem"]["width"] = _rounded(data["stem"]["width"] * scale, step)
    for stage in data["stages"]:
        before = stage["width"]
        stage["width"] = _rounded(before * scale, step)
        for block in stage["blocks"]:
            for dim in ("qk_dim", "v_dim"):
                if block[dim]:
                    block[dim] = _rounded(block[dim] * scale, max(1, step // 2))
            if block["ffn_dim"]:
                block["ffn_dim"] = max(1, _nearest(block["ffn_dim"] * stage["width"] / before))
    return Architecture.model_validate(data)


def scale_of_macs(architecture: Architecture, macs: float, *, step: int) -> float:
    """The factor on all widths, between `LEAST` and `MOST`, that gives about `macs`."""
    low, high = LEAST, MOST
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if cost(scaled(architecture, middle, step=step)).macs < macs:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def solve_width(
    architecture: Architecture,
    goal: Goal,
    measure: Measure,
    *,
    macs: float,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Solved:
    """Find the width at which `architecture` reaches the speed-up.

    Begins where MACs say, then closes in by what is measured: between a width that is too slow and
    one that is too fast, interpolating logarithms.

    Args:
        architecture: what to scale.
        goal: what to reach.
        measure: gives the speed-up of a network over the base.
        macs: the base's over the speed-up: where to begin.
        on_trial: called after every measurement.
    """
    tried: dict[str, Trial] = {}
    scales: Iterator[float] = iter((scale_of_macs(architecture, macs, step=goal.step),))
    while len(tried) < goal.trials:
        found = _untried(architecture, goal, scales, tried)
        if found is None:
            break
        trial = _measured(*found, measure, on_trial)
        if goal.met(trial.speed):  # looked at again: this look may be why it was chosen
            trial = _measured(*found, measure, on_trial)
            if goal.met(trial.speed):
                return Solved(trial, True, len(tried) + 1)
        tried[trial.architecture.digest] = trial
        scales = _next_scales(list(tried.values()), goal)
    closest = min(tried.values(), key=lambda one: abs(math.log(one.speed.speedup / goal.speedup)))
    final = replace(closest, speed=measure(closest.architecture))
    return Solved(final, goal.met(final.speed), len(tried))


def _measured(
    scale: float,
    architecture: Architecture,
    measure: Measure,
    on_trial: Callable[[Trial], None],
) -> Trial:
    trial = Trial(scale, architecture, measure(architecture))
    on_trial(trial)
    return trial


def _untried(
    architecture: Architecture, goal: Goal, scales: Iterator[float], tried: dict[str, Trial]
) -> tuple[float, Architecture] | None:
    for scale in scales:
        bounded = min(max(scale, LEAST), MOST)
        candidate = scaled(architecture, bounded, step=goal.step)
        if candidate.digest not in tried:
            return bounded, candidate
    return None


def _next_scales(tried: Sequence[Trial], goal: Goal) -> Iterator[float]:
    """Where to look next, best first; networks of neighbouring scales may be the same."""
    slow = min((t for t in tried if t.speed.speedup < goal.speedup), key=_scale, default=None)
    fast = max((t for t in tried if t.speed.speedup >= goal.speedup), key=_scale, default=None)
    if slow is None or fast is None:
        one = fast or slow
        assert one is not None
        missing = one.speed.speedup / goal.speedup
        for power in (STEEPNESS, 2 * STEEPNESS, 4 * STEEPNESS):
            yield one.scale * missing**power
        return
    between = math.log(goal.speedup / slow.speed.speedup)
    between /= math.log(fast.speed.speedup / slow.speed.speedup)
    for part in (min(max(between, 0.1), 0.9), 0.5, 0.25, 0.75):
        yield slow.scale ** (1 - part) * fast.scale**part


def _scale(trial: Trial) -> float:
    return trial.scale


def _places(architecture: Architecture) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Stage and number of the blocks with attention, and of those with an FFN."""
    attention, ffn = [], []
    for index, stage in enumerate(architecture.stages):
        for number, block in enumerate(stage.blocks):
            if not isinstance(block, TransformerBlock):
                kinds = Counter(one.type for part in architecture.stages for one in part.blocks)
                raise AnalysisError(
                    f"{architecture.name}: has no block whose attention or FFN can be left out on "
                    f"its own, its blocks are {', '.join(kinds)}; choose a ViT, DeiT or Swin"
                )
            if block.heads:
                attention.append((index, number))
            if block.hidden(stage.width):
                ffn.append((index, number))
    return attention, ffn


def _alternate(blocks: Sequence[dict[str, Any]]) -> None:
    for number, block in enumerate(blocks):
        if "shift" in block:
            block["shift"] = block["window"] // 2 if number % 2 else 0


def _rounded(value: float, step: int) -> int:
    return max(step, step * _nearest(value / step))


def _nearest(value: float) -> int:
    """The nearest whole number, halves upwards: the same on both sides of an even one."""
    return math.floor(value + 0.5)
