"""Two width plans, one after the other, as one."""

from __future__ import annotations

from slimnas.arch.architecture import Architecture
from slimnas.prune.widths import BlockPlan, WidthPlan, block_components


def compose(first: WidthPlan, second: WidthPlan, source: Architecture) -> WidthPlan:
    """The plan that keeps of `source` what `second` keeps of what `first` keeps of it.

    Args:
        first: for `source`.
        second: for what `first` makes of `source`.
        source: the architecture before both.

    Raises:
        PruneError: a plan does not fit.
    """
    middle = first.architecture(source)
    second.check(middle)
    blocks: dict[str, BlockPlan] = {}
    later = iter([second.blocks[part.name] for part, _ in block_components(middle)])
    for part, _ in block_components(source):
        plan = first.blocks[part.name]
        blocks[part.name] = plan if plan.vanishes else _composed(plan, next(later))
    embedding: tuple[tuple[int, ...], ...] = ()
    if first.embedding or second.embedding:
        embedding = tuple(
            tuple(
                first.kept_channels(i, stage.width)[channel]
                for channel in second.kept_channels(i, middle.stages[i].width)
            )
            for i, stage in enumerate(source.stages)
        )
    return WidthPlan(first.source, blocks, embedding)


def _composed(first: BlockPlan, second: BlockPlan) -> BlockPlan:
    heads = list(enumerate(second.heads))
    return BlockPlan(
        heads=tuple(first.heads[head] for _, head in heads),
        qk=tuple(tuple(first.qk[head][dim] for dim in second.qk[at]) for at, head in heads),
        v=tuple(tuple(first.v[head][dim] for dim in second.v[at]) for at, head in heads),
        ffn=tuple(first.ffn[unit] for unit in second.ffn),
    )
