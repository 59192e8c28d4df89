"""Width rules: what channel ratios say about where width belongs, as a network to train anew.

EfficientViT (CVPR 2023, section 2.3 and 3) pruned DeiT-T and Swin-T by Taylor importance, read
from the ratios that queries and keys need few dims, values the width of their input and the FFN a
lower ratio, and trained networks of those widths from scratch. Here the same reading is done by
fixed steps, each with its evidence:

- A block's value is its median over budgets. Parts that are gone count as 0.
- Q and K: dims per unpruned head, rounded to the hardware's multiple. V: ratio to the embedding,
  in steps of 1/8. FFN: ratio to the embedding, in steps of 1/4.
- One level for all depths, or two or three where `slimnas.prune.segments` finds them. Networks of
  several stages change level between stages only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from slimnas.arch.architecture import AnyBlock, Architecture
from slimnas.arch.documents import parse_spec
from slimnas.errors import MissingLatencyError, PruneError
from slimnas.latency.table import LatencyTable
from slimnas.prune.costs import Budget, CostModel, amount_text
from slimnas.prune.ratios import BlockRatios, ChannelRatios, RatioSet
from slimnas.prune.segments import Fit, chosen, fit_levels
from slimnas.prune.widths import attention_dims, removable_layers

Quantity = Literal["qk_dim", "v_ratio", "ffn_ratio"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
TITLES: Mapping[Quantity, str] = {
    "qk_dim": "Q and K dims per head",
    "v_ratio": "V width / embedding",
    "ffn_ratio": "FFN width / embedding",
}
STEPS: Mapping[Quantity, float] = {"v_ratio": 1 / 8, "ffn_ratio": 1 / 4}
EMBEDDING_STEP = 8
MULTIPLE = 8
WIDEST = 8192
"""Embedding width at which looking for a budget's network ends."""

PAST = 1.5
"""How far above a budget looking goes: cost grows with the width but for rounding."""

DepthDependent = Literal["auto", "no"]


@dataclass(frozen=True)
class Level:
    """One value for a run of blocks.

    Attributes:
        first: position of the first block it is for, from 0.
        last: position of the last one.
        median: of the blocks that have the part.
        value: rounded; 0 only where most of the blocks lost the part.
    """

    first: int
    last: int
    median: float
    value: float


@dataclass(frozen=True)
class Choice:
    """How one quantity was chosen.

    Attributes:
        quantity: which.
        levels: one for all depths, or several from the first block to the last.
        unpruned: median over blocks before pruning.
        median: over blocks of the medians over budgets.
        quartiles: lower and upper quartile over blocks.
        by_budget: median over blocks at each budget.
        fits: one, two and three levels, with what they explain.
    """

    quantity: Quantity
    levels: tuple[Level, ...]
    unpruned: float
    median: float
    quartiles: tuple[float, float]
    by_budget: Mapping[str, float]
    fits: tuple[Fit, ...]

    def value(self, position: int) -> float:
        """The level at a block's position."""
        return next(level.value for level in self.levels if position <= level.last)

    @property
    def reason(self) -> str:
        """Why so many levels, in a line."""
        used = next((fit for fit in self.fits if fit.levels == len(self.levels)), self.fits[0])
        others = [fit for fit in self.fits if fit.levels > 1]
        if used.levels > 1:
            return (
                f"{used.levels} levels explain {100 * used.explained:.0f} % of the variance over "
                f"depth, {_chance(used)} of random orders as much; BIC {used.bic:.1f}, one level "
                f"{self.fits[0].bic:.1f}"
            )
        if not others:
            return "too few blocks to tell depths apart"
        best = min(others, key=lambda fit: fit.bic)
        return (
            f"{best.levels} levels would explain {100 * best.explained:.0f} %, {_chance(best)} of "
            f"random orders as much; BIC {best.bic:.1f}, one level {self.fits[0].bic:.1f}"
        )


