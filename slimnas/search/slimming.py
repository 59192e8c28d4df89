"""Greedy slimming: from the largest network down, smallest accuracy drop per millisecond first.

Li et al., "EfficientFormer" (NeurIPS 2022), section 4.2. What the paper leaves open is decided
as follows: drops below zero count as zero; ties go to the
action that saves more time; the step that would reach the target takes, of the actions that
reach it, the one with the smallest drop, and of equals the one that overshoots least.

Steps of 16 channels and whole blocks overshoot nevertheless. Filling up gives back, action by
action, what gains most accuracy per millisecond and still fits; where nothing fits, one more
slimming step is traded for a growing one that lands in the aim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from slimnas.arch.space import SearchSpace, Selection
from slimnas.errors import UnreachableTargetError
from slimnas.search.actions import (
    Action,
    Frontier,
    Price,
    growing_actions,
    narrowings,
    open_actions,
)
from slimnas.search.importance import ImportanceRecord
from slimnas.search.trajectory import Candidate, Phase, Step, Trajectory

Evaluate = Callable[[Selection], float]
"""Top-1 of a selection on the SEARCH split, in percent."""


@dataclass(frozen=True)
class Aim:
    """Latencies in milliseconds, by the table, between which a network answers a target.

    Attributes:
        low_ms: filling up stops here; 0 for no filling up.
        high_ms: slimming stops here.
    """

    low_ms: float
    high_ms: float


class Walk:
    """Goes along a trajectory: over the steps it has already, then over new ones.

    Args:
        trajectory: from `Slimmer.begin`, or a saved one to go on from.
        on_step: called with the trajectory after each new step.
    """

    def __init__(
        self, trajectory: Trajectory, on_step: Callable[[Trajectory], None] | None = None
    ) -> None:
        self.trajectory = trajectory
        self.steps = 0
        self._on_step = on_step

    @property
    def selection(self) -> Selection:
        """Where the walk is."""
        if self.steps == 0:
            return self.trajectory.start
        return self.trajectory.steps[self.steps - 1].selection

    def take(self, make: Callable[[Trajectory], Step]) -> None:
        """Take the next recorded step, or the one that `make` gives where there is none."""
        if self.steps == len(self.trajectory.steps):
            self.trajectory = self.trajectory.with_step(make(self.trajectory))
            if self._on_step is not None:
                self._on_step(self.trajectory)
        self.steps += 1


@dataclass(frozen=True)
class Slimmer:
    """What a slimming run needs: a space, what counts, what it costs, how good it is.

    Attributes:
        space: the search space.
        importance: which blocks and stages matter, from the trained supernet.
        price: latency of a selection in ms.
        evaluate: top-1 of a selection in percent.
        frontier: `per_stage` or `paper`, see `open_actions`.
        fill: least share of a target that a network should use; 0 stops where greedy does.
        corrections: how many measured networks have corrected the prices.
    """

    space: SearchSpace
    importance: ImportanceRecord
    price: Price
    evaluate: Evaluate
    frontier: Frontier = "per_stage"
    fill: float = 0.0
    corrections: int = 0

    def begin(self, provenance: Mapping[str, Any]) -> Trajectory:
        """A trajectory of no steps, at the largest network."""
        start = self._start
        return Trajectory(start, self.price(start), self.evaluate(start), (), provenance)

    @cached_property
    def _start(self) -> Selection:
        return self.importance.start(self.space)

    def step(self, trajectory: Trajectory, target_ms: float) -> Step:
        """Weigh every open action in the trajectory's last state and take one.

        Raises:
            UnreachableTargetError: no action that saves time is left.
        """
        selection, _, top1 = trajectory.states[-1]
        actions = self._open(selection)
        if not actions:
            raise UnreachableTargetError(
                f"target latency {target_ms:g} ms was not reached: no action saves time below "
                f"{self.price(selection):.4g} ms; choose a higher target or a space with smaller "
                "networks"
            )
        candidates = self._weigh_all(selection, top1, actions)
        return self._taken(selection, candidates, choose(candidates, target_ms), "slim")

    def run(
        self,
        trajectory: Trajectory,
        targets_ms: Sequence[float],
        on_step: Callable[[Trajectory], None] | None = None,
    ) -> tuple[Trajectory, dict[float, int]]:
        """Answer every target, the highest first, going on from `trajectory`.

        Args:
            trajectory: from `begin`, or a saved one to go on from.
            targets_ms: the targets.
            on_step: called with the trajectory after each step.

        Returns:
            The whole trajectory, and for each target the number of steps that answer it.

        Raises:
            UnreachableTargetError: no action that saves time is left.
        """
        walk, reached = Walk(trajectory, on_step), {}
        for target_ms in sorted(targets_ms, reverse=True):
            self.reach(walk, Aim(self.fill * target_ms, target_ms))
            reached[target_ms] = walk.steps
        return walk.trajectory, {target_ms: reached[target_ms] for target_ms in targets_ms}

    def reach(self, walk: Walk, aim: Aim) -> None:
        """Slim until `aim.high_ms` is met, then fill up to `aim.low_ms` as far as that goes.

        What is done next depends on prices and the steps so far alone, so that a walk over
        recorded steps ends where it ended when they were taken.

        Raises:
            UnreachableTargetError: no action that saves time is left.
        """
        while self.price(walk.selection) > aim.high_ms:
            walk.take(lambda trajectory: self.step(trajectory, aim.high_ms))
        while self.price(walk.selection) < aim.low_ms:
            selection = walk.selection
            fitting = self._growing(selection, Aim(0.0, aim.high_ms))
            if fitting:
                walk.take(partial(self._fill, actions=fitting, phase="fill"))
                continue
            making_room = self._making_room(selection, aim)
            if not making_room:
                return
            walk.take(partial(self._make_room, actions=making_room))
            landing = self._growing(walk.selection, aim, but=selection)
            walk.take(partial(self._fill, actions=landing, phase="exchange"))

    def _open(self, selection: Selection) -> list[Action]:
        return open_actions(
            self.space, selection, self.importance, self.price, frontier=self.frontier
        )

    def _growing(
        self, selection: Selection, aim: Aim, but: Selection | None = None
    ) -> list[Action]:
        """Growing actions that land in `aim`, and not at `but`."""
        actions = growing_actions(self.space, selection, self._start, self.importance, self.price)
        states = [(action, action.apply(selection)) for action in actions]
        return [
            action
            for action, after in states
            if after != but and aim.low_ms <= self.price(after) <= aim.high_ms
        ]

    def _making_room(self, selection: Selection, aim: Aim) -> list[Action]:
        """Slimming actions after which a growing one lands in `aim`."""
        further = narrowings(self.space, selection, self.price)
        actions = dict.fromkeys((*self._open(selection), *further))
        return [a for a in actions if self._growing(a.apply(selection), aim, but=selection)]

    def _make_room(self, trajectory: Trajectory, actions: Sequence[Action]) -> Step:
        selection, _, top1 = trajectory.states[-1]
        candidates = self._weigh_all(selection, top1, actions)
        best = min(candidates, key=lambda c: (c.drop_per_ms, -c.saved_ms))
        return self._taken(selection, candidates, best, "exchange")

    def _fill(self, trajectory: Trajectory, actions: Sequence[Action], phase: Phase) -> Step:
        selection, _, top1 = trajectory.states[-1]
        candidates = self._weigh_all(selection, top1, actions)
        best = max(candidates, key=lambda c: (c.drop_per_ms, c.latency_ms))
        return self._taken(selection, candidates, best, phase)

    def _taken(
        self, selection: Selection, candidates: tuple[Candidate, ...], best: Candidate, phase: Phase
    ) -> Step:
        after = best.action.apply(selection)
        return Step(
            candidates, best.action, after, best.latency_ms, best.top1, phase, self.corrections
        )

    def _weigh_all(
        self, selection: Selection, top1: float, actions: Sequence[Action]
    ) -> tuple[Candidate, ...]:
        return tuple(self._weigh(selection, top1, action) for action in actions)

    def _weigh(self, selection: Selection, top1: float, action: Action) -> Candidate:
        after = action.apply(selection)
        after_ms, after_top1 = self.price(after), self.evaluate(after)
        saved_ms, drop = self.price(selection) - after_ms, top1 - after_top1
        if saved_ms > 0:
            drop = max(drop, 0.0)
        return Candidate(action, after_ms, saved_ms, after_top1, drop, drop / saved_ms)


def choose(candidates: Sequence[Candidate], target_ms: float) -> Candidate:
    """The candidate greedy takes; the first of complete equals."""
    best = min(candidates, key=lambda c: (c.drop_per_ms, -c.saved_ms))
    if best.latency_ms > target_ms:
        return best
    reaching = [c for c in candidates if c.latency_ms <= target_ms]
    return min(reaching, key=lambda c: (c.drop, c.saved_ms))


def cheapest(space: SearchSpace, price: Price) -> tuple[Selection, float]:
    """The fastest selection of the space by the table, and its latency in ms.

    Every stage at least width and least depth; latencies grow with both in any table worth
    using, so only the number of MB3D is left to try. Where slots choose from more, each stage gets
    its cheapest blocks: stages do not change each other's prices.
    """
    options = []
    for selection in space.smallest():
        least = selection
        for stage in range(0 if space.counts_attention else len(space.stages)):
            least = min(space.variants(least, stage), key=price)
        options.append((price(least), least))
    latency_ms, selection = min(options, key=lambda option: option[0])
    return selection, latency_ms


def check_reachable(space: SearchSpace, price: Price, targets_ms: Sequence[float]) -> None:
    """Refuse, before any training, a target below the fastest network of the space.

    Raises:
        UnreachableTargetError: says what the fastest network costs.
    """
    selection, fastest_ms = cheapest(space, price)
    for target_ms in targets_ms:
        if target_ms < fastest_ms:
            raise UnreachableTargetError(
                f"target latency {target_ms:g} ms cannot be reached in space {space.name}: its "
                f"smallest network (widths {list(selection.widths)}) costs {fastest_ms:.4g} ms by "
                "this table; choose a higher target or another --space"
            )
