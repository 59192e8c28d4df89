"""Files of an analysis: one JSON object, and rows as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimnas._files import atomic_write_text


def write_json(path: Path, document: Mapping[str, Any]) -> Path:
    """Write one JSON object, atomically; returns `path`.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    atomic_write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, atomically; returns `path`.

    There is a column for every key of any row, in the order they first come. A cell is empty where
    a row has none or None; lists are written with spaces between their items.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    atomic_write_text(path, text.getvalue())
    return path


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
