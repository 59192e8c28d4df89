"""Makes a latency table of times that were taken elsewhere."""

from __future__ import annotations

import gzip
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from slimnas import __version__
from slimnas._files import atomic_write_bytes, read_text
from slimnas._lock import folder_lock
from slimnas.errors import LatencyTableError, suggest
from slimnas.latency.devices import refuse_taken
from slimnas.latency.table import DeviceInfo, RuntimeInfo
from slimnas.measure.build import BuiltTable
from slimnas.measure.imported_checks import check_units
from slimnas.measure.imported_files import FileTime, FileTimes, name_of, read_file_times
from slimnas.measure.imported_runs import KitRun, drift, is_run, join, read_run
from slimnas.measure.journal import Visit
from slimnas.measure.kit_manifest import RUNNERS, KitManifest
from slimnas.measure.plan import Plan
from slimnas.measure.results import make_table, timings, usual_pace
from slimnas.measure.summary import write_summary
from slimnas.measure.timing import Protocol, Round

RAW_FOLDER = "results"
GROUPS = 5
"""Rounds that the samples of a file are divided into, so that their spread is known."""
NAMED = 3
"""Missing files or entries that a message names."""


@dataclass(frozen=True)
class Stated:
    """What whoever imports says about the device; none where the results say it.

    Attributes:
        device: the device in words.
        soc: its chip.
        os: its system.
        runtime: what ran the networks.
        runtime_version: its version.
        compute_unit: where it ran them.
        threads: CPU threads per call.
    """

    device: str | None = None
    soc: str | None = None
    os: str | None = None
    runtime: str | None = None
    runtime_version: str | None = None
    compute_unit: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class ImportJob:
    """What to import and where to put it.

    Attributes:
        results: files, or folders of files.
        output: the table's folder; its name is the device's.
        kit: the kit that was timed; a kit's own results know it themselves.
        mapping: by result's name, the kit's file it is of, where the names differ.
        stated: about the device.
        force: replace an imported table.
    """

    results: tuple[Path, ...]
    output: Path
    kit: Path | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    stated: Stated = field(default_factory=Stated)
    force: bool = False


@dataclass(frozen=True)
class _Found:
    """What the results say, in whatever form they came."""

    manifest: KitManifest
    visits: tuple[Visit, ...]
    device: Mapping[str, Any]
    protocol: str
    date: str
    notes: tuple[str, ...]


def import_results(job: ImportJob) -> BuiltTable:
    """Import results as a table; the results are kept, compressed, beside it.

    Raises:
        LatencyTableError: results that are damaged, incomplete, of another kit, in another unit
            or not to be trusted, or a folder that holds another table; nothing is written then.
        RunFolderError: the folder is in use or cannot be written.
    """
    refuse_taken(job.output, "imported", force=job.force)
    paths = _paths(job.results)
    texts = {path: read_text(path, LatencyTableError, "latency results") for path in paths}
    own = [path for path, text in texts.items() if is_run(text)]
    if own and len(own) < len(texts):
        other = next(path for path in texts if path not in own)
        raise LatencyTableError(
            f"{other}: is no results file of a kit's runner, {own[0]} is; import them apart"
        )
    found = _from_runs(job, texts) if own else _from_files(job, texts)
    plan = found.manifest.plan()
    try:
        table, checks = make_table(plan, found.visits, _device(job, found, plan))
    except LatencyTableError as error:
        reason = str(error).partition("; ")[0]
        raise LatencyTableError(
            f"{paths[0]}: {reason}: the times are too noisy; take more of them, on a device that "
            "is left alone"
        ) from error
    with folder_lock(job.output):
        for i, (path, text) in enumerate(texts.items(), start=1):
            kept = job.output / RAW_FOLDER / f"{i:03d}_{path.name}.gz"
            atomic_write_bytes(kept, gzip.compress(text.encode(), mtime=0))
        write_summary(job.output, plan, timings(plan.entries, found.visits))
        table.save(job.output)
    return BuiltTable(table, job.output, checks, 0)


