"""Times of single files, as other tools write them: CSV, Qualcomm AI Hub, ONNX Runtime, LiteRT.

What a file is follows from its content. Each result belongs to a network by its name: that of the
network's file in the kit, up to the first dot.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from slimnas.errors import LatencyTableError

PER_MS = {"latency_ms": 1.0, "latency_us": 1e-3, "latency_s": 1e3}
"""Milliseconds per unit of a CSV's column."""

KNOWN = (
    "a kit's results.jsonl, a CSV with the columns file and latency_ms (or latency_us, latency_s), "
    "a Qualcomm AI Hub profile (JSON), an ONNX Runtime profile (JSON), the output of "
    "onnxruntime_perf_test, or the output of LiteRT's benchmark_model"
)

_NUMBER = r"([0-9.eE+-]+|nan|-nan|inf)"
_LITERT_RUN = re.compile(
    rf"count=\d+ .*?avg={_NUMBER}(?:.*?median={_NUMBER})?|Inference \(avg\): {_NUMBER}"
)
_LITERT_GRAPH = re.compile(r"Graph: \[(.+?)\]")
_PERF_AVERAGE = re.compile(rf"Average inference time cost(?: total)?: {_NUMBER} ms")
_PERF_MEDIAN = re.compile(rf"P50 Latency(?: is|:) {_NUMBER} s")


@dataclass(frozen=True)
class FileTime:
    """One time of one network.

    Attributes:
        name: the network's, see `name_of`.
        latency_ms: how long one call took.
        where: file and line, for messages.
    """

    name: str
    latency_ms: float
    where: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_ms) and self.latency_ms > 0):
            raise LatencyTableError(
                f"{self.where}: the time of {self.name} must be a positive number, got "
                f"{self.latency_ms:g} ms; measure that file again"
            )


@dataclass(frozen=True)
class FileTimes:
    """What a tool wrote.

    Attributes:
        tool: `csv`, `qualcomm-ai-hub`, `onnxruntime` or `litert`.
        times: every time in it.
        notes: what a reader of the table should know.
    """

    tool: str
    times: tuple[FileTime, ...]
    notes: tuple[str, ...] = ()


def name_of(text: str) -> str:
    """A network's name: its file's without folder and without what begins at the first dot."""
    return PurePath(text.replace("\\", "/")).name.split(".", maxsplit=1)[0]


def read_file_times(text: str, source: str) -> FileTimes:
    """Read what another tool wrote; `source` names it in messages, and the network if need be.

    Raises:
        LatencyTableError: unknown, damaged, empty, or a time that is not positive and finite.
    """
    start = text.lstrip("\ufeff \r\n\t")
    first = start.splitlines()[0] if start else ""
    if start[:1] in ("{", "["):
        found = _json_times(start, source)
    elif "file" in _cells(first):
        found = FileTimes("csv", tuple(_csv_times(start, source)))
    elif _LITERT_RUN.search(text):
        found = FileTimes("litert", tuple(_litert_times(text, source)))
    elif _PERF_AVERAGE.search(text) or _PERF_MEDIAN.search(text):
        found = FileTimes("onnxruntime", tuple(_perf_times(text, source)))
    else:
        raise LatencyTableError(
            f"{source}: no latency results that slimnas knows; it reads {KNOWN}"
        )
    if not found.times:
        raise LatencyTableError(f"{source}: holds no times")
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split(",")]


def _csv_times(text: str, source: str) -> Iterator[FileTime]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [cell.strip() for cell in next(reader)]
        units = [name for name in PER_MS if name in header]
        if len(units) != 1 or header.count("file") != 1 or header.count(units[0]) != 1:
            raise LatencyTableError(
                f"{source}:1: must have one column file and one of {', '.join(PER_MS)}, which says "
                f"the unit; has {', '.join(header)}"
            )
        (unit,) = units
        for cells in reader:
            where = f"{source}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise LatencyTableError(
                    f"{where}: must have {len(header)} values, has {len(cells)}; is the file "
                    "truncated?"
                )
            row = dict(zip(header, cells, strict=True))
            value = _number(row[unit], where, unit)
            yield FileTime(name_of(row["file"]), value * PER_MS[unit], where)
    except csv.Error as error:
        raise LatencyTableError(f"{source}:{reader.line_num}: {error}") from error


