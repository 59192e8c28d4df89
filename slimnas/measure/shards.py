"""Joins the parts of a build that several hosts with the same device shared; recomputes tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from slimnas._lock import folder_lock
from slimnas.errors import LatencyTableError
from slimnas.latency.devices import refuse_taken
from slimnas.latency.table import LatencyTable
from slimnas.measure.build import (
    JOURNAL_FILE,
    SAMPLES_FILE,
    BuiltTable,
    finish_table,
)
from slimnas.measure.describe import scope_of
from slimnas.measure.journal import Visit, difference, read_journal
from slimnas.measure.schedule import Networks, Schedule, Shard, timed_plan
from slimnas.measure.timing import Protocol


def merge(folders: Sequence[Path], output: Path, *, force: bool = False) -> BuiltTable:
    """Make one table of the journals that the shards of a build left.

    Every round was timed beside the reference network, which brings the hosts to one pace.

    Args:
        folders: the shards' output folders, each once.
        output: the table's folder; its name is the device's.
        force: replace a finished table.

    Raises:
        LatencyTableError: a folder without a journal, parts of different builds (another runtime
            version or machine, ...), a part twice or missing, or an unfinished one.
    """
    refuse_taken(output, "measured", force=force)
    parts: dict[int, tuple[Path, dict[str, Any], list[Visit]]] = {}
    for folder in folders:
        found, visits = read_journal(folder / JOURNAL_FILE)
        number = _shard_of(found, folder).number
        if number in parts:
            raise LatencyTableError(
                f"{folder}: is shard {number} of the build, as {parts[number][0]} is; "
                "give every shard once"
            )
        parts[number] = folder, found, visits
    first_folder, first, _ = next(iter(parts.values()))
    for folder, found, _ in parts.values():
        other = difference(_common(found), _common(first))
        if other is not None:
            raise LatencyTableError(
                f"{folder}: belongs to another build than {first_folder}: {other}; "
                "measure that shard again in the same setting"
            )
    of = _shard_of(first, first_folder).of
    lacking = [str(number) for number in range(1, of + 1) if number not in parts]
    if lacking:
        raise LatencyTableError(
            f"all {of} shards are needed, shard {', '.join(lacking)} is missing; give it too"
        )
    for number, (folder, found, visits) in parts.items():
        _require_complete(_schedule(found, folder, Shard(number, of)), visits, folder)
    schedule = _schedule(first, first_folder, Shard(1, of))
    joined = [visit for number in sorted(parts) for visit in parts[number][2]]
    header = {**_common(first), "shards": of}
    with folder_lock(output):
        table, checks = finish_table(
            output, header, schedule.plan, joined, date=date.today().isoformat()
        )
    return BuiltTable(table, output, checks, 0)


def recompute(folder: Path) -> BuiltTable:
    """Make a table's prices and errors anew from the samples beside it.

    The same samples and version give the same files.

    Raises:
        LatencyTableError: no measured table with its samples there, or samples of a version
            that timed other things.
    """
    known = LatencyTable.load(folder).device
    found, visits = read_journal(folder / SAMPLES_FILE)
    protocol, networks = _settings(found, folder)
    plan = timed_plan(scope_of(found, str(folder)), protocol, networks, visits)
    if folder.resolve().name != known.name:
        raise LatencyTableError(
            f"{folder}: must have the name of its device, {known.name!r}; rename the folder"
        )
    with folder_lock(folder):
        table, checks = finish_table(folder.resolve(), found, plan, visits, date=known.date)
    return BuiltTable(table, folder, checks, 0)


def _schedule(found: Mapping[str, Any], folder: Path, shard: Shard) -> Schedule:
    protocol, networks = _settings(found, folder)
    return Schedule(scope_of(found, str(folder)), protocol, networks, shard)


def _settings(found: Mapping[str, Any], folder: Path) -> tuple[Protocol, Networks]:
    try:
        return Protocol.from_dict(found["protocol"]), Networks(**found["networks"])
    except (KeyError, TypeError, ValueError) as error:
        raise LatencyTableError(
            f"{folder}: the journal's header is damaged ({error}); measure the table anew"
        ) from error


def _require_complete(schedule: Schedule, visits: Sequence[Visit], folder: Path) -> None:
    missing = next((wanted for batch in schedule.missing(visits) for wanted in batch), None)
    if missing is not None:
        number, entry, planned = missing
        raise LatencyTableError(
            f"{folder}: lacks at least {planned - len(visits)} of its visits, first {entry.name} "
            f"in pass {number}; finish it with the command that began it"
        )


def _shard_of(found: Mapping[str, Any], folder: Path) -> Shard:
    shard = found.get("shard")
    if not isinstance(shard, Mapping):
        raise LatencyTableError(
            f"{folder}: holds a whole build's journal, not a shard's; finish it with the command "
            "that began it"
        )
    return Shard(int(shard["number"]), int(shard["of"]))


def _common(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "shard"}
