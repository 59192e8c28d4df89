"""From importance and a budget to a width plan: greedy, or the exact optimum.

Both minimise the summed importance of what goes. Greedy takes, cut by cut, the one with the least
importance per cost saved (Molchanov et al., CVPR 2019, rank by importance alone; cost matters as
much). Exact solves the same choice as an integer programme: one width per sub-layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from slimnas.arch.architecture import Architecture
from slimnas.errors import PruneError, suggest
from slimnas.latency.table import LatencyTable
from slimnas.prune.costs import Budget, CostModel, amount_text
from slimnas.prune.exact import solve
from slimnas.prune.greedy import Greedy
from slimnas.prune.levels import Levels, State, make_levels
from slimnas.prune.scores import Scores
from slimnas.prune.steps import Steps, UnitKind
from slimnas.prune.widths import WidthPlan

Method = Literal["greedy", "exact"]
METHODS: tuple[Method, ...] = get_args(Method)
UNITS: tuple[UnitKind, ...] = get_args(UnitKind)
DEFAULT_UNITS: tuple[UnitKind, ...] = ("qk", "v", "ffn")


@dataclass(frozen=True)
class Selected:
    """What stays, for one budget.

    Attributes:
        plan: what stays.
        architecture: the pruned architecture.
        budget: what was asked.
        before: cost of the unpruned network, in the budget's unit.
        after: cost of the pruned one.
        removed_importance: summed importance of what goes.
        method: how it was chosen.
        gap: how much more importance greedy removes than the optimum, relative to it; 0 for the
            optimum itself, None where it was not computed.
    """

    plan: WidthPlan
    architecture: Architecture
    budget: Budget
    before: float
    after: float
    removed_importance: float
    method: Method
    gap: float | None


def select(
    architecture: Architecture,
    scores: Scores,
    budget: Budget,
    *,
    units: Collection[UnitKind] = DEFAULT_UNITS,
    method: Method = "greedy",
    round_to: int = 1,
    table: LatencyTable | None = None,
    name: str | None = None,
) -> Selected:
    """Choose what stays of `architecture` within `budget`.

    Args:
        architecture: before.
        scores: importance of its units.
        budget: never exceeded.
        units: what may be removed.
        method: greedy, or exact, which also tells greedy's gap; exact knows no embedding.
        round_to: widths that are cut end at multiples of this.
        table: prices, for a latency budget.
        name: of the pruned architecture.

    Raises:
        PruneError: scores of another network, an unknown unit or method, a budget below what the
            smallest legal widths allow (named), or above what the network costs already.
        MissingLatencyError: the table cannot price a width.
    """
    _check(units, method, round_to, budget)
    levels = make_levels(architecture, scores)
    steps = Steps(levels, CostModel(budget.kind, table), frozenset(units), round_to)
    before = steps.cost(levels.start)
    _refuse_unreachable(steps, budget, before, architecture.name)
    state = Greedy(steps).run(budget.limit)
    gap = None
    if method == "exact":
        best = solve(steps, budget.limit)
        least, found = levels.lost(best), levels.lost(state)
        gap = (found - least) / least if least > 0 else 0.0
        state = best
    return _selected(steps, state, budget, before, method, gap, name)


def _selected(
    steps: Steps,
    state: State,
    budget: Budget,
    before: float,
    method: Method,
    gap: float | None,
    name: str | None,
) -> Selected:
    levels: Levels = steps.levels
    plan = levels.plan(state)
    return Selected(
        plan=plan,
        architecture=plan.architecture(levels.architecture, name=name),
        budget=budget,
        before=before,
        after=steps.cost(state),
        removed_importance=levels.lost(state),
        method=method,
        gap=gap,
    )


def _check(units: Collection[str], method: str, round_to: int, budget: Budget) -> None:
    for given, known, what in ((units, UNITS, "units"), ((method,), METHODS, "method")):
        for one in given:
            if one not in known:
                raise PruneError(
                    f"{what}: must be some of {', '.join(known)}, got {one!r}{suggest(one, known)}"
                )
    if not units:
        raise PruneError(f"units: must be some of {', '.join(UNITS)}, got none")
    if round_to < 1:
        raise PruneError(f"round_to: must be at least 1, got {round_to}")
    if "embedding" in units and method == "exact":
        raise PruneError("method exact cannot weigh embedding channels; use greedy, or other units")
    if "embedding" in units and budget.kind == "units":
        raise PruneError("a budget of units counts qk, v and ffn; leave out embedding")


def _refuse_unreachable(steps: Steps, budget: Budget, before: float, name: str) -> None:
    if budget.limit > before * (1 + 1e-12):
        raise PruneError(
            f"budget: {budget} is more than {name} costs unpruned, "
            f"{amount_text(budget.kind, before)}; ask for less"
        )
    least = steps.cost(steps.smallest())
    if least > budget.limit:
        raise PruneError(
            f"budget: {budget} cannot be met, the smallest {name} with units "
            f"{','.join(sorted(steps.units))} costs {amount_text(budget.kind, least)}; ask for at "
            "least that, or allow more --units"
        )
