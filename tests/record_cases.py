"""A search record of the micro space, whose accuracies are known: those of `micro.Additive`."""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import Any

from micro import Additive, micro_space

from slimnas.arch.space import SearchSpace, Selection
from slimnas.search.record import RecordedData, SearchRecord
from slimnas.search.record_making import Plan, Subject, make_record

DATA = RecordedData(
    source="made-up",
    description="made-up: 10 classes",
    digest="d" * 64,
    classes=10,
    images={"train": 100, "search": 50, "test": 50},
)
DETAILS: dict[str, Any] = {
    "resolution": 16,
    "search_images": 50,
    "supernet_digest": "5" * 64,
    "recipe": {"epochs": 3},
}


class Making:
    """A listener that keeps what it is told, and can stop a making as Ctrl-C does."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.numbers: list[tuple[int, int]] = []
        self.fits = 0
        self._stop_at = stop_at

    def measured(self, number: int, total: int, top1: float) -> None:
        self.numbers.append((number, total))
        if number == self._stop_at:
            raise KeyboardInterrupt

    def fitting(self) -> None:
        self.fits += 1


def bent_top1(model: Additive, selection: Selection) -> float:
    """Accuracies that nearly add up: saturating, with a little that nothing explains."""
    noise = zlib.crc32(repr(selection).encode()) % 1000 / 1000 - 0.5
    return 90 * (1 - math.exp(-model.top1(selection) / 30)) + 0.4 * noise


def subject(seed: int = 0, space: SearchSpace | None = None) -> Subject:
    model = Additive.draw(seed, space)
    return Subject(
        space=model.space,
        importance=model.importance(),
        evaluate=lambda selection: bent_top1(model, selection),
        data=DATA,
        details=DETAILS,
        made={"judged_on": "nothing"},
    )


@cache
def micro_record(seed: int = 0) -> SearchRecord:
    return make_record(subject(seed), Plan(selections=60, walks=3, seed=seed), Making())


def record_of(space: SearchSpace) -> SearchRecord:
    """Of a space like the micro one, with its own classes and resolution."""
    return make_record(subject(0, space), Plan(selections=30, walks=1, seed=0), Making())


__all__ = ["DATA", "DETAILS", "Making", "bent_top1", "micro_record", "micro_space", "subject"]
