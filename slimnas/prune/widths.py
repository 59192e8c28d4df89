"""`WidthPlan`: what stays of a network, as frozen plain data in a JSON file.

A plan is made for one architecture and names it by digest. It says which heads, dims, hidden units
and channels stay; `WidthPlan.architecture` turns it into the architecture that remains, and
`slimnas.prune.apply` a network into the network that remains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from slimnas._files import atomic_write_text
from slimnas.arch.architecture import AnyBlock, Architecture
from slimnas.arch.documents import Spec, check_schema, load_json, parse_spec
from slimnas.arch.efficientformer import MB3D, MB4D, ConvStem
from slimnas.arch.vit import TransformerBlock
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError, suggest

SCHEMA = "slimnas/width-plan/1"
WHAT = "a width plan"
SHORT = 12
"""Digits of a digest that messages show."""

Indexes = tuple[int, ...]


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block. Indexes are ascending and refer to the source block.

    No heads: the attention sub-layer goes; no ffn: the FFN goes; neither: the block goes.

    Attributes:
        heads: kept heads.
        qk: for each kept head its kept query and key dims; equally many in a block.
        v: for each kept head its kept value dims; equally many in a block.
        ffn: kept hidden units.
    """

    heads: Indexes
    qk: tuple[Indexes, ...]
    v: tuple[Indexes, ...]
    ffn: Indexes

    @property
    def vanishes(self) -> bool:
        """Whether nothing of the block stays."""
        return not self.heads and not self.ffn

    @property
    def qk_dim(self) -> int:
        """Query and key dims that stay per head; 0 without heads."""
        return len(self.qk[0]) if self.qk else 0

    @property
    def v_dim(self) -> int:
        """Value dims that stay per head; 0 without heads."""
        return len(self.v[0]) if self.v else 0

    @classmethod
    def full(cls, block: AnyBlock, width: int) -> BlockPlan:
        """Everything of a block of a stage of `width` channels."""
        heads, qk_dim, v_dim = attention_dims(block)
        return cls(
            heads=tuple(range(heads)),
            qk=(tuple(range(qk_dim)),) * heads,
            v=(tuple(range(v_dim)),) * heads,
            ffn=tuple(range(block.hidden(width))),
        )


