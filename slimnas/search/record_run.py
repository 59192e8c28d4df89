"""A search that starts from a record instead of a supernet: no images, no training, no weights."""

from __future__ import annotations

from pathlib import Path

from slimnas._files import remove_leftovers
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace, Selection
from slimnas.latency.estimate import estimate
from slimnas.latency.table import LatencyTable
from slimnas.search.checks import pricer
from slimnas.search.closing import Answer, Meter
from slimnas.search.config import SearchConfig
from slimnas.search.found import (
    SOURCE,
    Found,
    found_folder,
    found_metrics,
    found_name,
    judged_reference,
)
from slimnas.search.importance import ImportanceRecord
from slimnas.search.record import RecordEvaluator, SearchRecord
from slimnas.search.run import IMPORTANCE, Listener, SearchResult, answer_targets
from slimnas.search.slimming import Slimmer
from slimnas.search.trajectory import Trajectory
from slimnas.zoo.entry import ARCHITECTURE, METRICS
from slimnas.zoo.metrics import Metric, save_metrics
from slimnas.zoo.preprocessing import TRAINED_AT


def run_from_record(
    config: SearchConfig,
    space: SearchSpace,
    table: LatencyTable,
    record: SearchRecord,
    folder: Path,
    *,
    listener: Listener,
    meter: Meter | str,
) -> SearchResult:
    """Search `space` for networks that meet the targets, by what a record knows of it.

    Args:
        config: the settings; `claim` has tied the folder to them.
        space: the search space, with the classes that the found networks get.
        table: the latency table.
        record: of the space, see `open_record`.
        folder: the run folder, locked by the caller.
        listener: told how it goes.
        meter: measures the networks found; or why nothing can.

    Raises:
        UnreachableTargetError: greedy found no way to a target.
        LatencyTableError: the machine is too busy to measure.
        ExportError: the table's runtime cannot run a found network.
        RunFolderError: a damaged or foreign file in the folder.
    """
    remove_leftovers(folder)
    provenance = {
        "seed": config.seed,
        "space": space.name,
        "space_digest": config.space_digest,
        "table_digest": config.table_digest,
        "record_digest": record.digest,
        "supernet_digest": record.supernet_digest,
        "data_digest": record.data.digest,
    }
    importance = ImportanceRecord(record.alphas, provenance)
    importance.save(folder / IMPORTANCE)
    evaluator = RecordEvaluator(record, space)

    def evaluate(selection: Selection) -> float:
        top1 = evaluator.top1(selection)
        listener.evaluated(selection, top1)
        return top1

    slimmer = Slimmer(
        space, importance, pricer(space, table), evaluate, config.frontier, config.fill
    )
    images = {"search_images": record.search_images}
    walked = answer_targets(
        config, slimmer, table, folder, {**provenance, **images}, listener=listener, meter=meter
    )
    writer = _Writer(config, space, table, record, evaluator)
    return SearchResult(
        space=space,
        trained=None,
        importance=importance,
        trajectory=walked.trajectory,
        found=tuple(writer.save(walked.trajectory, answer, folder) for answer in walked.answers),
        table=walked.table,
        unmeasured=walked.unmeasured,
        reference=judged_reference(space, table, record.alphas, evaluator.top1),
        evaluated_images=record.search_images,
        training=(),
        record=record,
    )


class _Writer:
    """Writes found networks, each without weights."""

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        table: LatencyTable,
        record: SearchRecord,
        evaluator: RecordEvaluator,
    ) -> None:
        self._config = config
        self._space = space
        self._table = table
        self._record = record
        self._evaluator = evaluator

    def save(self, trajectory: Trajectory, answer: Answer, folder: Path) -> Found:
        selection, _, top1 = trajectory.states[answer.steps]
        is_measured = self._evaluator.is_measured(selection)
        name = found_name(self._space, self._table, answer.target_ms)
        provenance = {
            "source": f"{SOURCE}, from a search record",
            "target_ms": answer.target_ms,
            "seed": self._config.seed,
            "record_digest": self._record.digest,
            "supernet_digest": self._record.supernet_digest,
            "table_digest": self._config.table_digest,
            TRAINED_AT: self._record.resolution,
        }
        architecture = self._space.architecture(selection).renamed(name, provenance)
        priced, counted = estimate(architecture, answer.table), cost(architecture)
        judged = self._judged(top1, is_measured=is_measured)
        metrics = found_metrics(self._table, priced, counted, judged, answer.measurement)
        place = found_folder(folder, self._config, answer.target_ms)
        save_metrics(place / METRICS, metrics)
        architecture.save(place / ARCHITECTURE)
        return Found(
            target_ms=answer.target_ms,
            architecture=architecture,
            selection=selection,
            estimate=priced,
            cost=counted,
            search_top1=top1,
            steps=answer.steps,
            folder=place,
            measurement=answer.measurement,
            rounds=answer.rounds,
            has_weights=False,
            is_predicted=not is_measured,
        )

    def _judged(self, top1: float, *, is_measured: bool) -> Metric:
        record = self._record
        how = "measured" if is_measured else f"predicted from {len(record.rows)} networks measured"
        return Metric(
            top1,
            f"{how} on {record.search_images} SEARCH images of {record.data.source} at "
            f"{record.resolution} px with weights inherited from the record's supernet; this "
            "network has no weights",
        )
