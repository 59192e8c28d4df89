"""Greedy choice: the cut with the least importance per cost saved, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slimnas.prune.costs import BlockWidths
from slimnas.prune.levels import State
from slimnas.prune.steps import Steps

Place = tuple[str, bool]
"""A block's name, and whether its attention (or its FFN) is meant."""


@dataclass(frozen=True)
class _Cut:
    """A candidate: importance lost per cost saved, what it saves, and the block's widths after."""

    ratio: float
    saved: float
    widths: BlockWidths

    @property
    def order(self) -> tuple[float, float]:
        """Least importance per cost first, then the largest saving."""
        return self.ratio, -self.saved


class Greedy:
    """One greedy run over what `steps` allows."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._levels = steps.levels
        self._best: dict[Place, _Cut] = {}

    def run(self, limit: float) -> State:
        """Cut until the network costs at most `limit`, then give back what still fits.

        `limit` must be reachable: at least the cost of `steps.smallest()`.
        """
        state = self._levels.start
        cost = self._steps.cost(state)
        self._weigh_all(state)
        while cost > limit:
            place = min(self._best, key=lambda at: self._best[at].order, default=None)
            stream = self._stream_cut(state, cost)
            if stream is not None and (place is None or stream[0] < self._best[place].ratio):
                state = stream[1]
                self._weigh_all(state)  # every block is cheaper in a narrower stream
                cost = self._steps.cost(state)
            elif place is not None:
                cut = self._best[place]
                state = state.with_block(place[0], cut.widths)
                cost -= cut.saved
                if cost <= limit:  # the sum of many differences: let the count itself decide
                    cost = self._steps.cost(state)
                if cut.widths.heads or cut.widths.ffn:
                    self._weigh(place[0], state)
                else:  # a block is gone: others may be the last of their stage now
                    self._weigh_all(state)
            else:  # every cut left saves nothing by itself
                return self._steps.smallest()
        return self._give_back(state, limit)

    def _weigh_all(self, state: State) -> None:
        for name in self._levels.blocks:
            self._weigh(name, state)

    def _weigh(self, name: str, state: State) -> None:
        """Find the best cut of each of a block's sub-layers."""
        for attention in (True, False):
            self._best.pop((name, attention), None)
            cuts = self._cuts((name, attention), state)
            best = min(cuts, key=lambda cut: cut.order, default=None)
            if best is not None:
                self._best[name, attention] = best

    def _cuts(self, place: Place, state: State) -> Iterator[_Cut]:
        name, attention = place
        widths, levels = state.blocks[name], self._levels.blocks[name]
        before = self._steps.block_cost(name, state)
        cuts = self._steps.attention_cuts if attention else self._steps.ffn_cuts
        lost = levels.lost_attention if attention else levels.lost_ffn
        now = lost(widths)
        for smaller in cuts(name, widths):
            saved = before - self._steps.widths_cost(name, smaller, state)
            if saved > 0 and self._steps.keeps_stage(name, smaller, state):
                yield _Cut((lost(smaller) - now) / saved, saved, smaller)

    def _stream_cut(self, state: State, cost: float) -> tuple[float, State] | None:
        """The best cut of a residual stream: importance per cost, and the state after it."""
        best = None
        for narrower in self._steps.stream_cuts(state):
            saved = cost - self._steps.cost(narrower)
            lost = self._levels.lost(narrower) - self._levels.lost(state)
            if saved > 0 and (best is None or lost / saved < best[0]):
                best = (lost / saved, narrower)
        return best

    def _give_back(self, state: State, limit: float) -> State:
        """Widen again what fits, most importance per cost first: the last cut may have been big."""
        cost = self._steps.cost(state)
        while True:
            best: tuple[float, State, float] | None = None
            for name, wider in self._wider(state):
                after = state.with_block(name, wider)
                added = self._steps.block_cost(name, after) - self._steps.block_cost(name, state)
                levels = self._levels.blocks[name]
                gained = levels.lost(state.blocks[name]) - levels.lost(wider)
                if added > 0 and cost + added <= limit and gained > 0:
                    ratio = gained / added
                    if best is None or ratio > best[0]:
                        best = (ratio, after, added)
            if best is None:
                return state
            state, cost = best[1], cost + best[2]
            if cost > limit * (1 - 1e-12):
                return state

    def _wider(self, state: State) -> Iterator[tuple[str, BlockWidths]]:
        """Each block with one of its widths one step up."""
        round_to = self._steps.round_to
        for name, widths in state.blocks.items():
            full = self._levels.blocks[name].full
            for kind in ("qk", "v", "ffn"):
                now, most = getattr(widths, kind), getattr(full, kind)
                if 0 < now < most:
                    up = min(most, (now // round_to + 1) * round_to)
                    yield name, replace(widths, **{kind: up})
