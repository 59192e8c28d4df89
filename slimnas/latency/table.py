"""`LatencyTable`: what each component costs on one device, and where the numbers come from.

A table is a folder with two files. `device.yaml` says which device, runtime and protocol, whether
the prices were measured or estimated, and how far off they are. `table.csv` has one row per
priced component.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from slimnas._files import atomic_write_text, read_text
from slimnas.arch.documents import Spec, load_document, parse_spec
from slimnas.errors import LatencyTableError, SpecError
from slimnas.latency.keys import PriceKey
from slimnas.latency.prices import PriceBook
from slimnas.latency.rows import PriceRow, parse_rows, rows_to_csv

SCHEMA = "slimnas/latency-table/1"
WHAT = "a latency table's device.yaml"
LEVEL = 0.9
"""Share of networks that a stated interval is meant to hold."""

DEVICE_FILE = "device.yaml"
TABLE_FILE = "table.csv"

DEVICE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a device may be called: a word that a folder can have."""

Share = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0)]


class RuntimeInfo(Spec):
    """The inference runtime the prices hold for; `version` is `unknown` where nobody says."""

    name: str
    version: str


class ErrorFigure(Spec):
    """How far estimates were from whole-network latencies the table had not seen.

    Attributes:
        what: which networks, and how they were held out.
        networks: how many.
        mape_percent: mean absolute relative error.
        bias_percent: mean signed relative error, estimate over truth minus one.
        max_percent: largest absolute relative error.
        median_percent: median absolute relative error, where known.
        within_5_percent: percentage of the networks within 5 % of the truth, where known.
        within_10_percent: the same for 10 %.
        coverage_percent: percentage inside the intervals of their estimates, where known.
        spearman: rank correlation, where it was computed.
    """

    what: str
    networks: Annotated[int, Field(ge=1)]
    mape_percent: Percent
    bias_percent: float
    max_percent: Percent
    median_percent: Percent | None = None
    within_5_percent: Percent | None = None
    within_10_percent: Percent | None = None
    coverage_percent: Percent | None = None
    spearman: Annotated[float, Field(ge=-1, le=1)] | None = None

    @property
    def words(self) -> str:
        """Everything that is known, in words; what every use of the table prints."""
        known = [
            (self.mape_percent, "mean error {:.1f} %"),
            (self.median_percent, "median {:.1f} %"),
            (self.max_percent, "worst {:.1f} %"),
            (self.bias_percent, "bias {:+.1f} %"),
            (self.within_5_percent, "{:.0f} % within 5 %"),
            (self.within_10_percent, "{:.0f} % within 10 %"),
            (self.coverage_percent, "{:.0f} % in their intervals"),
            (self.spearman, "rank correlation {:.3f}"),
        ]
        said = ", ".join(text.format(value) for value, text in known if value is not None)
        return f"{self.what}: {said} (n = {self.networks})"


class IntervalInfo(Spec):
    """Relative interval around an estimated total.

    Attributes:
        level: share of networks whose true latency the interval is meant to hold.
        low_percent: how far below the estimate it reaches.
        high_percent: how far above.
        basis: what it was computed from.
    """

    level: Share
    low_percent: Annotated[float, Field(ge=0, lt=100)]
    high_percent: Percent
    basis: str

    @classmethod
    def conformal(cls, errors: Sequence[float], what: str, *, digits: int = 3) -> IntervalInfo:
        """Interval from the errors of estimates of networks that the prices had not seen.

        Its half-width is the split-conformal quantile of their sizes: the
        ceil((n + 1) x `LEVEL`)-th smallest, the largest where n is too small for the level, and
        the level is then n / (n + 1).

        Args:
            errors: latency / estimate - 1; at least one.
            what: what they are, for `basis`.
            digits: of the percentages.
        """
        sizes = sorted(map(abs, errors))
        count = len(sizes)
        rank = min(math.ceil((count + 1) * LEVEL - 1e-9), count)
        half = round(100 * sizes[rank - 1], digits)
        return cls(
            level=round(min(LEVEL, count / (count + 1)), 3),
            low_percent=min(half, 99.9),
            high_percent=half,
            basis=f"the {rank}-th smallest of {count} {what}",
        )


