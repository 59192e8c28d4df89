"""Makes an estimated table from whole-network latencies that a user gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from slimnas import __version__
from slimnas.arch.documents import parse_spec
from slimnas.errors import LatencyTableError, SpecError
from slimnas.latency.devices import refuse_taken
from slimnas.latency.fit import Fit, fit_points, fitted_table, save_fitted
from slimnas.latency.keys import INTERPOLATED_FIELDS
from slimnas.latency.points import Point
from slimnas.latency.rows import PriceRow
from slimnas.latency.table import DeviceInfo, FitInfo, LatencyTable

UNKNOWN = "unknown"
WORDS = ("soc", "os", "compute_unit", "dtype", "protocol")
PROVENANCE = (
    "No component of this table was timed. Prices come from a device model fitted to whole "
    "networks; points.csv has them, leave_one_out.csv how far off each is."
)


@dataclass(frozen=True)
class Calibrated:
    """What a calibration made.

    Attributes:
        table: the estimated table.
        fit: the fit behind it.
        flat: component types whose price does not grow with every width.
    """

    table: LatencyTable
    fit: Fit
    flat: tuple[str, ...]


def calibrate_device(
    points: Iterable[Point], name: str, info: FitInfo, **described: str
) -> Calibrated:
    """Fit a device model to `points` and price the components of the shipped spaces.

    Args:
        points: whole-network latencies.
        name: the table's name.
        info: the model and what it is held to.
        described: fields of `DeviceInfo` in words: device, soc, os, runtime, compute_unit,
            dtype, protocol, date; `unknown` where they are left out, today for the date.

    Raises:
        LatencyTableError: a name no folder can have, too few points, or no price for some
            component.
    """
    words = {key: described.get(key) or UNKNOWN for key in WORDS}
    document = {
        **words,
        "name": name,
        "device": described.get("device") or name,
        "runtime": {"name": described.get("runtime") or UNKNOWN, "version": UNKNOWN},
        "date": described.get("date") or date.today().isoformat(),
        "tool_version": f"slimnas {__version__}",
        "kind": "measured",  # replaced by the fit, which brings the errors an estimate must state
    }
    try:
        description = parse_spec(DeviceInfo, document, source="the new table")
    except SpecError as error:
        raise LatencyTableError(str(error)) from error
    fit = fit_points(tuple(points), info)
    table = fitted_table(fit, description)
    flat = flat_components(table.rows)
    notes = [PROVENANCE]
    if flat:
        notes.append(f"The points do not tell what width costs in: {', '.join(flat)}.")
    sources = tuple(dict.fromkeys(point.source for point in fit.used if point.source))
    device = table.device.model_copy(update={"notes": tuple(notes), "sources": sources})
    return Calibrated(LatencyTable(device, table.rows), fit, flat)


def save_calibrated(calibrated: Calibrated, folder: Path, *, force: bool = False) -> None:
    """Write the table, its points and its leave-one-out errors.

    Raises:
        LatencyTableError: see `refuse_taken`.
    """
    refuse_taken(folder, "estimated", force=force)
    save_fitted(calibrated.table, calibrated.fit, folder)


def flat_components(rows: Iterable[PriceRow]) -> tuple[str, ...]:
    """Return the component types whose price does not grow along some width, nanoseconds apart."""
    found: dict[str, None] = {}
    for line in width_lines(rows):
        if line[-1].latency_ms <= line[0].latency_ms:
            found[f"{line[0].key.component} {line[0].key.type}"] = None
    return tuple(found)


def width_lines(rows: Iterable[PriceRow]) -> list[list[PriceRow]]:
    """Return the rows in lines along which one width grows and all else stays.

    The widths of a block grow together. The overhead, which has none, is left out.
    """
    lines: defaultdict[tuple[object, ...], list[PriceRow]] = defaultdict(list)
    for row in rows:
        key = row.key
        fixed = tuple(item for item in key.fields if item[0] not in INTERPOLATED_FIELDS)
        same = (key.component, key.type, key.resolution, fixed)
        if key.component == "block":
            lines[(*same, "width")].append(row)
        elif key.component != "overhead":
            lines[(*same, "width_in", key.width_out)].append(row)
            lines[(*same, "width_out", key.width_in)].append(row)
    ordered = [sorted(line, key=lambda row: row.key.point) for line in lines.values()]
    return [line for line in ordered if len(line) > 1]
