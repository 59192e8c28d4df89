"""Budgets, greedy and exact selection, against brute force and closed forms."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from prune_cases import ARCHITECTURES, FAMILIES, random_scores

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.errors import PruneError
from slimnas.prune.costs import Budget, CostKind, CostModel, amount_text, parse_budget
from slimnas.prune.levels import State, make_levels
from slimnas.prune.select import UNITS, Selected, select
from slimnas.prune.steps import Steps, UnitKind
from slimnas.zoo.registry import get

TOY = Architecture.from_yaml(
    """schema: slimnas/architecture/1
name: toy
input: {resolution: 32}
stem: {type: vit_stem, width: 6, patch: 16}
stages:
- width: 6
  blocks:
  - {type: vit, heads: 2, qk_dim: 3, v_dim: 2, ffn_dim: 4}
  - {type: vit, heads: 1, qk_dim: 2, v_dim: 3, ffn_dim: 3}
head: {type: token, classes: 3}
"""
)


def all_states(architecture: Architecture) -> list[State]:
    """Every state of the toy with units qk, v and ffn."""
    levels = make_levels(architecture, random_scores(architecture))
    start = levels.start
    options = []
    for full in start.blocks.values():
        ranges = (range(1, full.qk + 1), range(1, full.v + 1), range(1, full.ffn + 1))
        options.append([type(full)(full.heads, q, v, f) for q, v, f in product(*ranges)])
    return [State(dict(zip(start.blocks, one, strict=True)), (6,)) for one in product(*options)]


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_is_the_brute_force_optimum(kind: CostKind, seed: int) -> None:
    scores = random_scores(TOY, seed)
    levels = make_levels(TOY, scores)
    steps = Steps(levels, CostModel(kind), frozenset({"qk", "v", "ffn"}), 1)
    states = all_states(TOY)
    assert len(states) == 3 * 2 * 4 * 2 * 3 * 3
    priced = [(steps.cost(state), levels.lost(state)) for state in states]
    looked_at = 0
    least, full = min(cost for cost, _ in priced), priced[-1][0]
    for share in (0.95, 0.8, 0.5, 0.2, 0.05):
        limit = least + share * (full - least)
        best = min(lost for cost, lost in priced if cost <= limit)
        found = select(TOY, scores, Budget(kind, limit), method="exact")
        assert found.removed_importance == pytest.approx(best)
        greedy = select(TOY, scores, Budget(kind, limit))
        assert greedy.removed_importance >= best * (1 - 1e-9)
        assert found.gap == pytest.approx(greedy.removed_importance / best - 1)
        looked_at += 1
    assert looked_at == 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["macs", "params", "units"])
def test_costs_of_states_are_those_of_the_architectures(family: str, kind: CostKind) -> None:
    """The incremental count, against counting the pruned architecture afresh."""
    architecture = ARCHITECTURES[family]
    units: list[UnitKind] = ["qk", "v", "ffn", "head"]
    if kind != "units":
        units.append("embedding")
    if family != "efficientformer":
        units.append("layer")
    full = CostModel(kind).total(architecture)
    checked = 0
    for seed, share in product(range(2), (0.95, 0.8, 0.6)):
        scores = random_scores(architecture, seed)
        found = select(architecture, scores, Budget(kind, share * full), units=units)
        assert found.after == pytest.approx(CostModel(kind).total(found.architecture), rel=1e-12)
        assert found.after <= share * full
        if kind != "units":
            counted = cost(found.architecture)
            assert found.after == (counted.macs if kind == "macs" else counted.params)
        checked += 1
    assert checked == 6


def widths(found: Selected) -> list[tuple[int, int, int, int]]:
    blocks = [block for stage in found.architecture.stages for block in stage.blocks]
    return [
        (getattr(b, "heads", 0), getattr(b, "qk_dim", 0), getattr(b, "v_dim", 0), b.ffn_dim or 0)
        for b in blocks
    ]


def test_deit_meets_every_budget_closely_and_monotonically() -> None:
    architecture = get("deit_tiny").architecture
    scores = random_scores(architecture)
    full = cost(architecture).macs
    before = float("inf")
    shares = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    for share in shares:
        found = select(architecture, scores, Budget("macs", share * full))
        assert 0.995 * share * full <= found.after <= share * full
        assert found.after == cost(found.architecture).macs < before
        before = found.after


def test_greedy_is_close_to_the_optimum_on_deit() -> None:
    architecture = get("deit_tiny").architecture
    scores = random_scores(architecture)
    budget = Budget("macs", 0.6 * cost(architecture).macs)
    found = select(architecture, scores, budget, method="exact")
    assert found.gap is not None
    assert 0 <= found.gap < 1e-3
    assert 0.995 * budget.limit <= found.after <= budget.limit


@pytest.mark.parametrize("method", ["greedy", "exact"])
def test_the_least_important_go_first(method: str) -> None:
    scores = random_scores(TOY)
    levels = make_levels(TOY, scores)
    steps = Steps(levels, CostModel("macs"), frozenset({"qk", "v", "ffn"}), 1)
    least, full = steps.cost(steps.smallest()), steps.cost(levels.start)
    budget = Budget("macs", (least + full) / 2)
    plan = select(TOY, scores, budget, method=method).plan  # type: ignore[arg-type]
    cut = 0
    for name, block in plan.blocks.items():
        mine = scores.blocks[name]
        stays = mine.ffn[list(block.ffn)]
        goes = np.delete(mine.ffn, list(block.ffn))
        assert not len(goes) or goes.max() <= stays.min()
        for kind in ("qk", "v"):
            for head, dims in zip(block.heads, getattr(block, kind), strict=True):
                values = getattr(mine, kind)[head]
                left = np.delete(values, list(dims))
                assert not len(left) or left.max() <= values[list(dims)].min()
                cut += len(left)
        cut += len(goes)
    assert cut > 0


@pytest.mark.parametrize("round_to", [8, 16])
@pytest.mark.parametrize("method", ["greedy", "exact"])
def test_widths_are_multiples(round_to: int, method: str) -> None:
    architecture = get("deit_tiny").architecture
    budget = parse_budget("macs", "60%", architecture)
    found = select(
        architecture,
        random_scores(architecture),
        budget,
        round_to=round_to,
        method=method,  # type: ignore[arg-type]
    )
    assert all(w % round_to == 0 for block in widths(found) for w in block[1:])
    assert len(widths(found)) == 12
    assert 0.99 * budget.limit < found.after <= budget.limit


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("method", ["greedy", "exact"])
def test_whole_layers_may_go_but_never_a_stage(family: str, method: str) -> None:
    architecture = ARCHITECTURES[family]
    scores = random_scores(architecture)
    steps = Steps(make_levels(architecture, scores), CostModel("macs"), frozenset(UNITS[:4]), 1)
    everything: frozenset[UnitKind] = frozenset({"qk", "v", "ffn", "head", "layer"})
    smallest = Steps(steps.levels, steps.model, everything, 1)
    limit = 1.02 * smallest.cost(smallest.smallest())
    found = select(
        architecture,
        scores,
        Budget("macs", limit),
        units=everything,
        method=method,  # type: ignore[arg-type]
    )
    assert cost(found.architecture).macs <= limit
    assert all(stage.blocks for stage in found.architecture.stages)
    assert sum(found.architecture.depths) < sum(architecture.depths)


def test_nothing_is_cut_when_the_budget_is_what_it_costs() -> None:
    found = select(TOY, random_scores(TOY), parse_budget("macs", "100%", TOY))
    assert found.architecture == TOY
    assert found.removed_importance == 0


@pytest.mark.parametrize(
    ("kind", "text", "limit"),
    [
        ("macs", "0.9G", 0.9e9),
        ("macs", "900M", 0.9e9),
        ("macs", "75%", 0.75 * 1253683200),
        ("params", "4M", 4e6),
        ("params", "4000k", 4e6),
        ("params", "50%", 0.5 * 5717416),
    ],
)
def test_budgets_as_users_write_them(kind: CostKind, text: str, limit: float) -> None:
    budget = parse_budget(kind, text, get("deit_tiny").architecture)
    assert budget.kind == kind
    assert budget.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("macs", "many", "macs must be a number"),
        ("macs", "-1G", "macs must be a number"),
        ("macs", "0", "must be above 0"),
        ("params", "120%", "a share of params must lie above 0 and up to 100 %"),
        ("latency_ms", "50%", "a latency budget needs a latency table"),
    ],
)
def test_bad_budgets(kind: CostKind, text: str, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        parse_budget(kind, text, TOY)


def test_budget_text() -> None:
    assert str(Budget("macs", 0.9e9)) == "0.9 GMACs"
    assert amount_text("params", 4.12e6) == "4.12 M params"


def test_refusals() -> None:
    scores = random_scores(TOY)
    full = cost(TOY).macs
    with pytest.raises(PruneError, match=r"cannot be met, the smallest toy with units ffn,qk,v"):
        select(TOY, scores, Budget("macs", full / 4))
    with pytest.raises(PruneError, match="is more than toy costs unpruned"):
        select(TOY, scores, Budget("macs", 2 * full))
    with pytest.raises(PruneError, match=r"units: must be some of .*got 'heads' \(did you mean"):
        select(TOY, scores, Budget("macs", full), units=["heads"])  # type: ignore[list-item]
    with pytest.raises(PruneError, match="method: must be some of greedy, exact"):
        select(TOY, scores, Budget("macs", full), method="milp")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="exact cannot weigh embedding"):
        select(TOY, scores, Budget("macs", full), method="exact", units=["embedding"])
    with pytest.raises(PruneError, match="must be for toy"):
        select(TOY, random_scores(ARCHITECTURES["vit"]), Budget("macs", full))
    with pytest.raises(PruneError, match="round_to: must be at least 1"):
        select(TOY, scores, Budget("macs", full), round_to=0)
