"""`PriceRow`: one line of a latency table, and the CSV text that holds it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slimnas.errors import LatencyTableError, suggest
from slimnas.latency.keys import PriceKey, format_fields, parse_fields

COLUMNS = (
    "component",
    "type",
    "fields",
    "resolution",
    "width_in",
    "width_out",
    "latency_ms",
    "spread_ms",
    "n",
    "kind",
)
COMPONENTS = ("stem", "block", "downsample", "head", "overhead")
ROW_KINDS = ("measured", "interpolated", "fitted")
DIGITS = 6
"""Decimals of a latency in the CSV: nanoseconds."""

RowKind = Literal["measured", "interpolated", "fitted"]


@dataclass(frozen=True)
class PriceRow:
    """The price of one component.

    Attributes:
        key: which component.
        latency_ms: its latency, above zero.
        spread_ms: interquartile range of `n` timings for a measured row; jackknife standard
            error of the price for a fitted one.
        n: number of timings, or of whole-network latencies behind the fit.
        kind: measured, interpolated or fitted.

    Raises:
        LatencyTableError: a price that is not finite and positive, a negative spread, no timings.
    """

    key: PriceKey
    latency_ms: float
    spread_ms: float
    n: int
    kind: RowKind

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_ms) and round(self.latency_ms, DIGITS) > 0):
            raise LatencyTableError(
                f"latency_ms: must be finite and at least a nanosecond, got {self.latency_ms!r}"
            )
        if not (math.isfinite(self.spread_ms) and self.spread_ms >= 0):
            raise LatencyTableError(
                f"spread_ms: must be finite and not negative, got {self.spread_ms!r}"
            )
        if self.n < 1:
            raise LatencyTableError(f"n: must be at least 1, got {self.n}")
        if self.kind not in ROW_KINDS:
            raise LatencyTableError(f"kind: must be one of {', '.join(ROW_KINDS)}")
        if self.key.component not in COMPONENTS:
            raise LatencyTableError(
                f"component: must be one of {', '.join(COMPONENTS)}, got {self.key.component!r}"
                + suggest(self.key.component, COMPONENTS)
            )


def rows_to_csv(rows: Iterable[PriceRow]) -> str:
    """Return the CSV text of `rows`; the same rows always give the same text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        key = row.key
        writer.writerow(
            (
                key.component,
                key.type,
                format_fields(key.fields),
                key.resolution,
                key.width_in,
                key.width_out,
                f"{row.latency_ms:.{DIGITS}f}",
                f"{row.spread_ms:.{DIGITS}f}",
                row.n,
                row.kind,
            )
        )
    return text.getvalue()


def parse_rows(text: str, source: str) -> tuple[PriceRow, ...]:
    """Read the rows of a table's CSV `text`; `source` names it in messages.

    Raises:
        LatencyTableError: one line with file and line: a missing column, a damaged or truncated
            line, a price that is not finite and positive, two rows for one component.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[PriceRow] = []
    first_line: dict[PriceKey, int] = {}
    try:
        header = next(reader, [])
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise LatencyTableError(f"column {missing[0]!r} is missing; need {','.join(COLUMNS)}")
        unknown = [name for name in header if name not in COLUMNS]
        if unknown or len(header) != len(COLUMNS):
            named = unknown[0] if unknown else "one given twice"
            raise LatencyTableError(f"unknown column {named!r}; need {','.join(COLUMNS)}")
        for cells in reader:
            if len(cells) != len(header):
                raise LatencyTableError(
                    f"must have {len(header)} values, has {len(cells)}; is the file truncated?"
                )
            row = _parse_row(dict(zip(header, cells, strict=True)))
            if row.key in first_line:
                raise LatencyTableError(
                    f"{row.key} is priced twice, first on line {first_line[row.key]}; keep one"
                )
            first_line[row.key] = reader.line_num
            rows.append(row)
    except (LatencyTableError, csv.Error) as error:
        raise LatencyTableError(f"{source}:{max(reader.line_num, 1)}: {error}") from error
    return tuple(rows)


def _parse_row(cells: Mapping[str, str]) -> PriceRow:
    key = PriceKey(
        component=cells["component"],
        type=cells["type"],
        fields=parse_fields(cells["fields"]),
        resolution=cells["resolution"],
        width_in=_number(int, cells, "width_in"),
        width_out=_number(int, cells, "width_out"),
    )
    kind: Any = cells["kind"]
    latency_ms = _number(float, cells, "latency_ms")
    spread_ms = _number(float, cells, "spread_ms")
    return PriceRow(key, latency_ms, spread_ms, _number(int, cells, "n"), kind)


def _number(kind: type[Any], cells: Mapping[str, str], name: str) -> Any:
    try:
        return kind(cells[name])
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise LatencyTableError(f"{name}: must be {what}, got {cells[name]!r}") from None
