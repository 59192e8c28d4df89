"""What an analysis has finished: a file of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_bytes
from slimnas._jsonlines import json_line, parse_line, whole_lines
from slimnas._settings import flat_settings, shown_setting
from slimnas.errors import RunFolderError

SCHEMA = "slimnas/analysis-journal/1"


class Finished:
    """Results by key; each is on disk before the next is worked on.

    Args:
        path: the file; continued if it is there.
        settings: what every result depends on, as plain data; a file with others is refused.

    Raises:
        RunFolderError: a file of other settings, a damaged one, or one that cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._results: dict[str, Any] = {}
        first = json_line({"schema": SCHEMA, "settings": settings})
        whole = whole_lines(path, RunFolderError)
        if whole:
            _check(path, whole[0], json.loads(first)["settings"])
            for number, line in enumerate(whole[1:], start=2):
                key, result = _result(path, number, line)
                self._results[key] = result
        else:
            atomic_write_bytes(path, first)
            whole = [first]
        try:
            # What stands behind the last whole line is the start of one that was never finished.
            os.truncate(path, sum(len(line) for line in whole))
        except OSError as error:
            raise _cannot_write(path, error) from error

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> Any:
        """The result of that key; None if it is not finished."""
        return self._results.get(key)

    def number(self, key: str) -> float | None:
        """The result of that key, which is a number; None if it is not finished.

        Raises:
            RunFolderError: it is something else.
        """
        result = self.get(key)
        if result is None:
            return None
        if isinstance(result, bool) or not isinstance(result, (int, float)):
            raise RunFolderError(
                f"{self.path}: {key}: damaged, must be a number, got {result!r}; remove the file "
                "to start anew"
            )
        return float(result)

    def add(self, key: str, result: Any) -> Any:
        """Keep a result, plain data; it survives a kill from here on.

        Returns:
            The result, as a later run will read it.

        Raises:
            RunFolderError: the file cannot be written, such as a full disk.
        """
        line = json_line({"key": key, "result": result})
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._results[key] = json.loads(line)["result"]
        return self._results[key]


def _check(path: Path, line: bytes, wanted: Mapping[str, Any]) -> None:
    header = parse_line(line)
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path}:1: must begin with a {SCHEMA} header; remove the file to start anew"
        )
    before, now = flat_settings(header.get("settings") or {}), flat_settings(wanted)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise RunFolderError(
                f"{path}: belongs to a run with {key} {shown_setting(key, before)}, now it is "
                f"{shown_setting(key, now)}; give the same settings, or another --output"
            )


def _result(path: Path, number: int, line: bytes) -> tuple[str, Any]:
    found = parse_line(line)
    if not isinstance(found, dict) or not isinstance(found.get("key"), str):
        raise RunFolderError(f"{path}:{number}: damaged; remove the file to start anew")
    return found["key"], found.get("result")


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: cannot be written ({error.strerror or error}); "
        "free space or choose another place with --output"
    )
