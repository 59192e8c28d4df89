"""The journal of a build: one JSON line per visited entry, safe against being killed."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_bytes
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas.errors import LatencyTableError, RunFolderError
from slimnas.measure.timing import Round

SCHEMA = "slimnas/latency-journal/1"
LONGEST = 80
"""Characters of a value that a message still shows."""
DIGITS = 6
"""Decimals of a sample in milliseconds: nanoseconds."""


@dataclass(frozen=True)
class Visit:
    """One entry's rounds in one pass.

    Attributes:
        entry: its name.
        number: the pass.
        rounds: in the order they were made.
        load: load average of the last minute, where it is known.
        celsius: temperature of the hottest sensor, where there is one.
    """

    entry: str
    number: int
    rounds: tuple[Round, ...]
    load: float | None = None
    celsius: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for one line of the journal."""
        rounds = [
            {
                "accepted": one.accepted,
                "reference_ms": _rounded(one.reference_ms),
                "samples_ms": [_rounded(samples) for samples in one.samples_ms],
            }
            for one in self.rounds
        ]
        known = {"load": self.load, "celsius": self.celsius}
        state = {name: round(value, 2) for name, value in known.items() if value is not None}
        return {"entry": self.entry, "pass": self.number, **state, "rounds": rounds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Visit:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        rounds = tuple(
            Round(
                (float(one["reference_ms"][0]), float(one["reference_ms"][1])),
                tuple(tuple(float(ms) for ms in samples) for samples in one["samples_ms"]),
                bool(one["accepted"]),
            )
            for one in data["rounds"]
        )
        state = {name: float(data[name]) for name in ("load", "celsius") if name in data}
        return cls(str(data["entry"]), int(data["pass"]), rounds, **state)


class Journal:
    """What a build has timed so far; every visit is on disk before the next begins.

    Args:
        path: the file; continued if it is there.
        header: what the visits belong to; a file with another one is refused.

    Raises:
        LatencyTableError: a journal of something else, or a damaged one.
        RunFolderError: the file cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.visits: list[Visit] = []
        first = json_line({"schema": SCHEMA, **header})
        whole = whole_lines(path, LatencyTableError)
        if whole:
            _check(path, json.loads(first), whole[0])
            self.visits = _visits(path, whole)
        else:
            atomic_write_bytes(path, first)
            whole = [first]
        try:
            # What stands behind the last whole line is the start of one that was never finished.
            os.truncate(path, sum(len(line) for line in whole))
        except OSError as error:
            raise _cannot_write(path, error) from error

    @staticmethod
    def lines(header: Mapping[str, Any], visits: Iterable[Visit]) -> bytes:
        """Return a journal's text."""
        documents = ({"schema": SCHEMA, **header}, *(visit.to_dict() for visit in visits))
        return b"".join(map(json_line, documents))

    def append(self, visit: Visit) -> None:
        """Add `visit`, rounded as the file has it; it survives a kill and a power cut from here on.

        Raises:
            RunFolderError: the file cannot be written, such as a full disk.
        """
        try:
            with self.path.open("ab") as file:
                file.write(json_line(visit.to_dict()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.visits.append(Visit.from_dict(visit.to_dict()))


def read_journal(path: Path) -> tuple[dict[str, Any], list[Visit]]:
    """Read the header and the visits of a journal, or of the samples beside a finished table.

    Raises:
        LatencyTableError: no file, no journal, or a damaged line.
    """
    if path.suffix == ".gz":
        try:
            whole = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        except (OSError, EOFError, zlib.error) as error:
            raise LatencyTableError(
                f"{path}: must hold a build's samples ({error}); measure the table anew"
            ) from error
    else:
        whole = whole_lines(path, LatencyTableError)
    if not whole:
        raise LatencyTableError(f"{path}: no build's journal there; begin one with latency build")
    header = _header(path, whole[0])
    return {name: value for name, value in header.items() if name != "schema"}, _visits(path, whole)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Name the first thing that two headers do not have in common; none if they agree."""
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            return f"its {key} is {_difference(found.get(key), wanted.get(key))}"
    return None


def _header(path: Path, line: bytes) -> dict[str, Any]:
    found = parse_line(line)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise LatencyTableError(
            f"{path}:1: must begin with a {SCHEMA} header; remove the file to start anew"
        )
    return found


def _check(path: Path, wanted: dict[str, Any], line: bytes) -> None:
    other = difference(_header(path, line), wanted)
    if other is not None:
        raise LatencyTableError(
            f"{path}: belongs to another build: {other}; repeat that command to "
            "finish it, choose another --output, or remove the file"
        )


def _visits(path: Path, lines: Sequence[bytes]) -> list[Visit]:
    found = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            found.append(Visit.from_dict(parse_line(line)))
        except (KeyError, TypeError, ValueError, IndexError):
            raise LatencyTableError(
                f"{path}:{number}: damaged line; remove the file to start anew"
            ) from None
    return found


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, DIGITS) for value in values]


def _difference(found: Any, wanted: Any) -> str:
    """Name what differs, inside a mapping by its first key that does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return f"{key} {_short(found.get(key))}, not {_short(wanted.get(key))}"
    return f"{_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= LONGEST:
        return text
    return f"another one (digest {sha256(text.encode()).hexdigest()[:8]})"


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: cannot be written ({error.strerror or error}); free space and start the same "
        "command again, or choose another place with --output"
    )