def _litert_times(text: str, source: str) -> Iterator[FileTime]:
    """The last statistics of every run: those before are of the warm-up. In microseconds."""
    name, found = name_of(source), None
    runs: list[tuple[str, str, int]] = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        graph = _LITERT_GRAPH.search(line)
        if graph:
            name, found = name_of(graph.group(1)), None
        match = _LITERT_RUN.search(line)
        if match is None:
            continue
        average, middle, summary = match.groups()
        if summary is None:
            found = (name, middle or average, line_number)
        else:
            runs.append(found or (name, summary, line_number))
            found = None
    if found is not None:  # no summary: the last statistics are the run's
        runs.append(found)
    for name, value, line_number in runs:
        where = f"{source}:{line_number}"
        yield FileTime(name, _number(value, where, "the inference time") / 1e3, where)


def _perf_times(text: str, source: str) -> Iterator[FileTime]:
    """The median of every run where it is printed, else its average."""
    numbered = list(enumerate(text.splitlines(), start=1))
    medians = [(i, m.group(1)) for i, line in numbered if (m := _PERF_MEDIAN.search(line))]
    averages = [(i, m.group(1)) for i, line in numbered if (m := _PERF_AVERAGE.search(line))]
    chosen, factor = (medians, 1e3) if medians else (averages, 1.0)
    for line_number, value in chosen:
        where = f"{source}:{line_number}"
        yield FileTime(name_of(source), _number(value, where, "the latency") * factor, where)


def _json_times(text: str, source: str) -> FileTimes:
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise LatencyTableError(f"{source}: key {error} is given twice; keep one") from None
    except ValueError as error:
        raise LatencyTableError(f"{source}: not valid JSON ({error}); is it truncated?") from error
    if isinstance(data, list) and any(_is_run(event) for event in data):
        times = tuple(_ort_profile(data, source))
        note = "timed with ONNX Runtime's profiler on, which slows every operator a little"
        return FileTimes("onnxruntime", times, (note,))
    profiles = list(_profiles(data, name_of(source)))
    if not profiles:
        raise LatencyTableError(
            f"{source}: no latency results that slimnas knows; it reads {KNOWN}"
        )
    times = tuple(time for name, summary in profiles for time in _hub_times(name, summary, source))
    return FileTimes("qualcomm-ai-hub", times)


class _DuplicateKeyError(Exception):
    """A key that a JSON object has twice."""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(repr(key))
        found[key] = value
    return found


def _is_run(event: Any) -> bool:
    return isinstance(event, Mapping) and event.get("name") == "model_run" and "dur" in event


def _ort_profile(events: Sequence[Any], source: str) -> Iterator[FileTime]:
    """Runs of the whole model, in microseconds; the first one warms up."""
    runs = [event for event in events if _is_run(event)]
    for i, event in enumerate(runs[1:] or runs):
        where = f"{source}: run {i + 1}"
        yield FileTime(name_of(source), _number(event["dur"], where, "dur") / 1e3, where)


def _profiles(data: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and summaries of AI Hub profiles: one, a list of jobs, or a mapping by name."""
    if isinstance(data, list):
        for one in data:
            yield from _profiles(one, name)
    elif isinstance(data, Mapping):
        own = next((str(data[key]) for key in ("file", "model", "name") if key in data), name)
        if isinstance(data.get("execution_summary"), Mapping):
            yield name_of(own), data["execution_summary"]
        elif isinstance(data.get("profile"), Mapping):
            yield from _profiles({**data["profile"], "file": own}, own)
        else:
            for key, value in data.items():
                if isinstance(value, Mapping):
                    yield from _profiles({"file": key, **value}, key)


def _hub_times(name: str, summary: Mapping[str, Any], source: str) -> Iterator[FileTime]:
    """Every inference in microseconds, else AI Hub's own estimate."""
    values = summary.get("all_inference_times") or [summary.get("estimated_inference_time")]
    for value in values:
        yield FileTime(name, _number(value, source, f"the time of {name}") / 1e3, source)


def _number(value: Any, where: str, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LatencyTableError(f"{where}: {what} must be a number, got {value!r}") from None
