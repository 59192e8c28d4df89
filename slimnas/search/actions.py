"""The three slimming actions and what undoes them, and which are open in a state.

Li et al., "EfficientFormer" (NeurIPS 2022), section 4.2: drop the least important MetaPath,
remove the first MB3D, narrow the least important stage. Their opposites are ours: they fill up
what the last step of slimming left of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from slimnas.arch.space import ATTENTION, CONVOLUTION, IDENTITY, SearchSpace, Selection
from slimnas.errors import SpecError
from slimnas.search.importance import ImportanceRecord

ActionKind = Literal[
    "drop_block",
    "remove_attention",
    "narrow_stage",
    "restore_block",
    "add_attention",
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
            `becomes`), `narrow_stage` (a stage gets `width` channels); and what undoes them:
            `restore_block`, `add_attention` (the last MB4D becomes MB3D), `widen_stage`.
        stage: stage index, from 0.
        slot: slot index in the stage; None where a width changes.
        becomes: what the slot chooses afterwards; None where a width changes.
        width: the stage's new width; None for the others.
    """

    kind: ActionKind
    stage: int
    slot: int | None = None
    becomes: str | None = None
    width: int | None = None

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
        verb = "drop block" if self.becomes == IDENTITY else _VERBS[self.kind]
        return f"{verb} {self.stage + 1}.{(self.slot or 0) + 1}"

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

    Returns:
        Actions in a fixed order: drops, attention, widths.
    """
    stages = range(len(space.stages))
    drops = [_drop(space, selection, importance, stage) for stage in stages]
    narrows = [_narrow(space, selection, price, stage) for stage in stages]
    found = [action for action in drops if action is not None]
    thinner = [action for action in narrows if action is not None]
    if frontier == "paper":
        found = _least(found, lambda a: importance.path_importance(a.stage, a.slot or 0))
        thinner = _least(thinner, lambda a: importance.stage_importance(a.stage))
    attention = _remove_attention(space, selection)
    if attention is not None and all(
        attention.apply(selection) != action.apply(selection) for action in found
    ):
        found.append(attention)
    before = price(selection)
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

    Returns:
        Actions in a fixed order: blocks, attention, widths.
    """
    stages = range(len(space.stages))
    blocks = [_restore(space, selection, importance, stage) for stage in stages]
    widths = [_widen(space, selection, price, stage) for stage in stages]
    found = [*blocks, _add_attention(space, selection), *widths]
    before = price(selection)
    return [
        action
        for action in found
        if action is not None
        and not (action.becomes == ATTENTION and _choice(start, action) != ATTENTION)
        and price(action.apply(selection)) - before > MIN_SAVING_MS
    ]


def _choice(selection: Selection, action: Action) -> str:
    """What the slot of an action chooses in `selection`."""
    return selection.paths[action.stage][action.slot or 0]


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
