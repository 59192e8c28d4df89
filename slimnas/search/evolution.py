"""NSGA-II over a search space: what greedy slimming is compared with, and a search of its own.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002), as Optuna has
it: least latency and most accuracy at once, so that one run answers every target. The same space,
prices and evaluations as slimming; Optuna is imported only here (pip install 'slimnas[bench]').
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimnas._files import atomic_write_bytes
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas.arch.space import ATTENTION, CONVOLUTION, IDENTITY, SearchSpace, Selection
from slimnas.arch.templates import is_attention
from slimnas.errors import (
    RunFolderError,
    RuntimeUnavailableError,
    SpecError,
    UnreachableTargetError,
)
from slimnas.search.actions import Price
from slimnas.search.slimming import Evaluate

if TYPE_CHECKING:
    import optuna

Genes = Mapping[str, Any]
"""A selection as Optuna sees it: `width.0`, `slot.0.0`, ..., `attention`."""

SCHEMA = "slimnas/evolution-record/1"
ASKS = 50
"""Selections asked for, per evaluation: of a small space most proposals are known already."""

SMALLEST_POPULATION, LARGEST_POPULATION, GENERATIONS = 10, 50, 10


@dataclass(frozen=True)
class Scored:
    """A selection that was evaluated.

    Attributes:
        selection: the point of the space.
        latency_ms: its price.
        top1: its accuracy on the SEARCH split, in percent.
    """

    selection: Selection
    latency_ms: float
    top1: float


@dataclass(frozen=True)
class Evolution:
    """Everything a run evaluated, in that order; no selection twice."""

    scored: tuple[Scored, ...]

    def front(self) -> tuple[Scored, ...]:
        """Those that no other beats in latency and accuracy, ascending in both."""
        found: list[Scored] = []
        for one in sorted(self.scored, key=lambda s: (s.latency_ms, -s.top1)):
            if not found or one.top1 > found[-1].top1:
                found.append(one)
        return tuple(found)

    def best(self, target_ms: float, least_ms: float = 0.0) -> Scored:
        """The most accurate at or below `target_ms`; of equals the fastest.

        Args:
            target_ms: the target.
            least_ms: faster ones count only where none is from here to the target. A supernet
                that was trained briefly finds its small networks the best.

        Raises:
            UnreachableTargetError: nothing evaluated is as fast.
        """
        fitting = [one for one in self.scored if one.latency_ms <= target_ms]
        if not fitting:
            fastest_ms = min(one.latency_ms for one in self.scored)
            raise UnreachableTargetError(
                f"target latency {target_ms:g} ms was not reached by {len(self.scored)} "
                f"evaluations of NSGA-II, the fastest network has {fastest_ms:.4g} ms; choose a "
                "higher target or more evaluations"
            )
        near = [one for one in fitting if one.latency_ms >= least_ms]
        return max(near or fitting, key=lambda one: (one.top1, -one.latency_ms))


class Record:
    """A file of evaluations, so that a run that was stopped need not repeat them.

    Args:
        path: JSON lines, one per evaluation.
        identity: digest of what the accuracies depend on: supernet, images.

    Raises:
        RunFolderError: the file is another run's, or cannot be written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        header = {"schema": SCHEMA, "identity": identity}
        first, *rest = whole_lines(path, RunFolderError) or [json_line(header)]
        if parse_line(first) != header:
            raise RunFolderError(
                f"{path}: holds evaluations with another supernet or other images; delete it, or "
                "give another place"
            )
        atomic_write_bytes(path, b"".join([first, *rest]))  # without a torn last line
        rows = [parse_line(line) for line in rest]
        try:
            self._known = {json.dumps(row["selection"]): float(row["top1"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"{path}: not a record of evaluations ({error}); delete it"
            ) from error

    def top1(self, selection: Selection, evaluate: Evaluate) -> float:
        """The recorded accuracy of `selection`, else `evaluate`'s, which is then recorded."""
        data = asdict(selection)
        key = json.dumps(data)
        if key not in self._known:
            found = evaluate(selection)
            try:
                with self._path.open("ab") as file:
                    file.write(json_line({"selection": data, "top1": found}))
            except OSError as error:
                raise RunFolderError(
                    f"{self._path}: cannot be written ({error.strerror}); free space"
                ) from error
            self._known[key] = found
        return self._known[key]


def evolve(
    space: SearchSpace,
    price: Price,
    evaluate: Evaluate,
    *,
    evaluations: int,
    seed: int,
    population: int | None = None,
    record: Record | None = None,
    on_scored: Callable[[int, Scored], None] = lambda done, scored: None,
) -> Evolution:
    """Search `space` by NSGA-II; the first generation is drawn as `space.random` draws.

    A selection that was evaluated already, or is outside the space, costs no evaluation and has
    no offspring. The same seed gives the same run always: one that was stopped is repeated from
    the start, with what `record` holds for free.

    Args:
        space: the search space.
        price: latency in ms of a selection.
        evaluate: top-1 in percent of a selection.
        evaluations: how many different selections to evaluate; fewer where the space has fewer.
        seed: of everything random.
        population: size of a generation; a tenth of the evaluations, 10 to 50, if not given.
        record: evaluations of an earlier run of the same supernet.
        on_scored: called with their number after each evaluation.

    Raises:
        RuntimeUnavailableError: Optuna is not installed.
        SpecError: fewer than two evaluations.
        RunFolderError: the record cannot be written.
    """
    if evaluations < 2:
        raise SpecError(f"evaluations must be at least 2 for NSGA-II, got {evaluations}")
    if population is None:
        tenth = evaluations // GENERATIONS
        population = min(max(tenth, SMALLEST_POPULATION), LARGEST_POPULATION)
    optuna = _optuna()
    ranges = _ranges(space)
    scored: dict[Selection, Scored] = {}
    with _quiet(optuna):
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
        rng = random.Random(seed)
        for _ in range(min(population, evaluations)):
            study.enqueue_trial(dict(encode(space, space.random(rng))))
        for _ in range(ASKS * evaluations):
            trial = study.ask(ranges)
            selection = decode(space, trial.params)
            if selection in scored or space.fault(selection) is not None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            top1 = evaluate(selection) if record is None else record.top1(selection, evaluate)
            one = scored[selection] = Scored(selection, price(selection), top1)
            study.tell(trial, [one.latency_ms, one.top1])
            on_scored(len(scored), one)
            if len(scored) == evaluations:
                break
    return Evolution(tuple(scored.values()))


def encode(space: SearchSpace, selection: Selection) -> Genes:
    """Genes that `decode` turns into `selection`."""
    genes: dict[str, Any] = {f"width.{i}": width for i, width in enumerate(selection.widths)}
    for i, slots in enumerate(selection.paths):
        for j, choice in enumerate(slots):
            offered = _offered(space, i)
            genes[f"slot.{i}.{j}"] = choice if choice in offered else CONVOLUTION
    if space.limits.attention_last:
        genes["attention"] = sum(is_attention(choice) for *_, choice in selection.active())
    return genes


def decode(space: SearchSpace, genes: Genes) -> Selection:
    """The selection that `genes` mean, mended where a limit of the space is easy to meet.

    Widths that must not fall are sorted, stages below their least depth get blocks, and as many of
    the last blocks as `attention` says have attention. What else is outside the space stays so.
    """
    widths = tuple(genes[f"width.{i}"] for i in range(len(space.stages)))
    if space.limits.monotone_widths:
        widths = tuple(sorted(widths))
    paths = []
    for i, stage in enumerate(space.stages):
        slots = [genes[f"slot.{i}.{j}"] for j in range(stage.slots)]
        idle = [j for j, choice in enumerate(slots) if choice == IDENTITY]
        for j in idle[: max(0, stage.min_depth - (stage.slots - len(idle)))]:
            slots[j] = next(choice for choice in _offered(space, i) if choice != IDENTITY)
        paths.append(tuple(slots))
    selection = Selection(widths, tuple(paths))
    if not space.limits.attention_last:
        return selection
    return _with_attention_last(space, selection, genes["attention"])


def _with_attention_last(space: SearchSpace, selection: Selection, count: int) -> Selection:
    """Attention in the last `count` blocks, or as many as offer it, and in no others."""
    left = count
    for stage, slot, choice in reversed(selection.active()):
        blocks = space.stages[stage].blocks
        with_it = [block for block in blocks if is_attention(block)]
        left = left if with_it else 0
        fitting = with_it if left > 0 else [block for block in blocks if not is_attention(block)]
        left -= 1
        if fitting and choice not in fitting:
            kind = CONVOLUTION if CONVOLUTION in fitting else fitting[0]
            selection = selection.with_path(stage, slot, kind)
    return selection


def _offered(space: SearchSpace, stage: int) -> tuple[str, ...]:
    """What a slot's gene chooses from: where a number says which are MB3D, blocks are MB4D."""
    choices = space.stages[stage].choices
    if space.counts_attention and CONVOLUTION in choices:
        return tuple(choice for choice in choices if choice != ATTENTION)
    return choices


def _ranges(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    distributions = _optuna().distributions
    ranges: dict[str, optuna.distributions.BaseDistribution] = {}
    for i, stage in enumerate(space.stages):
        width = stage.width
        ranges[f"width.{i}"] = distributions.IntDistribution(width.min, width.max, step=width.step)
        for j in range(stage.slots):
            ranges[f"slot.{i}.{j}"] = distributions.CategoricalDistribution(_offered(space, i))
    if space.limits.attention_last:
        most = sum(s.slots for s in space.stages if any(is_attention(b) for b in s.blocks))
        ranges["attention"] = distributions.IntDistribution(0, most)
    return ranges


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"NSGA-II needs Optuna, which is not installed ({error}); pip install 'slimnas[bench]'"
        ) from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's notes on stderr; its verbosity is restored."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