@dataclass(frozen=True)
class WidthRule:
    """A compact rule of widths.

    Attributes:
        source: the unpruned architecture that the ratios are of.
        choices: one per quantity that the model has.
        multiple: what widths are multiples of.
        budgets: labels of the budgets behind it.
    """

    source: Architecture
    choices: Mapping[Quantity, Choice]
    multiple: int
    budgets: tuple[str, ...]

    def architecture(self, width: int, *, name: str | None = None) -> Architecture:
        """The uniform network of the rule whose first stage is `width` wide.

        Depths stay the source's, later stages keep their width relative to the first, heads keep
        the width of embedding they share out; blocks that the rule leaves nothing of are left out.

        Args:
            width: embedding width, a multiple of 8.
            name: the new one's; `{source}_rule` if not given.

        Raises:
            PruneError: another width, or a stage of which nothing would stay.
            SpecError: a name that no architecture may have, or widths that none may.
        """
        if width < EMBEDDING_STEP or width % EMBEDDING_STEP:
            raise PruneError(f"width rule: the embedding must be a multiple of 8, got {width}")
        first = self.source.stages[0].width
        stages, position = [], 0
        for number, stage in enumerate(self.source.stages):
            wide = _to_multiple(stage.width * width / first, EMBEDDING_STEP)
            blocks = []
            for block in stage.blocks:
                fields = self._block(block, stage.width, wide, position)
                position += 1
                if fields["ffn_dim"] or fields.get("heads"):
                    blocks.append(fields)
            if not blocks:
                raise PruneError(
                    f"width rule: stages.{number}: the rule leaves nothing of it; its ratios are "
                    "0, make a rule from larger budgets"
                )
            stages.append({**stage.model_dump(), "width": wide, "blocks": blocks})
        values = {k: [asdict(level) for level in c.levels] for k, c in self.choices.items()}
        origin = {"ratios_of": self.source.name, "budgets": list(self.budgets), "rule": values}
        stem = {**self.source.stem.model_dump()}
        stem["width"] = _to_multiple(stem["width"] * width / first, EMBEDDING_STEP)
        data = {
            **self.source.model_dump(),
            "name": name or f"{self.source.name}_rule",
            "stem": stem,
            "stages": stages,
            "provenance": {"width_rule": origin},
        }
        return parse_spec(Architecture, data, source="width rule")

    def _block(self, block: AnyBlock, before: int, width: int, position: int) -> dict[str, Any]:
        fields = block.model_dump()
        ffn = (
            self.choices["ffn_ratio"].value(position) * width if "ffn_ratio" in self.choices else 0
        )
        fields["ffn_dim"] = max(self.multiple, _to_multiple(ffn, self.multiple)) if ffn else 0
        heads, _, _ = attention_dims(block)
        if heads:
            qk = self.choices["qk_dim"].value(position)
            v = self.choices["v_ratio"].value(position)
            count = max(1, round(width * heads / before)) if qk and v else 0
            dims = {"heads": count, "qk_dim": 0, "v_dim": 0}
            if count:
                dims["qk_dim"] = int(qk)
                share = _to_multiple(v * width / count, self.multiple)
                dims["v_dim"] = max(self.multiple, share)
            fields |= dims
        return fields


@dataclass(frozen=True)
class Instance:
    """The network of a rule for a budget.

    Attributes:
        architecture: to train from scratch.
        width: of its embedding (first stage).
        cost: in the budget's unit.
    """

    architecture: Architecture
    width: int
    cost: float


def make_rule(
    ratios: RatioSet,
    *,
    multiple: int = MULTIPLE,
    depth_dependent: DepthDependent = "auto",
    budgets: Sequence[str] | None = None,
    seed: int = 0,
) -> WidthRule:
    """Read a width rule from channel ratios.

    Args:
        ratios: of one model.
        multiple: what Q, K, V and FFN widths are rounded to.
        depth_dependent: whether depths may differ where the data want it.
        budgets: labels of the budgets to use; None for all.
        seed: of the random orders of the depth test.

    Raises:
        PruneError: an unknown budget, or a multiple below 1.
    """
    if multiple < 1:
        raise PruneError(f"width rule: the multiple must be at least 1, got {multiple}")
    used = _used(ratios, budgets)
    choices: dict[Quantity, Choice] = {}
    for quantity in QUANTITIES:
        choice = _choose(quantity, ratios.source, used, multiple, depth_dependent == "auto", seed)
        if choice is not None:
            choices[quantity] = choice
    return WidthRule(ratios.source, choices, multiple, tuple(budget.label for budget in used))


def instantiate(
    rule: WidthRule, budget: Budget, table: LatencyTable | None = None, *, name: str | None = None
) -> Instance:
    """The network of `rule` that comes closest to `budget` from below, by its embedding width.

    Args:
        rule: the rule.
        budget: macs, params or latency_ms.
        table: prices, for a latency.
        name: of the architecture.

    Raises:
        PruneError: the narrowest network is above the budget; its cost is named.
        SpecError: a name that no architecture may have.
        MissingLatencyError: the table prices no width of it.
    """
    model = CostModel(budget.kind, table)
    # A table holds the widths of pruned networks: none far above the unpruned one's.
    widest = WIDEST if table is None else 2 * rule.source.stages[0].width
    priced: list[Instance] = []
    missing: MissingLatencyError | None = None
    for width in range(EMBEDDING_STEP, widest + 1, EMBEDDING_STEP):
        architecture = rule.architecture(width, name=name)
        try:
            priced.append(Instance(architecture, width, model.total(architecture)))
        except MissingLatencyError as error:
            missing = error
            continue
        if priced[-1].cost > PAST * budget.limit:
            break
    if not priced and missing is not None:
        raise missing
    within = [found for found in priced if found.cost <= budget.limit]
    if not within:
        least = min(found.cost for found in priced)
        raise PruneError(
            f"width rule: the budget must be at least {amount_text(budget.kind, least)}, what the "
            f"narrowest network {'' if missing is None else 'that the table prices '}costs; got "
            f"{budget}"
        )
    return max(within, key=lambda found: (found.cost, found.width))


