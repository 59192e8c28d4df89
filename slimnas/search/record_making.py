"""Makes a search record: which selections are measured, and what becomes of the figures.

Three kinds of selections. Single changes of the largest network say what each block and width is
worth. Random ones spread over the space, most of them slimmed at random from the largest network,
since that is where slimming goes. Then searches for made-up devices are gone through with what is
known so far, and networks on their way are measured: there the record must be right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slimnas._files import atomic_write_bytes
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas.arch.space import SearchSpace, Selection
from slimnas.errors import RunFolderError, UnreachableTargetError
from slimnas.search.actions import Action, open_actions
from slimnas.search.drops import AccuracyModel, Scales, features, fit_scales, held_out_errors
from slimnas.search.importance import ImportanceRecord
from slimnas.search.record import (
    RANDOM,
    SINGLE,
    SLIMMED,
    WALK,
    Measured,
    RecordedData,
    RecordedError,
    SearchRecord,
    content_digest,
    letters_of,
    line_of,
    selection_code,
)
from slimnas.search.slimming import Evaluate, Slimmer, cheapest

JOURNAL = "record.jsonl"
JOURNAL_SCHEMA = "slimnas/search-record-journal/1"
UNIFORM_EVERY = 4
"""Every how many of the random selections one is drawn uniformly; the others are slimmed at random.
In turn, so that fewer selections are the beginning of more."""
SPREAD = 0.25
"""How far the share of one stage that is kept strays from that of the whole network."""
WALK_SHARES = (0.65, 0.4, 0.2)
"""Targets of a walk: from the cheapest network (0) to the largest (1)."""
PER_WALK = 12


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        selections: random ones.
        walks: searches for made-up devices, of each at most `PER_WALK` networks.
        seed: of what is drawn.
    """

    selections: int
    walks: int
    seed: int


@dataclass(frozen=True)
class Subject:
    """What a record is made of.

    Attributes:
        space: with any number of classes.
        importance: of the trained supernet.
        evaluate: top-1 of a selection in percent, by that supernet.
        data: its images.
        details: resolution, number of images, supernet digest and recipe, as `SearchRecord` has
            them.
        made: when, on what and with which versions.
    """

    space: SearchSpace
    importance: ImportanceRecord
    evaluate: Evaluate
    data: RecordedData
    details: dict[str, Any]
    made: dict[str, str]


class MakingListener(Protocol):
    """Is told how the making of a record goes."""

    def measured(self, number: int, total: int, top1: float) -> None:
        """After every selection; `total` is the most there can be."""

    def fitting(self) -> None:
        """Before the last computation, which takes some seconds."""


