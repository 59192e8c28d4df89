"""Sub-networks of a ViT or Swin in which attention has a given share of the layers.

Liu et al., "EfficientViT" (CVPR 2023), section 2.1 and Fig. 3: Swin-T and DeiT-T are scaled down
to 1.25 and 1.5 x their throughput with different shares #MHSA / (#MHSA + #FFN), and 20 to 40 % do
best. How the paper makes them is not published. Here a share is made by leaving out attention or
FFN sub-layers, evenly over the depth, and a throughput by the width, which is solved for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
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

STEEPEST = 4.0
"""Two widths are at odds if throughput changes by more than the width to this power."""

LOOKS = 3
"""Looks at one network, at most, to find out whether it was disturbed."""

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
        trials: how many looks at networks are taken, about.
    """

    speedup: float
    tolerance: float = 0.02
    step: int = 4
    trials: int = 20

    def met(self, speed: Speed) -> bool:
        """Whether a measured speed-up is inside the tolerance."""
        return abs(speed.speedup / self.speedup - 1) <= self.tolerance


@dataclass(frozen=True)
class Trial:
    """A width that was measured: the factor on all widths, the network, every look at its speed."""

    scale: float
    architecture: Architecture
    looks: tuple[Speed, ...] = ()

    @property
    def speed(self) -> Speed:
        """The last look."""
        return self.looks[-1]

    @property
    def speedup(self) -> float:
        """Median over the looks."""
        return median(look.speedup for look in self.looks)


@dataclass(frozen=True)
class Solved:
    """The width that came closest; `met` says whether it is inside the tolerance.

    Its speed, the last look, is not the one that it was chosen by. `looks` counts all that were
    taken, at all widths.
    """

    trial: Trial
    met: bool
    looks: int


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
    one that is too fast, interpolating logarithms. Of two widths whose speeds are further apart
    than the widths explain, one was disturbed: they are looked at again.

    Args:
        architecture: what to scale.
        goal: what to reach.
        measure: gives the speed-up of a network over the base.
        macs: the base's over the speed-up: where to begin.
        on_trial: called after every look.
    """

    def look(trial: Trial) -> Trial:
        seen = replace(trial, looks=(*trial.looks, measure(trial.architecture)))
        on_trial(seen)
        return seen

    scale = scale_of_macs(architecture, macs, step=goal.step)
    tried: dict[str, Trial] = {}
    chosen: Trial | None = Trial(scale, scaled(architecture, scale, step=goal.step))
    looks = 0
    while chosen is not None and looks < goal.trials:
        trial, looks = look(chosen), looks + 1
        if goal.met(trial.speed):  # looked at again: this look may be why it is chosen
            trial, looks = look(trial), looks + 1
            if goal.met(trial.speed):
                return Solved(trial, True, looks)
        tried[trial.architecture.digest] = trial
        chosen = _next_trial(architecture, goal, tried)
    final = look(min(tried.values(), key=lambda one: abs(math.log(one.speedup / goal.speedup))))
    return Solved(final, goal.met(final.speed), looks + 1)


def _next_trial(architecture: Architecture, goal: Goal, tried: Mapping[str, Trial]) -> Trial | None:
    """The trial to look at, a new one or one in doubt; None if there is no closer width."""
    slower = [trial for trial in tried.values() if trial.speedup < goal.speedup]
    faster = [trial for trial in tried.values() if trial.speedup >= goal.speedup]
    slow = min(slower, key=lambda trial: trial.scale, default=None)
    fast = max(faster, key=lambda trial: trial.scale, default=None)
    ends = [trial for trial in (slow, fast) if trial is not None and len(trial.looks) < LOOKS]
    doubtful = min(ends, key=lambda trial: len(trial.looks), default=None)
    if slow is not None and fast is not None and doubtful is not None and _at_odds(slow, fast):
        return doubtful
    for scale in _next_scales(slow, fast, goal):
        bounded = min(max(scale, LEAST), MOST)
        candidate = scaled(architecture, bounded, step=goal.step)
        if candidate.digest not in tried:
            return Trial(bounded, candidate)
    return doubtful


def _at_odds(slow: Trial, fast: Trial) -> bool:
    """Whether the wider network is faster, or slower by more than its width explains."""
    if slow.scale <= fast.scale:
        return True
    slope = math.log(fast.speedup / slow.speedup) / math.log(slow.scale / fast.scale)
    return slope > STEEPEST


def _next_scales(slow: Trial | None, fast: Trial | None, goal: Goal) -> Iterator[float]:
    """Where to look next, best first; networks of neighbouring scales may be the same."""
    if slow is None or fast is None:
        one = fast or slow
        assert one is not None
        for power in (STEEPNESS, 2 * STEEPNESS, 4 * STEEPNESS):
            yield one.scale * (one.speedup / goal.speedup) ** power
        return
    between = math.log(goal.speedup / slow.speedup) / math.log(fast.speedup / slow.speedup)
    for part in (min(max(between, 0.1), 0.9), 0.5, 0.25, 0.75):
        yield slow.scale ** (1 - part) * fast.scale**part


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
