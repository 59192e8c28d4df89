"""The record of a slimming run: one JSON line for the start, one per step.

Every step holds every candidate with its latency, accuracy and ratio, and the action taken;
applying the actions to the start gives the found selection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slimnas._files import atomic_write_text, read_text
from slimnas.arch.space import Selection
from slimnas.errors import RunFolderError
from slimnas.search.actions import Action

SCHEMA = "slimnas/trajectory/1"

Phase = Literal["slim", "fill", "exchange"]
"""Why a step was taken: to get down to the target, to use what is left of it, or to trade one
thing for another where nothing fits into what is left."""


@dataclass(frozen=True)
class Candidate:
    """One action that was weighed in a step.

    Attributes:
        action: the change.
        latency_ms: latency after it, by the table as it was known then.
        saved_ms: latency before minus after; negative where the action grows the network.
        top1: accuracy after it on the SEARCH split, in percent.
        drop: accuracy before minus after in points; not below 0, unless the action grows.
        drop_per_ms: drop / saved_ms. Greedy slimming takes the smallest; of an action that grows
            it is the accuracy gained per millisecond spent, and filling up takes the largest.
    """

    action: Action
    latency_ms: float
    saved_ms: float
    top1: float
    drop: float
    drop_per_ms: float


@dataclass(frozen=True)
class Step:
    """One step: every candidate, the action taken, and the state after it.

    Attributes:
        candidates: what was weighed.
        taken: the action taken.
        selection: the state after it.
        latency_ms: its latency, by the table as it was known then.
        top1: its accuracy on the SEARCH split, in percent.
        phase: what the step was for.
        corrections: how many measured networks had corrected the table by then.
    """

    candidates: tuple[Candidate, ...]
    taken: Action
    selection: Selection
    latency_ms: float
    top1: float
    phase: Phase = "slim"
    corrections: int = 0


@dataclass(frozen=True)
class Trajectory:
    """The largest network and the steps down from it.

    Attributes:
        start: the largest selection.
        latency_ms: its latency by the table.
        top1: its accuracy on the SEARCH split, in percent.
        steps: the steps taken so far.
        provenance: seed, digests of space, table and supernet, images per evaluation.
    """

    start: Selection
    latency_ms: float
    top1: float
    steps: tuple[Step, ...]
    provenance: Mapping[str, Any]

    def with_step(self, step: Step) -> Trajectory:
        """The trajectory one step longer."""
        return replace(self, steps=(*self.steps, step))

    @property
    def states(self) -> tuple[tuple[Selection, float, float], ...]:
        """(selection, latency_ms, top1) at the start and after every step."""
        after = tuple((step.selection, step.latency_ms, step.top1) for step in self.steps)
        return ((self.start, self.latency_ms, self.top1), *after)

    def replay(self) -> Selection:
        """Apply the actions to the start."""
        selection = self.start
        for step in self.steps:
            selection = step.taken.apply(selection)
        return selection

    def save(self, path: Path) -> None:
        """Write JSON lines atomically."""
        header = {
            "schema": SCHEMA,
            "selection": _selection_to_dict(self.start),
            "latency_ms": self.latency_ms,
            "top1": self.top1,
            "provenance": dict(self.provenance),
        }
        lines = [header, *(_step_to_dict(i, s) for i, s in enumerate(self.steps, start=1))]
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def load(cls, path: Path) -> Trajectory:
        """Read what `save` wrote.

        Raises:
            RunFolderError: the file is missing, damaged or of another schema.
        """
        text = read_text(path, RunFolderError, "a trajectory")
        try:
            header, *rest = [json.loads(line) for line in text.splitlines()]
            if header["schema"] != SCHEMA:
                raise RunFolderError(
                    f"{path}: schema: must be {SCHEMA!r}, got {header['schema']!r}"
                )
            return cls(
                _selection_from_dict(header["selection"]),
                header["latency_ms"],
                header["top1"],
                tuple(_step_from_dict(data) for data in rest),
                header["provenance"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{path}: not a trajectory ({error}); "
                "delete the file to slim again from the trained supernet"
            ) from error


def _selection_to_dict(selection: Selection) -> dict[str, Any]:
    return {"widths": list(selection.widths), "paths": [list(slots) for slots in selection.paths]}


def _selection_from_dict(data: Mapping[str, Any]) -> Selection:
    return Selection(tuple(data["widths"]), tuple(tuple(slots) for slots in data["paths"]))


def _step_to_dict(number: int, step: Step) -> dict[str, Any]:
    return {
        "step": number,
        "action": step.taken.to_dict(),
        "selection": _selection_to_dict(step.selection),
        "latency_ms": step.latency_ms,
        "top1": step.top1,
        "phase": step.phase,
        "corrections": step.corrections,
        "candidates": [
            {**asdict(candidate), "action": candidate.action.to_dict()}
            for candidate in step.candidates
        ],
    }


def _step_from_dict(data: Mapping[str, Any]) -> Step:
    candidates = tuple(
        Candidate(**{**row, "action": Action.from_dict(row["action"])})
        for row in data["candidates"]
    )
    return Step(
        candidates,
        Action.from_dict(data["action"]),
        _selection_from_dict(data["selection"]),
        data["latency_ms"],
        data["top1"],
        data.get("phase", "slim"),
        data.get("corrections", 0),
    )
