"""Greedy slimming: from the largest network down, smallest accuracy drop per millisecond first.

Li et al., "EfficientFormer" (NeurIPS 2022), section 4.2. What the paper leaves open is decided
as follows: drops below zero count as zero; ties go to the
action that saves more time; the step that would reach the target takes, of the actions that
reach it, the one with the smallest drop, and of equals the one that overshoots least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimnas.arch.space import SearchSpace, Selection
from slimnas.errors import UnreachableTargetError
from slimnas.search.actions import Action, Frontier, Price, open_actions
from slimnas.search.importance import ImportanceRecord
from slimnas.search.trajectory import Candidate, Step, Trajectory

Evaluate = Callable[[Selection], float]
"""Top-1 of a selection on the SEARCH split, in percent."""


@dataclass(frozen=True)
class Slimmer:
    """What a slimming run needs: a space, what counts, what it costs, how good it is.

    Attributes:
        space: the search space.
        importance: which blocks and stages matter, from the trained supernet.
        price: latency of a selection in ms.
        evaluate: top-1 of a selection in percent.
        frontier: `per_stage` or `paper`, see `open_actions`.
    """

    space: SearchSpace
    importance: ImportanceRecord
    price: Price
    evaluate: Evaluate
    frontier: Frontier = "per_stage"

    def begin(self, provenance: Mapping[str, Any]) -> Trajectory:
        """A trajectory of no steps, at the largest network."""
        start = self.importance.start(self.space)
        return Trajectory(start, self.price(start), self.evaluate(start), (), provenance)

    def step(self, trajectory: Trajectory, target_ms: float) -> Step:
        """Weigh every open action in the trajectory's last state and take one.

        Raises:
            UnreachableTargetError: no action that saves time is left.
        """
        selection, latency_ms, top1 = trajectory.states[-1]
        actions = open_actions(
            self.space, selection, self.importance, self.price, frontier=self.frontier
        )
        if not actions:
            raise UnreachableTargetError(
                f"target latency {target_ms:g} ms was not reached: no action saves time below "
                f"{latency_ms:.4g} ms; choose a higher target or a space with smaller networks"
            )
        candidates = tuple(self._weigh(selection, latency_ms, top1, action) for action in actions)
        taken = choose(candidates, target_ms)
        return Step(
            candidates,
            taken.action,
            taken.action.apply(selection),
            taken.latency_ms,
            taken.top1,
        )

    def run(
        self,
        trajectory: Trajectory,
        targets_ms: Sequence[float],
        on_step: Callable[[Trajectory], None] | None = None,
    ) -> tuple[Trajectory, dict[float, int]]:
        """Slim until every target is met, going on from `trajectory`.

        Args:
            trajectory: from `begin`, or a saved one to go on from.
            targets_ms: the targets; each is answered by the first state at or below it.
            on_step: called with the trajectory after each step.

        Returns:
            The whole trajectory, and for each target the number of steps that reach it.

        Raises:
            UnreachableTargetError: no action that saves time is left.
        """
        for target_ms in sorted(targets_ms, reverse=True):
            while trajectory.states[-1][1] > target_ms:
                trajectory = trajectory.with_step(self.step(trajectory, target_ms))
                if on_step is not None:
                    on_step(trajectory)
        reached = {}
        for target_ms in targets_ms:
            latencies = [latency_ms for _, latency_ms, _ in trajectory.states]
            reached[target_ms] = next(i for i, ms in enumerate(latencies) if ms <= target_ms)
        return trajectory, reached

    def _weigh(
        self, selection: Selection, latency_ms: float, top1: float, action: Action
    ) -> Candidate:
        after = action.apply(selection)
        after_ms, after_top1 = self.price(after), self.evaluate(after)
        saved_ms, drop = latency_ms - after_ms, max(top1 - after_top1, 0.0)
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
    using, so only the number of MB3D is left to try.
    """
    options = [(price(selection), selection) for selection in space.smallest()]
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