@dataclass(frozen=True)
class WidthPlan:
    """What stays of a network.

    Attributes:
        source: digest of the architecture it is for.
        blocks: by component name (`stages.0.blocks.3`), every block of the source.
        embedding: kept channels of the residual stream per stage; empty: all, everywhere. Stages
            without downsampling share the stream before them, and its channels.
    """

    source: str
    blocks: Mapping[str, BlockPlan]
    embedding: tuple[Indexes, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", MappingProxyType(dict(self.blocks)))

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def full(cls, architecture: Architecture) -> WidthPlan:
        """The plan that keeps everything; `dataclasses.replace` makes others from it."""
        blocks = {
            part.name: BlockPlan.full(block, part.input.channels)
            for part, block in block_components(architecture)
        }
        return cls(architecture.digest, blocks)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the plan."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def kept_channels(self, stage: int, width: int) -> Indexes:
        """The channels that stay of a stage of `width` channels."""
        return self.embedding[stage] if self.embedding else tuple(range(width))

    def check(self, architecture: Architecture) -> None:
        """Refuse an architecture that the plan does not fit.

        Raises:
            PruneError: one line: made for another architecture, or which block and what of it.
        """
        _check_source(self, architecture)
        names = {part.name for part, _ in block_components(architecture)}
        for name in self.blocks:
            if name not in names:
                raise PruneError(
                    f"width plan: blocks.{name}: {architecture.name} has no such block"
                    f"{suggest(name, names)}"
                )
        for part, block in block_components(architecture):
            if part.name not in self.blocks:
                raise PruneError(
                    f"width plan: blocks.{part.name}: missing; a plan names every block of "
                    f"{architecture.name}, with empty lists for one that goes"
                )
            _check_block(part.name, self.blocks[part.name], block, part.input.channels)
        for i, stage in enumerate(architecture.stages):
            plans = [self.blocks[f"stages.{i}.blocks.{j}"] for j in range(len(stage.blocks))]
            if all(plan.vanishes for plan in plans):
                raise PruneError(
                    f"width plan: blocks.stages.{i}: one block of a stage must stay, the plan "
                    f"removes all {len(plans)}; keep a sub-layer in one of them"
                )
        if self.embedding:
            _check_embedding(self.embedding, architecture)

    def architecture(self, source: Architecture, *, name: str | None = None) -> Architecture:
        """The architecture that stays of `source`; blocks that vanish are left out.

        Args:
            source: the architecture the plan is for.
            name: the new one's; `{source}_pruned` if not given.

        Raises:
            PruneError: the plan does not fit `source`.
        """
        self.check(source)
        stages = []
        for i, stage in enumerate(source.stages):
            plans = [self.blocks[f"stages.{i}.blocks.{j}"] for j in range(len(stage.blocks))]
            blocks = [
                _pruned_block(block, plan)
                for block, plan in zip(stage.blocks, plans, strict=True)
                if not plan.vanishes
            ]
            width = len(self.kept_channels(i, stage.width))
            stages.append({**stage.model_dump(), "width": width, "blocks": blocks})
        stem = source.stem.model_dump()
        if source.stages[0].downsample is None:
            stem["width"] = stages[0]["width"]
        origin = {"name": source.name, "architecture": source.digest, "width_plan": self.digest}
        return Architecture.model_validate(
            {
                **source.model_dump(),
                "name": name or f"{source.name}_pruned",
                "stem": stem,
                "stages": stages,
                "provenance": {"pruned_from": origin},
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `schema` included."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "blocks": {
                name: {
                    "heads": list(plan.heads),
                    "qk": [list(dims) for dims in plan.qk],
                    "v": [list(dims) for dims in plan.v],
                    "ffn": list(plan.ffn),
                }
                for name, plan in self.blocks.items()
            },
            "embedding": [list(channels) for channels in self.embedding],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "<dict>") -> WidthPlan:
        """Read what `to_dict` gave; `source` names it in messages.

        Raises:
            SpecError: another schema, or a value of another kind, with its key.
        """
        given = parse_spec(
            _PlanDocument, check_schema(data, SCHEMA, WHAT, source=source), source=source
        )
        blocks = {
            name: BlockPlan(block.heads, block.qk, block.v, block.ffn)
            for name, block in given.blocks.items()
        }
        return cls(given.source, blocks, given.embedding)

    def save(self, path: str | Path) -> None:
        """Write JSON atomically, one line per block.

        Raises:
            RunFolderError: the place cannot be written.
        """
        data = self.to_dict()
        rows = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in data["blocks"].items()]
        lines = [
            f'{{"schema": {json.dumps(SCHEMA)},',
            f' "source": {json.dumps(self.source)},',
            ' "blocks": {\n' + ",\n".join(rows) + "},",
            f' "embedding": {json.dumps(data["embedding"])}}}',
        ]
        atomic_write_text(Path(path), "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> WidthPlan:
        """Read a plan file.

        Raises:
            SpecError: missing, not JSON, or not a width plan; one line per fault.
        """
        return cls.from_dict(load_json(path, WHAT), source=str(path))


def attention_dims(block: AnyBlock) -> tuple[int, int, int]:
    """Heads, and query-key and value dims per head; zeros for a block without such attention."""
    if not isinstance(block, (MB3D, TransformerBlock)):
        return (0, 0, 0)
    return (block.heads, block.qk_dim, block.v_dim)


def block_components(architecture: Architecture) -> Iterator[tuple[Component, AnyBlock]]:
    """The blocks among the components, in execution order, with their descriptions."""
    blocks = iter([block for stage in architecture.stages for block in stage.blocks])
    for part in walk(architecture):
        if part.kind == "block":
            yield part, next(blocks)


def embedding_groups(architecture: Architecture) -> tuple[int, ...]:
    """For each stage the first stage of its residual stream: downsampling starts a new one."""
    groups: list[int] = []
    for i, stage in enumerate(architecture.stages):
        groups.append(groups[-1] if i and stage.downsample is None else i)
    return tuple(groups)


def stream_stage(architecture: Architecture, component: Component, side: str) -> int | None:
    """First stage of the residual stream that a component reads (`in`) or writes (`out`).

    None for the stem's output where the first stage downsamples it; those channels all stay.
    """
    stage = component.stage
    if component.kind == "downsample" and side == "in":
        stage -= 1
    if component.kind == "stem" and architecture.stages[0].downsample is not None:
        stage -= 1
    return embedding_groups(architecture)[stage] if stage >= 0 else None


def removable_layers(block: AnyBlock) -> bool:
    """Whether a block may lose its attention or its FFN; EfficientFormer's have both always."""
    return not isinstance(block, (MB4D, MB3D))


Index = Annotated[int, Field(strict=True, ge=0)]


class _BlockDocument(Spec):
    heads: tuple[Index, ...]
    qk: tuple[tuple[Index, ...], ...]
    v: tuple[tuple[Index, ...], ...]
    ffn: tuple[Index, ...]


class _PlanDocument(Spec):
    source: str
    blocks: dict[str, _BlockDocument]
    embedding: tuple[tuple[Index, ...], ...] = ()


def _pruned_block(block: AnyBlock, plan: BlockPlan) -> dict[str, Any]:
    fields = {**block.model_dump(), "ffn_dim": len(plan.ffn)}
    if not isinstance(block, MB4D):
        fields |= {"heads": len(plan.heads), "qk_dim": plan.qk_dim, "v_dim": plan.v_dim}
    return fields


def _check_source(plan: WidthPlan, architecture: Architecture) -> None:
    if plan.source != architecture.digest:
        raise PruneError(
            f"width plan: it must be for the network it is applied to: it is for architecture "
            f"{plan.source[:SHORT]}, {architecture.name} is {architecture.digest[:SHORT]}; apply "
            f"it to the network it was made from, or make a plan for {architecture.name}"
        )


def _check_block(name: str, plan: BlockPlan, block: AnyBlock, width: int) -> None:
    where = f"width plan: blocks.{name}"
    heads, qk_dim, v_dim = attention_dims(block)
    _check_indexes(f"{where}.heads", plan.heads, heads)
    _check_indexes(f"{where}.ffn", plan.ffn, block.hidden(width))
    kinds: tuple[tuple[Literal["qk", "v"], int], ...] = (("qk", qk_dim), ("v", v_dim))
    for kind, size in kinds:
        given: Sequence[Indexes] = getattr(plan, kind)
        if len(given) != len(plan.heads):
            raise PruneError(
                f"{where}.{kind}: must hold one list for each of the {len(plan.heads)} heads that "
                f"stay, has {len(given)}"
            )
        for head, dims in zip(plan.heads, given, strict=True):
            _check_indexes(f"{where}.{kind} of head {head}", dims, size)
        lengths = sorted({len(dims) for dims in given})
        if len(lengths) > 1:
            raise PruneError(
                f"{where}.{kind}: all heads of a block must keep equally many dims, got "
                f"{lengths[0]} to {lengths[-1]}"
            )
        if lengths == [0]:
            raise PruneError(
                f"{where}.{kind}: a head that stays must keep a dim, got none; take the heads out "
                "of the plan instead"
            )
    if not removable_layers(block) and (bool(heads) > bool(plan.heads) or not plan.ffn):
        gone = "FFN" if plan.heads or not heads else "attention"
        raise PruneError(
            f"{where}: a block of type {block.type} must keep its {gone}, the plan removes it "
            "whole; keep one unit, or leave whole blocks out by a search"
        )


def _check_embedding(embedding: Sequence[Indexes], architecture: Architecture) -> None:
    where = "width plan: embedding"
    if len(embedding) != len(architecture.stages):
        raise PruneError(
            f"{where}: must hold one list for each of the {len(architecture.stages)} stages, or "
            f"none at all; has {len(embedding)}"
        )
    for i, (channels, first) in enumerate(
        zip(embedding, embedding_groups(architecture), strict=True)
    ):
        _check_indexes(f"{where}[{i}]", channels, architecture.stages[i].width)
        if not channels:
            raise PruneError(f"{where}[{i}]: one channel must stay, got none")
        if channels != embedding[first]:
            raise PruneError(
                f"{where}[{i}]: must be the channels of stage {first}, whose residual stream it "
                "shares"
            )
    follows = architecture.stages[0].downsample is None
    if isinstance(architecture.stem, ConvStem) and follows and len(embedding[0]) % 2:
        raise PruneError(
            f"{where}[0]: must be an even number of channels, the conv_stem's first convolution "
            f"has half of them; got {len(embedding[0])}"
        )


def _check_indexes(where: str, indexes: Indexes, size: int) -> None:
    for before, after in pairwise(indexes):
        if before >= after:
            raise PruneError(f"{where}: must be ascending, each once; got {after} after {before}")
    for index in (indexes[:1], indexes[-1:]):
        if index and not 0 <= index[0] < size:
            limit = f"below {size}" if size else "empty, there is none"
            raise PruneError(f"{where}: must be {limit}; got {index[0]}")