def rule_rows(rule: WidthRule) -> list[tuple[str, ...]]:
    """Text of a table, the titles first: what, for which blocks, the rule, its evidence."""
    rows: list[tuple[str, ...]] = [
        ("width", "blocks", "rule", "median", "over blocks", "per budget", "unpruned")
    ]
    for quantity, choice in rule.choices.items():
        for number, level in enumerate(choice.levels):
            low, high = choice.quartiles
            budgets = ", ".join(f"{key} {value:.3g}" for key, value in choice.by_budget.items())
            only = number == 0
            rows.append(
                (
                    TITLES[quantity] if only else "",
                    f"{level.first + 1} to {level.last + 1}",
                    f"{level.value:g}",
                    f"{level.median:.3g}",
                    f"{low:.3g} to {high:.3g}" if only else "",
                    budgets if only else "",
                    f"{choice.unpruned:.3g}" if only else "",
                )
            )
    return rows


def _used(ratios: RatioSet, labels: Sequence[str] | None) -> tuple[ChannelRatios, ...]:
    if not labels:
        return ratios.budgets
    known = {budget.label: budget for budget in ratios.budgets}
    for label in labels:
        if label not in known:
            raise PruneError(
                f"width rule: no budget {label!r} in the ratios; they have {', '.join(known)}"
            )
    return tuple(known[label] for label in labels)


def _choose(
    quantity: Quantity,
    source: Architecture,
    budgets: Sequence[ChannelRatios],
    multiple: int,
    by_depth: bool,
    seed: int,
) -> Choice | None:
    blocks = budgets[0].blocks
    places = [i for i, block in enumerate(blocks) if _value(quantity, block, pruned=False)]
    if not places:
        return None
    table = np.array([[_value(quantity, b.blocks[i]) for i in places] for b in budgets])
    values = np.median(table, axis=0)
    step = STEPS.get(quantity, float(multiple))
    spec = [block for stage in source.stages for block in stage.blocks]
    may_go = all(removable_layers(spec[i]) for i in places)

    def rounded(value: float) -> float:
        # 0 leaves the part out, which only a median of 0 asks for, and only where that is legal.
        if value == 0 and may_go:
            return 0.0
        return max(step, round(value / step) * step)

    fits = fit_levels(values, step=step, rounded=rounded, breaks=_breaks(blocks, places), seed=seed)
    fit = chosen(fits) if by_depth else fits[0]
    levels = []
    for start, end in zip(fit.starts, (*fit.starts[1:], len(places)), strict=True):
        middle = float(np.median(values[start:end]))
        first = 0 if start == 0 else places[start]
        last = len(blocks) - 1 if end == len(places) else places[end] - 1
        levels.append(Level(first, last, middle, rounded(middle)))
    low, high = (float(q) for q in np.quantile(values, (0.25, 0.75)))
    return Choice(
        quantity,
        tuple(levels),
        median(_value(quantity, blocks[i], pruned=False) for i in places),
        float(np.median(values)),
        (low, high),
        {b.label: float(np.median(row)) for b, row in zip(budgets, table, strict=True)},
        fits,
    )


def _value(quantity: Quantity, block: BlockRatios, *, pruned: bool = True) -> float:
    if quantity == "qk_dim":  # per unpruned head: lost heads count like lost dims
        widths = block.after if pruned else block.before
        return widths.heads * widths.qk / block.before.heads if block.before.heads else 0.0
    return block.ratio("v" if quantity == "v_ratio" else "ffn", pruned=pruned)


def _breaks(blocks: Sequence[BlockRatios], places: Sequence[int]) -> list[int] | None:
    """Where stages begin among `places`; None for a network of one stage."""
    stages = [blocks[place].stage for place in places]
    if blocks[-1].stage == 0:
        return None
    return [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]


def _to_multiple(value: float, multiple: int) -> int:
    return max(multiple, int(value / multiple + 0.5) * multiple)


def _chance(fit: Fit) -> str:
    return "under 0.1 %" if fit.chance < 0.001 else f"{100 * fit.chance:.1f} %"