def read_mapping(path: Path) -> dict[str, str]:
    """Read which result is of which file of the kit: CSV with the columns result and file.

    Raises:
        LatencyTableError: no such file, other columns, or a result named twice.
    """
    text = read_text(path, LatencyTableError, "a CSV with the columns result,file")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    if not rows or rows[0] != ["result", "file"]:
        raise LatencyTableError(f"{path}:1: must have the columns result,file")
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or row[0] in found:
            what = (
                "names a result twice" if len(row) == 2 else f"must have 2 values, has {len(row)}"
            )
            raise LatencyTableError(f"{path}:{number}: {what}")
        found[row[0]] = row[1]
    return found


def _from_runs(job: ImportJob, texts: Mapping[Path, str]) -> _Found:
    run = join([read_run(text, str(path)) for path, text in texts.items()])
    if job.kit is not None:
        kit = KitManifest.load(job.kit)
        if kit.digest != run.manifest.digest:
            raise LatencyTableError(
                f"{run.source}: is of kit {run.manifest.digest[:12]}, {job.kit} is kit "
                f"{kit.digest[:12]}; give the kit that was timed, or none"
            )
    _refuse_missing_entries(run)
    apart = drift(run)
    check_units(run.manifest, _median_ms(run), run.source)
    rounds = [one for visit in run.visits for one in visit.rounds]
    rejected = sum(not one.accepted for one in rounds)
    notes = (
        f"{rejected} of {len(rounds)} rounds rejected; 5 to 95 % of the reference network's times "
        f"within a factor of {apart:.3f}",
    )
    said = _protocol(run).describe()
    protocol = f"{said}; by a kit's {RUNNERS.get(run.manifest.format, 'runner')}"
    return _Found(run.manifest, run.visits, run.device, protocol, run.date, notes)


def _from_files(job: ImportJob, texts: Mapping[Path, str]) -> _Found:
    if job.kit is None:
        raise LatencyTableError(
            f"{next(iter(texts))}: says nothing about networks; give the kit that was timed with "
            "--kit"
        )
    manifest = KitManifest.load(job.kit)
    read = [read_file_times(text, str(path)) for path, text in texts.items()]
    tools = sorted({one.tool for one in read})
    if len(tools) > 1:
        raise LatencyTableError(
            f"{job.results[0]}: mixes results of {' and '.join(tools)}; import one tool's"
        )
    samples = _samples(job, manifest, read)
    source = ", ".join(sorted({str(path) for path in job.results}))
    middle = {name: median(values) for name, values in samples.items()}
    check_units(manifest, middle, source)
    least = min(map(len, samples.values()))
    device = {
        "runtime": {"name": manifest.runtime.name if tools == ["csv"] else tools[0]},
    }
    protocol = (
        f"every network by itself with {tools[0]}, {least} or more times each; blocks by "
        "differencing chains of copies, other components by differencing networks with and "
        "without them"
    )
    notes = (
        "not timed beside a reference network: drift between the networks is not corrected",
        *dict.fromkeys(note for one in read for note in one.notes),
    )
    today = date.today().isoformat()
    return _Found(manifest, _visits(manifest, samples), device, protocol, today, notes)


def _samples(
    job: ImportJob, manifest: KitManifest, read: Sequence[FileTimes]
) -> dict[str, list[float]]:
    """Every file's times by its name in the kit."""
    files = {name_of(name): name for name in manifest.by_name}
    mapping = {name_of(result): name_of(file) for result, file in job.mapping.items()}
    samples: defaultdict[str, list[float]] = defaultdict(list)
    for one in (time for times in read for time in times.times):
        name = mapping.get(one.name, one.name)
        if name not in files:
            raise LatencyTableError(_unknown(one, files))
        samples[files[name]].append(one.latency_ms)
    missing = [name for name in manifest.by_name if name not in samples]
    if missing:
        raise LatencyTableError(
            f"{job.results[0]}: {len(missing)} of {len(files)} files have no time: "
            f"{_some(missing)}; time them too and import all together"
        )
    return dict(samples)


def _unknown(one: FileTime, files: Mapping[str, str]) -> str:
    return (
        f"{one.where}: no file of the kit is called {one.name!r}{suggest(one.name, files)}; name "
        "results like the kit's files, or say with --mapping which is which"
    )


