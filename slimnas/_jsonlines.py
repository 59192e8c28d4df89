"""Append-only files of JSON lines, whose last line a killed writer may have left torn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimnas.errors import SlimnasError


def whole_lines(path: Path, error_type: type[SlimnasError]) -> list[bytes]:
    """The lines that end in a line feed and, for the last one, are JSON; none of a missing file.

    Raises:
        error_type: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    if lines and (not lines[-1].endswith(b"\n") or parse_line(lines[-1]) is None):
        lines.pop()
    return lines


def parse_line(line: bytes) -> Any:
    """What a line holds; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def json_line(data: Mapping[str, Any]) -> bytes:
    """One line, line feed included."""
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"