class FitInfo(Spec):
    """How the device model of an estimated table was fitted, beside the points themselves.

    Attributes:
        model: which device model, a key of `slimnas.latency.device_model.MODELS`.
        peak_gmacs_per_s: stated peak rate of the chip; no multiply-add is priced below it.
        prior: the table whose coefficients, times one factor that makes them fit the points best,
            those of this one are held to; empty for none.
        strength: how strongly. A coefficient twice its prior costs as much as one point off by
            the square root of this.
        held_to: the prior's coefficients.
    """

    model: str
    peak_gmacs_per_s: Annotated[float, Field(gt=0)] | None = None
    prior: str = ""
    strength: Annotated[float, Field(ge=0)] = 0.0
    held_to: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class DeviceInfo(Spec):
    """Which device a table is about, and how far it can be trusted.

    Attributes:
        name: the name given to `--device`; the folder's name.
        device: the device in words.
        threads: CPU threads, or none where the runtime decides.
        protocol: how a latency was taken.
        reference_ms: latency of the build's reference network, which tells a later measurement
            how fast the device is then.
        kind: measured here, estimated from a model, or imported from another tool.
        errors: error figures on held-out networks, the most relevant first.
        interval: the relative interval of a total.
        fit: how the device model of an estimated table was fitted.
        model: the coefficients of that model, by feature.
    """

    name: Annotated[str, Field(pattern=f"^{DEVICE_NAME}$")]
    device: str
    soc: str
    os: str
    runtime: RuntimeInfo
    compute_unit: str
    dtype: str
    batch: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    protocol: str
    date: str
    tool_version: str
    kind: Literal["measured", "estimated", "imported"]
    reference_ms: Annotated[float, Field(gt=0)] | None = None
    errors: tuple[ErrorFigure, ...] = ()
    interval: IntervalInfo | None = None
    fit: FitInfo | None = None
    model: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _estimates_state_their_error(self) -> DeviceInfo:
        if self.kind == "estimated" and not (self.errors and self.interval):
            raise ValueError("kind: an estimated table must state errors and interval")
        return self


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Prices of components on one device. Immutable: lookups may be cached on it.

    Attributes:
        device: the device and the table's provenance.
        rows: the prices, one per key.
        source: the folder it was read from, empty for a table made in memory.

    Raises:
        LatencyTableError: no rows, or two rows with one key.
    """

    device: DeviceInfo
    rows: tuple[PriceRow, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise LatencyTableError(f"{self.device.name}: a latency table needs at least one row")
        seen = set()
        for row in self.rows:
            if row.key in seen:
                raise LatencyTableError(f"{self.device.name}: two rows for {row.key}; keep one")
            seen.add(row.key)

    @cached_property
    def by_key(self) -> Mapping[PriceKey, PriceRow]:
        """Every row by its key."""
        return {row.key: row for row in self.rows}

    @cached_property
    def prices(self) -> PriceBook:
        """Prices of components, between the rows too; what was asked once is remembered."""
        return PriceBook(self.by_key)

    @classmethod
    def load(cls, folder: str | Path) -> LatencyTable:
        """Read a table's folder.

        Raises:
            LatencyTableError: a file is missing, damaged or truncated, or a row is not
                positive and finite; one line with file and line or key.
        """
        folder = Path(folder)
        device, count = _load_device(folder / DEVICE_FILE)
        path = folder / TABLE_FILE
        rows = parse_rows(read_text(path, LatencyTableError, "a latency table's rows"), str(path))
        if len(rows) != count:
            raise LatencyTableError(
                f"{path}: must have the {count} rows {DEVICE_FILE} states, has {len(rows)}; "
                "the file is truncated or belongs to another table"
            )
        return cls(device, rows, str(folder))

    def save(self, folder: str | Path) -> None:
        """Write both files, each atomically, `device.yaml` last.

        Raises:
            RunFolderError: the place cannot be written.
        """
        folder = Path(folder)
        atomic_write_text(folder / TABLE_FILE, rows_to_csv(self.rows))
        body = self.device.model_dump(mode="json", exclude_none=True)
        document = {"schema": SCHEMA, **body, "rows": len(self.rows)}
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=False, width=100)
        atomic_write_text(folder / DEVICE_FILE, text)


def _load_device(path: Path) -> tuple[DeviceInfo, int]:
    try:
        data = load_document(path, SCHEMA, WHAT)
        count = data.pop("rows", None)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise SpecError(f"{path}: rows: must be the number of rows of {TABLE_FILE}")
        return parse_spec(DeviceInfo, data, source=str(path)), count
    except SpecError as error:
        raise LatencyTableError(str(error)) from error