def _visits(manifest: KitManifest, samples: Mapping[str, Sequence[float]]) -> tuple[Visit, ...]:
    """One visit per entry; the reference's median is every round's pace, so nothing is scaled."""
    pace = median(samples[manifest.reference])
    visits = []
    for entry in manifest.entries:
        taken = [samples[term.file] for term in entry.terms]
        count = min(GROUPS, *map(len, taken))
        rounds = tuple(
            Round((pace, pace), tuple(_group(values, i, count) for values in taken), True)
            for i in range(count)
        )
        visits.append(Visit(entry.name, 0, rounds))
    return tuple(visits)


def _group(values: Sequence[float], number: int, count: int) -> tuple[float, ...]:
    ends = [round(i * len(values) / count) for i in range(count + 1)]
    return tuple(values[ends[number] : ends[number + 1]])


def _median_ms(run: KitRun) -> dict[str, float]:
    """Every file's median time, at whatever pace."""
    entries = {entry.name: entry for entry in run.manifest.entries}
    found: defaultdict[str, list[float]] = defaultdict(list)
    for visit in run.visits:
        for one in visit.rounds:
            if one.accepted:
                found[run.manifest.reference].append(one.pace)
                terms = entries[visit.entry].terms
                for term, values in zip(terms, one.samples_ms, strict=True):
                    found[term.file].append(median(values))
    return {name: median(values) for name, values in found.items()}


def _refuse_missing_entries(run: KitRun) -> None:
    timed = {visit.entry for visit in run.visits if any(one.accepted for one in visit.rounds)}
    missing = [entry.name for entry in run.manifest.entries if entry.name not in timed]
    if missing:
        runner = RUNNERS.get(run.manifest.format, "the kit's runner")
        raise LatencyTableError(
            f"{run.source}: {len(missing)} of {len(run.manifest.entries)} entries were not timed: "
            f"{_some(missing)}; start {runner} again with the same --output, it goes on there, or "
            "give the other shards too"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _protocol(run: KitRun) -> Protocol:
    try:
        return Protocol.from_dict(run.protocol)
    except (KeyError, TypeError, ValueError):
        raise LatencyTableError(
            f"{run.source}:1: protocol: must be that of the kit, as slimnas "
            f"{run.manifest.tool_version} writes it; import with that version"
        ) from None


def _device(job: ImportJob, found: _Found, plan: Plan) -> DeviceInfo:
    stated, said = job.stated, found.device
    runtime = said.get("runtime")
    runtime = runtime if isinstance(runtime, Mapping) else {}
    threads = stated.threads or said.get("threads")
    manifest = found.manifest
    return DeviceInfo(
        name=job.output.name,
        device=stated.device or str(said.get("device") or job.output.name),
        soc=stated.soc or str(said.get("soc") or "unknown"),
        os=stated.os or str(said.get("os") or "unknown"),
        runtime=RuntimeInfo(
            name=stated.runtime or str(runtime.get("name") or "unknown"),
            version=stated.runtime_version or str(runtime.get("version") or "unknown"),
        ),
        compute_unit=stated.compute_unit or str(said.get("compute_unit") or "unknown"),
        dtype=manifest.dtype,
        batch=manifest.batch,
        threads=threads if isinstance(threads, int) else None,
        protocol=found.protocol,
        date=found.date,
        tool_version=__version__,
        kind="imported",
        reference_ms=round(usual_pace(one for v in found.visits for one in v.rounds), 6),
        notes=(
            f"{manifest.title}: {len(plan.components)} components timed, widths between them are "
            "interpolated",
            f"kit {manifest.digest[:12]} of slimnas {manifest.tool_version}, {manifest.made}",
            *found.notes,
        ),
    )


def _paths(results: Sequence[Path]) -> list[Path]:
    """The files of `results`, those in folders too, each once."""
    paths: list[Path] = []
    for path in results:
        inside = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        paths += [one for one in inside if not one.name.startswith(".")]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise LatencyTableError(f"{twice[0]}: is given twice; give each results file once")
    if not paths:
        raise LatencyTableError(f"{results[0]}: holds no files; give the results to import")
    return paths
