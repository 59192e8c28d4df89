"""Lets a measured table state what a later session found, beside what its build did."""

from __future__ import annotations

from slimnas.latency.table import IntervalInfo, LatencyTable
from slimnas.measure.validate import Validation


def restated(table: LatencyTable, found: Validation) -> LatencyTable:
    """Return the table with the error of a validation beside its own; prices stay as they are.

    Its interval becomes the wider one of the build's and of the validation's errors. A build sees
    one session of the machine; networks differ from one session to the next by more than within
    one, which is what users of a table meet.

    Args:
        table: the table that was validated.
        found: the validation, of fresh networks of the table's own scope.
    """
    figure = found.figure.model_copy(update={"what": f"{found.figure.what}, on {found.date}"})
    rest = [one for one in table.device.errors if one.what != figure.what]
    seen = IntervalInfo.conformal(
        _errors(found),
        f"errors |measured / predicted - 1| of {figure.networks} networks in a validation on "
        f"{found.date}, each session on its own",
    )
    stated = table.device.interval
    wider = stated if stated and stated.high_percent >= seen.high_percent else seen
    device = table.device.model_copy(update={"errors": (*rest, figure), "interval": wider})
    return LatencyTable(device, table.rows, table.source)


def _errors(found: Validation) -> list[float]:
    sessions = found.halves_ms or [(check.measured_ms,) for check in found.checks]
    return [
        ms / check.predicted_ms - 1
        for check, latencies_ms in zip(found.checks, sessions, strict=True)
        for ms in latencies_ms
    ]
