"""Exact choice: the least importance lost within the budget, as an integer programme.

A multiple-choice knapsack: of each sub-layer's possible widths exactly one is taken. Widths that
lose more and cost no less than another are left out first. Solved by HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from slimnas.errors import PruneError
from slimnas.prune.costs import BlockWidths
from slimnas.prune.levels import BlockLevels, State
from slimnas.prune.steps import Steps

ATTEMPTS = 5
SECONDS = 120.0
GAP = 1e-4
"""Relative gap at which the solver stops: far below what importance scores are good for."""


NOTHING = BlockWidths(0, 0, 0, 0)


@dataclass(frozen=True)
class _Option:
    """One sub-layer at one width."""

    widths: BlockWidths
    lost: float
    cost: float


@dataclass(frozen=True)
class _Group:
    """The options of one sub-layer, exactly one of which is taken."""

    name: str
    attention: bool
    options: tuple[_Option, ...]


def solve(steps: Steps, limit: float) -> State:
    """The state with the least importance lost that costs at most `limit`.

    Raises:
        PruneError: the solver found none within its time.
    """
    groups = list(_groups(steps))
    asked = limit
    for _ in range(ATTEMPTS):
        state = _solve(steps, groups, asked)
        cost = steps.cost(state)
        if cost <= limit:
            return state
        # A table may price an EfficientFormer block at other than the sum of its sub-layers.
        asked -= 1.01 * (cost - limit)
    raise PruneError(
        "exact choice: the widths it finds cost more together than one by one; use greedy"
    )


def _solve(steps: Steps, groups: list[_Group], limit: float) -> State:
    start = steps.levels.start
    fixed = steps.cost(start) - sum(steps.block_cost(name, start) for name in start.blocks)
    options = [option for group in groups for option in group.options]
    member = np.repeat(np.arange(len(groups)), [len(group.options) for group in groups])
    one_each = csr_array((np.ones(len(options)), (member, np.arange(len(options)))))
    # Scaled, so that the solver's absolute tolerances mean the same in every unit.
    scale = max(limit - fixed, 1e-30)
    lost = np.array([option.lost for option in options])
    costs = np.array([option.cost for option in options]) / scale
    result = milp(
        lost / max(float(np.abs(lost).max()), 1e-300),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None], -np.inf, (limit - fixed) / scale),
            *_stages_stay(steps, groups),
        ],
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if result.x is None:
        raise PruneError(f"exact choice: the solver found no widths ({result.message}); use greedy")
    state = start
    for group, index in zip(groups, np.flatnonzero(result.x > 0.5), strict=True):
        taken, widths = options[int(index)].widths, state.blocks[group.name]
        merged = replace(taken, ffn=widths.ffn) if group.attention else _with_ffn(widths, taken)
        state = state.with_block(group.name, merged)
    return state


def _with_ffn(widths: BlockWidths, taken: BlockWidths) -> BlockWidths:
    return replace(widths, ffn=taken.ffn)


def _groups(steps: Steps) -> Iterator[_Group]:
    for name, levels in steps.levels.blocks.items():
        if levels.full.heads:
            yield _Group(name, True, _front(_attention_options(steps, name, levels)))
        if levels.full.ffn:
            yield _Group(name, False, _front(_ffn_options(steps, name, levels)))


def _attention_options(steps: Steps, name: str, levels: BlockLevels) -> Iterator[_Option]:
    full = levels.full
    # EfficientFormer's blocks are priced whole: the FFN is counted here, its savings there.
    beside = 0 if levels.removable else full.ffn
    heads = range(1, full.heads + 1) if "head" in steps.units else (full.heads,)
    qk = _choices(steps, full.qk) if "qk" in steps.units else (full.qk,)
    v = _choices(steps, full.v) if "v" in steps.units else (full.v,)
    for h, q, d in product(heads, qk, v):
        widths = BlockWidths(h, q, d, beside)
        cost = steps.widths_cost(name, widths, steps.levels.start)
        yield _Option(widths, levels.lost_attention(widths), cost)
    if "layer" in steps.units and levels.removable:
        yield _Option(NOTHING, levels.lost_attention(NOTHING), 0.0)


def _ffn_options(steps: Steps, name: str, levels: BlockLevels) -> Iterator[_Option]:
    full, start = levels.full, steps.levels.start
    whole = bool(full.heads) and not levels.removable
    beside = full if whole else NOTHING
    base = steps.widths_cost(name, full, start) if whole else 0.0
    for hidden in _choices(steps, full.ffn) if "ffn" in steps.units else (full.ffn,):
        widths = replace(beside, ffn=hidden)
        cost = steps.widths_cost(name, widths, start) - base
        yield _Option(widths, levels.lost_ffn(widths), cost)
    if "layer" in steps.units and levels.removable:
        yield _Option(NOTHING, levels.lost_ffn(NOTHING), 0.0)


def _choices(steps: Steps, full: int) -> tuple[int, ...]:
    """Widths that a width of `full` may be cut to, and itself."""
    step = steps.round_to
    return (*range(step, full, step), full)


def _front(options: Iterator[_Option]) -> tuple[_Option, ...]:
    """Options that no other beats in both, by falling cost."""
    best: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.lost)):
        if not best or option.lost < best[-1].lost:
            best.append(option)
    return tuple(best)


def _stages_stay(steps: Steps, groups: list[_Group]) -> Iterator[LinearConstraint]:
    """In every stage one sub-layer at least is not the empty option."""
    if "layer" not in steps.units:
        return
    count = sum(len(group.options) for group in groups)
    stages: dict[int, tuple[list[int], int]] = {}
    at = 0
    for group in groups:
        stage = steps.levels.blocks[group.name].component.stage
        empty, total = stages.get(stage, ([], 0))
        for i, option in enumerate(group.options):
            if not (option.widths.heads or option.widths.ffn):
                empty.append(at + i)
        stages[stage] = (empty, total + 1)
        at += len(group.options)
    for empty, total in stages.values():
        row = np.zeros((1, count))
        row[0, empty] = 1
        yield LinearConstraint(row, -np.inf, total - 1)
