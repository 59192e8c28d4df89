"""The three slimming actions and what undoes them, and which are open in a state.

Li et al., "EfficientFormer" (NeurIPS 2022), section 4.2: drop the least important MetaPath,
remove the first MB3D, narrow the least important stage. Their opposites are ours: they fill up
what the last step of slimming left of the target.

Where slots choose from other blocks than MB4D and MB3D, or MB3D need not come last, a block is
replaced by a cheaper one that the slot may choose, instead of the first MB3D by MB4D; so these are
four actions and four opposites, of which a space has three each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from slimnas.arch.space import ATTENTION, CONVOLUTION, IDENTITY, SearchSpace, Selection
from slimnas.arch.templates import TITLES
from slimnas.errors import SpecError
from slimnas.search.importance import ImportanceRecord

ActionKind = Literal[
    "drop_block",
    "remove_attention",
    "replace_block",
    "narrow_stage",
    "restore_block",
    "add_attention",
    "upgrade_block",
    "widen_stage",
]
Frontier = Literal["per_stage", "paper"]

Price = Callable[[Selection], float]
"""Latency of a selection, in milliseconds."""

MIN_SAVING_MS = 1e-9
"""Below this a table says an action saves no time; above rounding, below any real latency."""


_VERBS = {
    "remove_attention": "MB3D to MB4D in",
    "add_attention": "MB4D to MB3D in",
    "restore_block": "block back in",
}


@dataclass(frozen=True)
class Action:
    """One change of a selection.

    Attributes:
        kind: `drop_block` (a slot becomes identity), `remove_attention` (the first MB3D becomes
            `becomes`), `replace_block` (a block becomes a cheaper one), `narrow_stage` (a stage
            gets `width` channels); and what undoes them: `restore_block`, `add_attention` (the
            last MB4D becomes MB3D), `upgrade_block`, `widen_stage`.
        stage: stage index, from 0.
        slot: slot index in the stage; None where a width changes.
        becomes: what the slot chooses afterwards; None where a width changes.
        width: the stage's new width; None for the others.
        was: what the slot chose before, where the kind does not say.
    """

    kind: ActionKind
    stage: int
    slot: int | None = None
    becomes: str | None = None
    width: int | None = None
    was: str | None = None

    def apply(self, selection: Selection) -> Selection:
        """Return the changed selection."""
        if self.width is not None:
            return selection.with_width(self.stage, self.width)
        if self.slot is None or self.becomes is None:
            raise SpecError(f"action {self} must name a width, or a slot and what it becomes")
        return selection.with_path(self.stage, self.slot, self.becomes)

    @property
    def label(self) -> str:
        """A short name for tables and plots, stages counted from 1."""
        if self.width is not None:
            verb = "narrow" if self.kind == "narrow_stage" else "widen"
            return f"{verb} stage {self.stage + 1} to {self.width}"
        place = f"{self.stage + 1}.{(self.slot or 0) + 1}"
        if self.becomes == IDENTITY:
            return f"drop block {place}"
        if self.was is None:
            return f"{_VERBS[self.kind]} {place}"
        now = TITLES[self.becomes or IDENTITY]
        if self.was == IDENTITY:
            return f"{now} back in {place}"
        return f"{TITLES[self.was]} to {now} in {place}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the fields that do not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Action:
        """Inverse of `to_dict`."""
        return cls(**data)


def open_actions(
    space: SearchSpace,
    selection: Selection,
    importance: ImportanceRecord,
    price: Price,
    *,
    frontier: Frontier = "per_stage",
) -> list[Action]:
    """Actions that stay in the space and save time by the table.

    With `per_stage` importance picks the block inside each stage, and every stage may shrink;
    with `paper` importance picks the one block and the one stage as well, which leaves at most
    three actions. An action that saves no time is widened to the next width until it does.

    Where blocks are replaced by cheaper ones: for each stage and block it may choose, in the slot
    where the architecture parameters like the change best; with `paper`, only the best of all.

    Returns:
        Actions in a fixed order: drops, other blocks, widths.
    """
    stages = range(len(space.stages))
    drops = [_drop(space, selection, importance, stage) for stage in stages]
    narrows = [_narrow(space, selection, price, stage) for stage in stages]
    found = [action for action in drops if action is not None]
    thinner = [action for action in narrows if action is not None]
    if frontier == "paper":
        found = _least(found, lambda a: importance.path_importance(a.stage, a.slot or 0))
        thinner = _least(thinner, lambda a: importance.stage_importance(a.stage))
    before = price(selection)
    if space.counts_attention:
        attention = _remove_attention(space, selection)
        if attention is not None and all(
            attention.apply(selection) != action.apply(selection) for action in found
        ):
            found.append(attention)
    else:
        cheaper = _swaps(
            space,
            selection,
            importance,
            "replace_block",
            lambda a: before - price(a.apply(selection)),
        )
        if frontier == "paper":
            cheaper = _least(cheaper, lambda a: -_liking(importance, a))
        found += cheaper
    saving = [a for a in found if before - price(a.apply(selection)) > MIN_SAVING_MS]
    return saving + thinner


def growing_actions(
    space: SearchSpace,
    selection: Selection,
    start: Selection,
    importance: ImportanceRecord,
    price: Price,
) -> list[Action]:
    """Actions that stay in the space and undo slimming, at the cost of time by the table.

    In each stage the most important empty slot gets a block, the last MB4D becomes MB3D, each
    stage gets its next width. Nothing becomes MB3D that was none in `start`, where slimming began:
    how many there are at most is not for filling up to say.

    Where blocks were replaced: the empty slot may get any block it may choose, and a block becomes
    a costlier one, at most as costly as what the slot was in `start`.

    Returns:
        Actions in a fixed order: blocks, other blocks, widths.
    """
    stages = range(len(space.stages))
    widths = [_widen(space, selection, price, stage) for stage in stages]
    before = price(selection)
    found: list[Action | None]
    if space.counts_attention:
        blocks = [_restore(space, selection, importance, stage) for stage in stages]
        found = [*blocks, _add_attention(space, selection), *widths]
        found = [
            action
            for action in found
            if action is not None
            and not (action.becomes == ATTENTION and _choice(start, action) != ATTENTION)
        ]
    else:
        restored = [a for i in stages for a in _restore_any(space, selection, importance, i)]
        costlier = _swaps(
            space,
            selection,
            importance,
            "upgrade_block",
            lambda a: _extra_ms(space, selection, price, a),
            start,
        )
        found = [*restored, *costlier, *widths]
    return [
        action
        for action in found
        if action is not None and price(action.apply(selection)) - before > MIN_SAVING_MS
    ]


def _choice(selection: Selection, action: Action) -> str:
    """What the slot of an action chooses in `selection`."""
    return selection.paths[action.stage][action.slot or 0]


def _swaps(
    space: SearchSpace,
    selection: Selection,
    importance: ImportanceRecord,
    kind: ActionKind,
    gain_ms: Callable[[Action], float],
    start: Selection | None = None,
) -> list[Action]:
    """Blocks that become other blocks: for each stage and block to become, the best-liked slot of
    those where it gains time; at most what the slot was in `start`, where one is given.

    Slots of a stage that choose the same cost the same, so one of them is priced.
    """
    found = []
    for stage, part in enumerate(space.stages):
        for becomes in part.blocks:
            options = []
            for was in part.blocks:
                actions = [
                    Action(kind, stage, slot, becomes, was=was)
                    for slot, choice in enumerate(selection.paths[stage])
                    if choice == was != becomes
                ]
                legal = [a for a in actions if space.fault(a.apply(selection)) is None]
                if legal and gain_ms(legal[0]) > MIN_SAVING_MS:
                    options += legal if start is None else _within(start, legal, gain_ms)
            found += _least(options, lambda a: -_liking(importance, a))
    return found


def _within(
    start: Selection, alike: list[Action], gain_ms: Callable[[Action], float]
) -> list[Action]:
    """Of equal changes in several slots, those that cost at most what the slot was in `start`."""
    firsts = {_choice(start, action) for action in alike}
    gained = gain_ms(alike[0])
    allowed = {
        first
        for first in firsts
        if first == alike[0].becomes or gain_ms(replace(alike[0], becomes=first)) >= gained
    }
    return [action for action in alike if _choice(start, action) in allowed]


def _liking(importance: ImportanceRecord, action: Action) -> float:
    """By how much the alphas find what a slot becomes likelier than what it was."""
    assert action.slot is not None
    assert action.becomes is not None
    assert action.was is not None
    return importance.log_odds(action.stage, action.slot, action.becomes, action.was)


def narrowings(space: SearchSpace, selection: Selection, price: Price) -> list[Action]:
    """Every narrowing of one stage, not only to the next width, that stays in the space and saves
    time by the table.
    """
    before = price(selection)
    narrower = [
        Action("narrow_stage", stage, width=width)
        for stage, part in enumerate(space.stages)
        for width in part.width.values
        if width < selection.widths[stage]
    ]
    legal = [a for a in narrower if space.fault(a.apply(selection)) is None]
    return [a for a in legal if before - price(a.apply(selection)) > MIN_SAVING_MS]


def _restore(
    space: SearchSpace, selection: Selection, importance: ImportanceRecord, stage: int
) -> Action | None:
    empty = [slot for slot, choice in enumerate(selection.paths[stage]) if choice == IDENTITY]
    empty.sort(key=lambda slot: -importance.path_importance(stage, slot))
    for slot in empty:
        for block in sorted(space.stages[stage].blocks, key=lambda block: block == ATTENTION):
            action = Action("restore_block", stage, slot, block)
            if space.fault(action.apply(selection)) is None:
                return action
    return None


def _restore_any(
    space: SearchSpace, selection: Selection, importance: ImportanceRecord, stage: int
) -> list[Action]:
    """Every block that the most important empty slot may get."""
    empty = [slot for slot, choice in enumerate(selection.paths[stage]) if choice == IDENTITY]
    empty.sort(key=lambda slot: -importance.path_importance(stage, slot))
    for slot in empty:
        options = [
            Action("restore_block", stage, slot, block, was=IDENTITY)
            for block in space.stages[stage].blocks
        ]
        legal = [a for a in options if space.fault(a.apply(selection)) is None]
        if legal:
            return legal
    return []


def _extra_ms(space: SearchSpace, selection: Selection, price: Price, action: Action) -> float:
    """What an action costs; nothing where it leaves the space."""
    after = action.apply(selection)
    return price(after) - price(selection) if space.fault(after) is None else -math.inf


def _add_attention(space: SearchSpace, selection: Selection) -> Action | None:
    for stage, slot, choice in reversed(selection.active()):
        if choice != ATTENTION:
            action = Action("add_attention", stage, slot, ATTENTION)
            return action if space.fault(action.apply(selection)) is None else None
    return None


def _widen(space: SearchSpace, selection: Selection, price: Price, stage: int) -> Action | None:
    before = price(selection)
    wider = [w for w in space.stages[stage].width.values if w > selection.widths[stage]]
    for width in wider:
        action = Action("widen_stage", stage, width=width)
        after = action.apply(selection)
        if space.fault(after) is None and price(after) - before > MIN_SAVING_MS:
            return action
    return None


def _drop(
    space: SearchSpace, selection: Selection, importance: ImportanceRecord, stage: int
) -> Action | None:
    options = [
        Action("drop_block", stage, slot, IDENTITY)
        for slot, choice in enumerate(selection.paths[stage])
        if choice != IDENTITY and IDENTITY in space.stages[stage].choices
    ]
    legal = [action for action in options if space.fault(action.apply(selection)) is None]
    least = _least(legal, lambda a: importance.path_importance(a.stage, a.slot or 0))
    return least[0] if least else None


def _remove_attention(space: SearchSpace, selection: Selection) -> Action | None:
    for stage, slot, choice in selection.active():
        if choice == ATTENTION:
            becomes = CONVOLUTION if CONVOLUTION in space.stages[stage].choices else IDENTITY
            action = Action("remove_attention", stage, slot, becomes)
            return action if space.fault(action.apply(selection)) is None else None
    return None


def _narrow(space: SearchSpace, selection: Selection, price: Price, stage: int) -> Action | None:
    before = price(selection)
    narrower = [w for w in space.stages[stage].width.values if w < selection.widths[stage]]
    for width in reversed(narrower):
        action = Action("narrow_stage", stage, width=width)
        after = action.apply(selection)
        if space.fault(after) is None and before - price(after) > MIN_SAVING_MS:
            return action
    return None


def _least(actions: list[Action], key: Callable[[Action], float]) -> list[Action]:
    return [min(actions, key=key)] if actions else []
