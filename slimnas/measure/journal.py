"""The journal of a build: one JSON line per visited entry, safe against being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_bytes
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas.errors import LatencyTableError, RunFolderError
from slimnas.measure.timing import Round

SCHEMA = "slimnas/latency-journal/1"
DIGITS = 6
"""Decimals of a sample in milliseconds: nanoseconds."""


@dataclass(frozen=True)
class Visit:
    """One entry's rounds in one pass."""

    entry: str
    number: int
    rounds: tuple[Round, ...]

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
        return {"entry": self.entry, "pass": self.number, "rounds": rounds}

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
        return cls(str(data["entry"]), int(data["pass"]), rounds)


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
            self._check(json.loads(first), whole[0])
            self.visits = [self._visit(i, line) for i, line in enumerate(whole[1:], start=2)]
        else:
            atomic_write_bytes(path, first)
            whole = [first]
        try:
            # What stands behind the last whole line is the start of one that was never finished.
            os.truncate(path, sum(len(line) for line in whole))
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, visit: Visit) -> None:
        """Add `visit`; it survives a kill and a power cut from here on.

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
        self.visits.append(visit)

    def _check(self, wanted: dict[str, Any], line: bytes) -> None:
        found = parse_line(line)
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise LatencyTableError(
                f"{self.path}:1: must begin with a {SCHEMA} header; remove the file to start anew"
            )
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise LatencyTableError(
                    f"{self.path}: belongs to another build: its {key} is "
                    f"{_difference(found.get(key), wanted.get(key))}; repeat that command to "
                    "finish it, choose another --output, or remove the file"
                )

    def _visit(self, number: int, line: bytes) -> Visit:
        try:
            return Visit.from_dict(parse_line(line))
        except (KeyError, TypeError, ValueError, IndexError):
            raise LatencyTableError(
                f"{self.path}:{number}: damaged line; remove the file to start anew"
            ) from None


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, DIGITS) for value in values]


def _difference(found: Any, wanted: Any) -> str:
    """Name what differs, inside a mapping by its first key that does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return f"{key} {found.get(key)!r}, not {wanted.get(key)!r}"
    return f"{found!r}, not {wanted!r}"


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: cannot be written ({error.strerror or error}); free space and start the same "
        "command again, or choose another place with --output"
    )