class JournaledEvaluator:
    """Measures each selection once, also over several starts.

    Args:
        path: the journal, one line per selection.
        identity: what the figures belong to; a journal of something else is refused.
        space: whose selections they are.
        evaluate: top-1 of a selection in percent.

    Raises:
        RunFolderError: the journal belongs to something else, or cannot be read.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], space: SearchSpace, evaluate: Evaluate
    ) -> None:
        self._path = path
        self._letters = letters_of(space)
        self._evaluate = evaluate
        self._known: dict[str, float] = {}
        header = {"schema": JOURNAL_SCHEMA, **identity}
        lines = whole_lines(path, RunFolderError)
        if lines and parse_line(lines[0]) != header:
            raise RunFolderError(
                f"{path}: was begun with another supernet, data or number of images; give the same "
                "ones to go on with it, or delete it"
            )
        for line in lines[1:]:
            row = parse_line(line)
            try:
                self._known[row["selection"]] = float(row["top1"])
            except (TypeError, KeyError, ValueError) as error:
                raise RunFolderError(f"{path}: damaged ({error}); delete it") from error
        atomic_write_bytes(path, b"".join(lines or [json_line(header)]))

    def top1(self, selection: Selection) -> float:
        """Top-1 of `selection` in percent; on disk when this returns."""
        code = selection_code(selection, self._letters)
        if code not in self._known:
            top1 = self._evaluate(selection)
            with self._path.open("ab") as journal:
                journal.write(json_line({"selection": code, "top1": top1}))
            self._known[code] = top1
        return self._known[code]


def make_record(subject: Subject, plan: Plan, listener: MakingListener) -> SearchRecord:
    """Measure what `plan` says and fit the model that predicts the rest.

    The same subject and plan give the same record.
    """
    measuring = _Measuring(subject, plan, listener)
    for selection in single_changes(subject.space, subject.importance):
        measuring.add(selection, SINGLE, "")
    rng = random.Random(plan.seed)
    for number in range(plan.selections):
        if number % UNIFORM_EVERY == 0:
            measuring.add(subject.space.random(rng), RANDOM, f"{RANDOM[0]}{number}")
        else:
            slimmed = slimmed_at_random(subject.space, subject.importance, rng)
            measuring.add(slimmed, SLIMMED, f"{SLIMMED[0]}{number}")
    scales = measuring.fitted() if plan.walks else None
    for number in range(plan.walks if scales else 0):
        assert scales is not None
        model = AccuracyModel(subject.space, scales, measuring.top1)
        walker = Walker(subject.space, subject.importance, model.top1)
        for selection in walker.walk(random.Random(f"{plan.seed} {number}")):
            measuring.add(selection, WALK, f"{WALK[0]}{number}")
    listener.fitting()
    return measuring.record(measuring.fitted())


class _Measuring:
    """The selections measured so far, in order."""

    def __init__(self, subject: Subject, plan: Plan, listener: MakingListener) -> None:
        self.rows: dict[Selection, Measured] = {}
        self._subject = subject
        self._plan = plan
        self._listener = listener
        singles = len(single_changes(subject.space, subject.importance))
        self._most = singles + plan.selections + plan.walks * PER_WALK

    @property
    def top1(self) -> dict[Selection, float]:
        return {selection: row.top1 for selection, row in self.rows.items()}

    def add(self, selection: Selection, kind: str, group: str) -> None:
        if selection in self.rows:
            self._most -= 1
            return
        top1 = self._subject.evaluate(selection)
        self.rows[selection] = Measured(selection, top1, kind, group)
        self._listener.measured(len(self.rows), self._most, top1)

    def fitted(self) -> Scales:
        known = features(self._subject.space, list(self.rows))
        return fit_scales(known, np.array(list(self.top1.values())))

    def record(self, scales: Scales) -> SearchRecord:
        subject, rows = self._subject, list(self.rows.values())
        letters = letters_of(subject.space)
        return SearchRecord(
            **subject.details,
            space=subject.space.name,
            space_digest=content_digest(subject.space),
            data=subject.data,
            seed=self._plan.seed,
            made={"date": date.today().isoformat(), **subject.made},
            letters=letters,
            alphas=tuple(tuple(map(dict, stage)) for stage in subject.importance.alphas),
            scales=scales,
            errors=recorded_errors(subject.space, rows),
            networks=len(rows),
            measured=tuple(line_of(row, letters) for row in rows),
        )


def recorded_errors(space: SearchSpace, rows: Sequence[Measured]) -> tuple[RecordedError, ...]:
    """Cross-validated errors of each kind of networks: random ones one by one, walks whole."""
    errors = held_out_errors(
        features(space, [row.selection for row in rows]),
        np.array([row.top1 for row in rows]),
        [row.group for row in rows],
        [row.kind for row in rows],
    )
    return tuple(
        RecordedError(
            what=kind,
            networks=error.networks,
            spearman=round(error.spearman, 4),
            mean_error_points=round(error.mean_error_points, 4),
        )
        for kind, error in errors.items()
    )


def single_changes(space: SearchSpace, importance: ImportanceRecord) -> tuple[Selection, ...]:
    """The largest network, and every legal one that differs from it in one slot or one width; in
    spaces that count MB3D blocks also the largest for each number of them.
    """
    start = importance.start(space)
    found = [start]
    if space.counts_attention:
        found += [space.largest(count) for count in space.attention_counts()]
    for i, stage in enumerate(space.stages):
        found += [start.with_width(i, width) for width in reversed(stage.width.values)]
        for j in range(stage.slots):
            found += [start.with_path(i, j, choice) for choice in stage.choices]
    return tuple(s for s in dict.fromkeys(found) if space.fault(s) is None)


def slimmed_at_random(
    space: SearchSpace, importance: ImportanceRecord, rng: random.Random
) -> Selection:
    """The largest network after slimming actions drawn at random, so that each stage keeps a
    share of its width and of its blocks that is drawn around one of the whole network.
    """
    whole = rng.random()

    def share() -> float:
        return min(max(whole + rng.gauss(0.0, SPREAD), 0.0), 1.0)

    least_width = [s.width.min + share() * (s.width.max - s.width.min) for s in space.stages]
    least_depth = [s.min_depth + share() * (s.slots - s.min_depth) for s in space.stages]
    swaps = int(rng.random() * sum(stage.slots for stage in space.stages))
    selection = importance.start(space)
    price = made_up_price(space, rng)

    def keeps(action: Action) -> bool:
        after = action.apply(selection)
        if action.width is not None:
            return action.width >= least_width[action.stage] - 1e-9
        if action.becomes in space.stages[action.stage].blocks:
            return swaps > 0
        depth = sum(stage == action.stage for stage, *_ in after.active())
        return depth >= least_depth[action.stage] - 1e-9

    while True:
        actions = [a for a in open_actions(space, selection, importance, price) if keeps(a)]
        if not actions:
            return selection
        taken = rng.choice(actions)
        swaps -= taken.becomes in space.stages[taken.stage].blocks
        selection = taken.apply(selection)


def made_up_price(space: SearchSpace, rng: random.Random) -> Callable[[Selection], float]:
    """Latency of a device that does not exist: each stage and each kind of block has its own
    weight, and a drawn share of a block's time grows with the square of its width.
    """
    stage_ms = [rng.lognormvariate(0.0, 0.7) for _ in space.stages]
    blocks = dict.fromkeys(choice for stage in space.stages for choice in stage.blocks)
    block_ms = {block: rng.lognormvariate(0.3 * number, 0.3) for number, block in enumerate(blocks)}
    by_width = rng.uniform(0.05, 0.95)

    @cache
    def price(selection: Selection) -> float:
        total = 0.0
        for i, (stage, width) in enumerate(zip(space.stages, selection.widths, strict=True)):
            share = 1 - by_width + by_width * (width / stage.width.max) ** 2
            used = [block_ms[choice] for choice in selection.paths[i] if choice in block_ms]
            total += stage_ms[i] * share * (1.0 + sum(used))
        return total

    return price


@dataclass(frozen=True)
class Walker:
    """Goes through searches by predicted accuracy."""

    space: SearchSpace
    importance: ImportanceRecord
    evaluate: Evaluate

    def walk(self, rng: random.Random) -> list[Selection]:
        """Networks on the way of a search for a made-up device: what answers its targets, and
        others evenly along it; at most `PER_WALK`.
        """
        price = made_up_price(self.space, rng)
        slimmer = Slimmer(self.space, self.importance, price, self.evaluate, fill=0.97)
        begin = slimmer.begin({})
        low = cheapest(self.space, price)[1]
        targets = [low + share * (begin.latency_ms - low) for share in WALK_SHARES]
        try:
            trajectory, reached = slimmer.run(begin, targets)
        except UnreachableTargetError:
            return []
        states = [selection for selection, *_ in trajectory.states]
        answers = [states[steps] for steps in reached.values()]
        others = _evenly(states[1:], PER_WALK - len(answers))
        return list(dict.fromkeys([*answers, *others]))


def _evenly(states: Sequence[Selection], count: int) -> Iterator[Selection]:
    for number in range(min(count, len(states))):
        yield states[(number * len(states)) // count]
