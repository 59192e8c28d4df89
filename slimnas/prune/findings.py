"""Published findings about where vision transformers are redundant, held against given ratios.

Findings: Liu et al., "EfficientViT" (CVPR 2023), section 2.3 and Fig. 5, from Taylor pruning of
Swin-T and DeiT-T: queries, keys and FFN are cut hard, values are kept except in the last blocks,
the last blocks are the most redundant. The paper gives no numbers to call that by: the thresholds
are this module's, and each is stated with its finding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slimnas.arch.cost import cost
from slimnas.prune.ranks import rank_correlation
from slimnas.prune.ratios import BlockRatios, ChannelRatios, RatioKind, RatioSet

LAST = 0.25
"""Share of the blocks that are the last ones."""

IN_PROPORTION = 1.0
"""A kind is cut hard if it loses at least this times the share of MACs that the network loses."""

SPARED = 0.5
"""A kind is kept if it loses at most this times that share."""

MORE_REDUNDANT = 1.5
"""Blocks are the more redundant ones if they lose at least this times what the others lose."""

PUBLISHED = Path(__file__).with_name("published_pruning.yaml")


@dataclass(frozen=True)
class Finding:
    """One published finding, and whether the ratios at hand show it.

    Attributes:
        name: short name.
        statement: the finding in words.
        measure: what `values` are.
        values: one per budget; None where it cannot be told, such as without attention.
        threshold: where the line is.
        at_least: whether values must be at or above it; else at or below.
    """

    name: str
    statement: str
    measure: str
    values: tuple[float | None, ...]
    threshold: float
    at_least: bool

    @property
    def reproduced(self) -> tuple[bool | None, ...]:
        """Per budget."""
        return tuple(None if value is None else self._holds(value) for value in self.values)

    @property
    def threshold_text(self) -> str:
        """`at least 1.5`."""
        return f"{'at least' if self.at_least else 'at most'} {self.threshold:g}"

    @property
    def verdict(self) -> str:
        """In words: `yes`, `no`, `at 2 of 3 budgets` or `cannot be told`."""
        told = [found for found in self.reproduced if found is not None]
        if not told:
            return "cannot be told"
        if all(told) or not any(told):
            return "yes" if told[0] else "no"
        return f"at {sum(told)} of {len(told)} budgets"

    def _holds(self, value: float) -> bool:
        return value >= self.threshold if self.at_least else value <= self.threshold


@dataclass(frozen=True)
class PublishedComparison:
    """FFN removal per block beside a published record.

    Attributes:
        record: name of the record.
        gmacs: its cost before and after.
        removed: published hidden units removed per block.
        label: the budget compared.
        own_removed: hidden units removed per block at that budget.
        rank_correlation: Spearman's, over blocks; None where nothing was removed.
    """

    record: str
    gmacs: tuple[float, float]
    removed: tuple[int, ...]
    label: str
    own_removed: tuple[int, ...]
    rank_correlation: float | None


def published_findings(ratios: RatioSet) -> tuple[Finding, ...]:
    """EfficientViT's findings on `ratios`, each with a number per budget and its threshold."""
    whole = cost(ratios.source).macs

    def each(measure: Callable[[ChannelRatios], float | None]) -> tuple[float | None, ...]:
        return tuple(measure(budget) for budget in ratios.budgets)

    def beside_macs(kind: RatioKind, last: bool | None = None) -> tuple[float | None, ...]:
        def measure(budget: ChannelRatios) -> float | None:
            blocks = budget.blocks if last is None else _part(budget.blocks, last=last)
            return _over(_cut(blocks, kind), 1 - budget.macs / whole)

        return each(measure)

    return (
        Finding(
            "qk_cut",
            "Queries and keys are cut hard",
            "share of Q and K dims cut / share of MACs cut",
            beside_macs("q"),
            IN_PROPORTION,
            True,
        ),
        Finding(
            "ffn_cut",
            "The FFN is cut hard",
            "share of hidden units cut / share of MACs cut",
            beside_macs("ffn"),
            IN_PROPORTION,
            True,
        ),
        Finding(
            "v_kept",
            "Values are kept",
            "share of V dims cut / share of MACs cut",
            beside_macs("v"),
            SPARED,
            False,
        ),
        Finding(
            "v_kept_early",
            "Values are kept outside the last blocks",
            f"the same without the last {LAST:.0%} of the blocks",
            beside_macs("v", last=False),
            SPARED,
            False,
        ),
        *_findings_over_depth(ratios),
    )


