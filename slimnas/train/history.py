"""What a run was at the end of each epoch: one JSON line each, in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from slimnas._files import atomic_write_text
from slimnas._jsonlines import parse_line
from slimnas.errors import RunFolderError

FILE = "metrics.jsonl"

Row: TypeAlias = "Mapping[str, float | None]"
"""Name -> number; `step` is always there, others may be None or missing."""


def read_history(path: Path) -> tuple[Row, ...]:
    """The epochs so far; none of a missing file.

    Raises:
        RunFolderError: the file cannot be read, or a line holds something else.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from error
    rows = [parse_line(line) for line in lines]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise RunFolderError(f"{path}: line {number} is no epoch of a run; delete the file")
    return tuple(rows)


def append_row(path: Path, row: Row) -> tuple[Row, ...]:
    """Add an epoch; epochs of an interrupted stretch that is repeated are replaced.

    Numbers that are not finite become None.

    Returns:
        All rows.

    Raises:
        RunFolderError: the file is damaged or cannot be written.
    """
    step = row["step"]
    assert step is not None
    plain = {k: None if v is None or not math.isfinite(v) else v for k, v in row.items()}
    kept = [old for old in read_history(path) if (old["step"] or 0) < step]
    rows = (*kept, plain)
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in rows))
    return rows
