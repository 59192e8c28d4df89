"""Channel ratios: how much of each block a plan leaves, by the measure of EfficientViT's Fig. 5.

A ratio is the number of output channels of a projection over the width of the embedding that it
reads. Unpruned DeiT and Swin blocks have 1 for queries, keys and values each, and 4 for the FFN.
Source: Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
Attention" (CVPR 2023), section 2.3.

Queries and keys are one unit here, since a head's product needs equally many of both: their ratios
are always the same. Ratios after pruning are over the unpruned embedding too.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from slimnas._files import atomic_write_text
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.documents import Spec, check_schema, load_json, parse_spec
from slimnas.errors import PruneError
from slimnas.prune.costs import WIDTHS, BlockWidths
from slimnas.prune.widths import WidthPlan, block_components

SCHEMA = "slimnas/channel-ratios/1"
WHAT = "channel ratios (slimnas prune --report channel_ratios)"

RatioKind = Literal["q", "k", "v", "ffn"]
KINDS: tuple[RatioKind, ...] = get_args(RatioKind)
TITLES: Mapping[RatioKind, str] = {"q": "Q", "k": "K", "v": "V", "ffn": "FFN"}


@dataclass(frozen=True)
class BlockRatios:
    """One block before and after.

    Attributes:
        name: in the unpruned network, such as `stages.0.blocks.3`.
        stage: index of its stage.
        type: block type, such as `vit`.
        embedding: width of the unpruned embedding.
        before: unpruned widths; zeros where the block has no attention.
        after: widths that stay; zeros where a sub-layer or the block is gone.
    """

    name: str
    stage: int
    type: str
    embedding: int
    before: BlockWidths
    after: BlockWidths

    def ratio(self, kind: RatioKind, *, pruned: bool = True) -> float:
        """Output channels over the embedding width, after pruning or before."""
        return _channels(self.after if pruned else self.before, kind) / self.embedding

    def kept(self, kind: RatioKind) -> float | None:
        """Share of the channels that stays; None where the unpruned block has none."""
        whole = _channels(self.before, kind)
        return _channels(self.after, kind) / whole if whole else None

    @property
    def vanishes(self) -> bool:
        """Whether nothing of the block stays."""
        return self.after.units == 0


@dataclass(frozen=True)
class ChannelRatios:
    """What one plan leaves of every block.

    Attributes:
        label: name of the budget, unique in a set: `macs-0.9G`.
        plan: digest of the width plan.
        embedding: width of each stage that stays.
        macs: of the pruned network.
        params: of the pruned network.
        blocks: every block of the unpruned network in execution order.
    """

    label: str
    plan: str
    embedding: tuple[int, ...]
    macs: int
    params: int
    blocks: tuple[BlockRatios, ...]

    def mean_kept(self, kind: RatioKind) -> float | None:
        """Mean over blocks of the share that stays; None where no block has the part."""
        shares = [share for block in self.blocks if (share := block.kept(kind)) is not None]
        return sum(shares) / len(shares) if shares else None


@dataclass(frozen=True)
class RatioSet:
    """Ratios of one model at one or several budgets.

    Attributes:
        source: the unpruned architecture.
        budgets: one entry per budget, in the order asked for.
        provenance: plain data: model, weights, data, criterion, basis, seed, versions.
    """

    source: Architecture
    budgets: tuple[ChannelRatios, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a set without budgets, or with two of one name.

        Raises:
            PruneError: see above.
        """
        labels = [budget.label for budget in self.budgets]
        if not labels or len(set(labels)) < len(labels):
            raise PruneError(
                f"channel ratios: must have one or several budgets of different names, got {labels}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `schema` included."""
        whole = cost(self.source)
        return {
            "schema": SCHEMA,
            "source": self.source.to_dict(),
            "macs": whole.macs,
            "params": whole.params,
            "provenance": dict(self.provenance),
            "budgets": [_budget_dict(budget) for budget in self.budgets],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "<dict>") -> RatioSet:
        """Read what `to_dict` gave; `source` names it in messages.

        Raises:
            SpecError: another schema, or a value of another kind, with its key.
            PruneError: blocks that are not those of the unpruned architecture.
        """
        document = parse_spec(
            _SetDocument, check_schema(data, SCHEMA, WHAT, source=source), source=source
        )
        architecture = Architecture.from_dict(document.source, source=f"{source}: source")
        budgets = tuple(given.budget() for given in document.budgets)
        unpruned = _unpruned(architecture)
        for budget in budgets:
            found = [(b.name, b.stage, b.type, b.embedding, b.before) for b in budget.blocks]
            if found != unpruned or len(budget.embedding) != len(architecture.stages):
                raise PruneError(
                    f"{source}: budgets: {budget.label}: its blocks must be those of "
                    f"{architecture.name}, they are not; the file is damaged, write the report "
                    "again"
                )
        return cls(architecture, budgets, document.provenance)

    def save_json(self, path: str | Path) -> None:
        """Write JSON atomically, one line per block.

        Raises:
            RunFolderError: the place cannot be written.
        """
        atomic_write_text(Path(path), _json_text(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> RatioSet:
        """Read a file that `save_json` wrote.

        Raises:
            SpecError: missing, not JSON, or not channel ratios.
            PruneError: blocks that are not those of the unpruned architecture.
        """
        return cls.from_dict(load_json(path, WHAT), source=str(path))

    def save_csv(self, path: str | Path) -> None:
        """Write CSV atomically, one row per budget and block.

        Raises:
            RunFolderError: the place cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for budget in self.budgets:
            writer.writerows(_csv_row(budget.label, block) for block in budget.blocks)
        atomic_write_text(Path(path), text.getvalue())


CSV_COLUMNS = (
    "budget",
    "block",
    "stage",
    "type",
    "embedding",
    *(f"{width}_{when}" for when in ("before", "after") for width in WIDTHS),
    *(f"{kind}_{when}" for when in ("before", "after") for kind in KINDS),
)
"""Widths are counts (`qk_dim`, `v_dim` per head), the last eight columns ratios."""


def channel_ratios(
    source: Architecture, pruned: Architecture, plan: WidthPlan, *, label: str = "pruned"
) -> ChannelRatios:
    """Ratios of every block of `source`, before and after `plan`.

    Removed blocks and sub-layers have 0.

    Args:
        source: the unpruned architecture.
        pruned: what `plan` leaves of it.
        plan: what stays.
        label: name of the budget.

    Raises:
        PruneError: the plan is for another architecture, or does not leave `pruned`.
    """
    left = plan.architecture(source)
    if left != pruned:
        raise PruneError(
            f"channel ratios: the plan must leave {pruned.name} of {source.name}, it leaves "
            f"another architecture ({left.digest[:12]}, not {pruned.digest[:12]})"
        )
    blocks = []
    for name, stage, kind, width, before in _unpruned(source):
        kept = plan.blocks[name]
        after = BlockWidths(len(kept.heads), kept.qk_dim, kept.v_dim, len(kept.ffn))
        blocks.append(BlockRatios(name, stage, kind, width, before, after))
    counted = cost(pruned)
    return ChannelRatios(
        label, plan.digest, pruned.widths, counted.macs, counted.params, tuple(blocks)
    )


def table_rows(ratios: ChannelRatios) -> list[tuple[str, ...]]:
    """Text of a table, the titles first: block, then before and after of Q, K, V and FFN."""
    rows: list[tuple[str, ...]] = [("block", *(TITLES[kind] for kind in KINDS), "heads", "dims")]
    for block in ratios.blocks:
        cells = [_change(block, kind) for kind in KINDS]
        after = block.after
        dims = f"{after.qk}/{after.v}/{after.ffn}" if not block.vanishes else "removed"
        heads = f"{block.before.heads} > {after.heads}" if block.before.heads else ""
        rows.append((block.name, *cells, heads, dims))
    return rows


def _change(block: BlockRatios, kind: RatioKind) -> str:
    if block.kept(kind) is None:
        return ""
    return f"{block.ratio(kind, pruned=False):.2f} > {block.ratio(kind):.2f}"


def _channels(widths: BlockWidths, kind: RatioKind) -> int:
    if kind == "ffn":
        return widths.ffn
    return widths.heads * (widths.v if kind == "v" else widths.qk)


def _unpruned(source: Architecture) -> list[tuple[str, int, str, int, BlockWidths]]:
    return [
        (
            part.name,
            part.stage,
            block.type,
            part.input.channels,
            BlockWidths.of(block, part.input.channels),
        )
        for part, block in block_components(source)
    ]


def _budget_dict(budget: ChannelRatios) -> dict[str, Any]:
    return {
        "label": budget.label,
        "plan": budget.plan,
        "embedding": list(budget.embedding),
        "macs": budget.macs,
        "params": budget.params,
        "blocks": [
            {
                "name": block.name,
                "stage": block.stage,
                "type": block.type,
                "embedding": block.embedding,
                "before": block.before.to_dict(),
                "after": block.after.to_dict(),
                "ratios_before": {kind: block.ratio(kind, pruned=False) for kind in KINDS},
                "ratios_after": {kind: block.ratio(kind) for kind in KINDS},
            }
            for block in budget.blocks
        ],
    }


def _json_text(data: Mapping[str, Any]) -> str:
    lines = ["{"]
    lines += [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in data.items() if k != "budgets"]
    lines.append(' "budgets": [')
    for i, budget in enumerate(data["budgets"]):
        head = {key: value for key, value in budget.items() if key != "blocks"}
        lines.append(f'  {json.dumps(head)[:-1]}, "blocks": [')
        lines.append(",\n".join(f"   {json.dumps(block)}" for block in budget["blocks"]))
        lines.append("  ]}" + ("," if i + 1 < len(data["budgets"]) else ""))
    return "\n".join([*lines, " ]", "}"]) + "\n"


def _csv_row(label: str, block: BlockRatios) -> list[object]:
    before, after = block.before.to_dict(), block.after.to_dict()
    return [
        *(label, block.name, block.stage, block.type, block.embedding),
        *before.values(),
        *after.values(),
        *(f"{block.ratio(kind, pruned=False):.6g}" for kind in KINDS),
        *(f"{block.ratio(kind):.6g}" for kind in KINDS),
    ]


Count = Annotated[int, Field(strict=True, ge=0)]


class _WidthsDocument(Spec):
    heads: Count
    qk_dim: Count
    v_dim: Count
    ffn_dim: Count

    def widths(self) -> BlockWidths:
        return BlockWidths(self.heads, self.qk_dim, self.v_dim, self.ffn_dim)


class _BlockDocument(Spec):
    name: str
    stage: Count
    type: str
    embedding: Annotated[int, Field(strict=True, ge=1)]
    before: _WidthsDocument
    after: _WidthsDocument
    ratios_before: dict[RatioKind, float]
    ratios_after: dict[RatioKind, float]

    def block(self) -> BlockRatios:
        return BlockRatios(
            self.name,
            self.stage,
            self.type,
            self.embedding,
            self.before.widths(),
            self.after.widths(),
        )


class _BudgetDocument(Spec):
    label: str
    plan: str
    embedding: tuple[Count, ...]
    macs: Count
    params: Count
    blocks: tuple[_BlockDocument, ...]

    def budget(self) -> ChannelRatios:
        blocks = tuple(block.block() for block in self.blocks)
        return ChannelRatios(self.label, self.plan, self.embedding, self.macs, self.params, blocks)


class _SetDocument(Spec):
    source: dict[str, Any]
    macs: Count
    params: Count
    provenance: dict[str, Any]
    budgets: tuple[_BudgetDocument, ...]