def _findings_over_depth(ratios: RatioSet) -> list[Finding]:
    """Which blocks are the redundant ones."""

    def finding(
        name: str,
        statement: str,
        measure: str,
        contrast: Callable[[Sequence[BlockRatios]], float | None],
    ) -> Finding:
        values = tuple(contrast(budget.blocks) for budget in ratios.budgets)
        return Finding(name, statement, measure, values, MORE_REDUNDANT, True)

    found = [
        finding(
            "last_blocks",
            "The last blocks are the most redundant",
            f"mean cut of the last {LAST:.0%} of the blocks / of the others",
            lambda blocks: _contrast(_part(blocks, last=True), _part(blocks, last=False)),
        ),
        finding(
            "last_blocks_ffn",
            "The FFNs of the last blocks are the most redundant",
            "the same, of hidden units alone",
            lambda blocks: _contrast(_part(blocks, last=True), _part(blocks, last=False), ("ffn",)),
        ),
    ]
    end = len(ratios.source.stages) - 1
    if end >= 2:
        found.append(
            finding(
                "last_stage",
                "The last stage keeps far less than the first two",
                "mean cut of the last stage / of the first two",
                lambda blocks: _contrast(
                    [block for block in blocks if block.stage == end],
                    [block for block in blocks if block.stage < 2],
                ),
            )
        )
    return found


def compare_with_savit(ratios: RatioSet) -> tuple[PublishedComparison, ...]:
    """FFN removal per block beside SAViT's published log of the same model, budget by budget.

    Returns:
        One comparison per budget; none for a model without a record.
    """
    blocks = ratios.budgets[0].blocks
    record = next((r for r in _records() if _is_of(r, blocks)), None)
    if record is None:
        return ()
    published = tuple(record["ffn_removed"])
    found = []
    for budget in ratios.budgets:
        own = tuple(block.before.ffn - block.after.ffn for block in budget.blocks)
        found.append(
            PublishedComparison(
                record["name"],
                (float(record["gmacs"][0]), float(record["gmacs"][1])),
                published,
                budget.label,
                own,
                rank_correlation(published, own),
            )
        )
    return tuple(found)


def _records() -> list[dict[str, Any]]:
    data = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    records: list[dict[str, Any]] = data["records"]
    return records


def _is_of(record: dict[str, Any], blocks: Sequence[BlockRatios]) -> bool:
    """Whether a record is of a ViT of these widths."""
    wanted = (record["width"], record["heads"], record["ffn"])
    return len(blocks) == len(record["ffn_removed"]) and all(
        (block.embedding, block.before.heads, block.before.ffn) == wanted and block.type == "vit"
        for block in blocks
    )


def _part(blocks: Sequence[BlockRatios], *, last: bool) -> Sequence[BlockRatios]:
    first = len(blocks) - max(1, round(LAST * len(blocks)))
    return blocks[first:] if last else blocks[:first]


def _cut(blocks: Sequence[BlockRatios], kind: RatioKind) -> float | None:
    shares = [share for block in blocks if (share := block.kept(kind)) is not None]
    return 1 - sum(shares) / len(shares) if shares else None


def _contrast(
    some: Sequence[BlockRatios],
    others: Sequence[BlockRatios],
    kinds: Sequence[RatioKind] = ("q", "v", "ffn"),  # K is Q
) -> float | None:
    mine = [cut for kind in kinds if (cut := _cut(some, kind)) is not None]
    rest = [cut for kind in kinds if (cut := _cut(others, kind)) is not None]
    if not mine or not rest:
        return None
    return _over(sum(mine) / len(mine), sum(rest) / len(rest))


def _over(value: float | None, base: float) -> float | None:
    return None if value is None or base <= 1e-9 else value / base
