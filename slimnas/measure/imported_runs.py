"""Results of a kit's own runner: one file, or the shards of several devices of one kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from slimnas._jsonlines import parse_line
from slimnas.errors import LatencyTableError
from slimnas.measure.journal import Visit
from slimnas.measure.kit_manifest import KitManifest
from slimnas.measure.timing import Round

SCHEMA = "slimnas/latency-kit-results/1"
JUMP = 2.0
"""Ratio between the slow and the fast end of the reference's times at which clocks jumped."""
APART = 1.3
"""The same between the medians of two shards, at which they are not one kind of device."""


@dataclass(frozen=True)
class KitRun:
    """One results file.

    Attributes:
        source: its name, for messages.
        manifest: the kit's, as the runner saw it.
        device: the device, its runtime and compute unit.
        protocol: how it was timed.
        visits: what was timed.
        date: of the last start.
    """

    source: str
    manifest: KitManifest
    device: Mapping[str, Any]
    protocol: Mapping[str, Any]
    visits: tuple[Visit, ...]
    date: str


def is_run(text: str) -> bool:
    """Whether `text` begins as a kit's results do."""
    header = parse_line(text.partition("\n")[0].encode())
    return isinstance(header, dict) and header.get("schema") == SCHEMA


def read_run(text: str, source: str) -> KitRun:
    """Read a kit's results; the start of a line at the end, left by a killed runner, is skipped.

    Raises:
        LatencyTableError: a damaged header or line, or a time that is not positive and finite.
    """
    lines = text.splitlines()
    if not text.endswith("\n"):
        lines.pop()
    header = parse_line(lines[0].encode()) if lines else None
    if not isinstance(header, dict) or not all(
        isinstance(header.get(key), dict) for key in ("manifest", "device", "protocol")
    ):
        raise LatencyTableError(f"{source}:1: damaged header; copy the results again")
    manifest = KitManifest.from_dict(header["manifest"], source=f"{source}:1: manifest")
    if header.get("kit") != manifest.digest:
        raise LatencyTableError(f"{source}:1: kit: does not name the manifest beside it")
    date, visits = manifest.made, []
    terms = {entry.name: len(entry.terms) for entry in manifest.entries}
    for number, line in enumerate(lines[1:], start=2):
        data = parse_line(line.encode())
        if not isinstance(data, dict):
            raise LatencyTableError(f"{source}:{number}: damaged line; copy the results again")
        if isinstance(data.get("session"), dict):
            date = str(data["session"].get("date", date))
        if "entry" in data:
            visits.append(_visit(data, terms, f"{source}:{number}"))
    _refuse_twice(visits, source)
    return KitRun(source, manifest, header["device"], header["protocol"], tuple(visits), date[:10])


def _visit(data: Mapping[str, Any], terms: Mapping[str, int], where: str) -> Visit:
    try:
        visit = Visit.from_dict(data)
    except (KeyError, TypeError, ValueError, IndexError):
        raise LatencyTableError(f"{where}: damaged line; copy the results again") from None
    if visit.entry not in terms:
        raise LatencyTableError(f"{where}: entry {visit.entry!r} is not in the kit")
    for one in visit.rounds:
        times = [*one.reference_ms, *(ms for samples in one.samples_ms for ms in samples)]
        bad = [ms for ms in times if not (math.isfinite(ms) and ms > 0)]
        if bad:
            raise LatencyTableError(
                f"{where}: every time of {visit.entry!r} must be a positive number, got "
                f"{bad[0]:g} ms; remove the line and run the kit again, which fills the gap"
            )
        if one.accepted and (len(one.samples_ms) != terms[visit.entry] or not all(one.samples_ms)):
            raise LatencyTableError(
                f"{where}: a round of {visit.entry!r} must have times of its {terms[visit.entry]} "
                "networks; remove the line and run the kit again, which fills the gap"
            )
    return visit


def join(runs: Sequence[KitRun]) -> KitRun:
    """Join shards: one kit, one kind of device, one protocol, every visit once.

    Raises:
        LatencyTableError: they differ in more than their entries.
    """
    first = runs[0]
    visits: list[Visit] = []
    for run in runs:
        if run.manifest.digest != first.manifest.digest:
            raise LatencyTableError(
                f"{run.source}: is of kit {run.manifest.digest[:12]}, {first.source} of kit "
                f"{first.manifest.digest[:12]}; join results of one kit only"
            )
        for what in ("device", "protocol"):
            one, other = getattr(first, what), getattr(run, what)
            for key in sorted({*one, *other}):
                if one.get(key) != other.get(key):
                    raise LatencyTableError(
                        f"{run.source}: {what}.{key} is {other.get(key)!r}, in {first.source} "
                        f"{one.get(key)!r}; shards must come from equal devices with the same "
                        "software: run one of them again"
                    )
        visits += run.visits
    _refuse_twice(visits, " and ".join(run.source for run in runs))
    _refuse_apart(runs)
    return KitRun(
        ", ".join(run.source for run in runs),
        first.manifest,
        first.device,
        first.protocol,
        tuple(visits),
        max(run.date for run in runs),
    )


def drift(run: KitRun) -> float:
    """How far apart the reference's slow and fast times are, as a ratio.

    Raises:
        LatencyTableError: so far that the clocks jumped.
    """
    paces = [one.pace for one in _accepted(run.visits)]
    if not paces:
        return 1.0
    low, high = np.percentile(paces, [5, 95])
    if high > JUMP * low:
        raise LatencyTableError(
            f"{run.source}: the reference network took from {low:.4g} to {high:.4g} ms, so the "
            "device's clocks jumped (heat, power saving, other programs); cool it, plug it in, "
            "close what runs, and run the kit again with another --output"
        )
    return float(high / low)


def _accepted(visits: Sequence[Visit]) -> list[Round]:
    return [one for visit in visits for one in visit.rounds if one.accepted]


def _refuse_twice(visits: Sequence[Visit], source: str) -> None:
    seen = set()
    for visit in visits:
        key = visit.entry, visit.number
        if key in seen:
            raise LatencyTableError(
                f"{source}: pass {visit.number} of {visit.entry!r} is there twice; give each "
                "results file once, and each shard a number of its own"
            )
        seen.add(key)


def _refuse_apart(runs: Sequence[KitRun]) -> None:
    paces = {
        run.source: median(one.pace for one in _accepted(run.visits))
        for run in runs
        if _accepted(run.visits)
    }
    if not paces:
        return
    fast, slow = min(paces, key=paces.__getitem__), max(paces, key=paces.__getitem__)
    if paces[slow] > APART * paces[fast]:
        raise LatencyTableError(
            f"{slow}: the reference network took {paces[slow]:.4g} ms, in {fast} "
            f"{paces[fast]:.4g} ms; shards must come from equal devices in the same state"
        )
