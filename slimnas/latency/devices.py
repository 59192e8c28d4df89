"""Finds latency tables by name: a folder, the user's own, then the shipped ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from slimnas._resources import data_dir
from slimnas.errors import LatencyTableError, suggest
from slimnas.latency.table import DEVICE_FILE, DEVICE_NAME, LatencyTable

VARIABLE = "SLIMNAS_LOOKUP_TABLES"
LOCAL_FOLDER = "lookup_tables"


def table_folders() -> tuple[Path, ...]:
    """Folders that hold tables, first match first: `$SLIMNAS_LOOKUP_TABLES` (or
    `./lookup_tables` when it is not set), then the shipped ones.
    """
    given = os.environ.get(VARIABLE)
    users = [Path(part) for part in given.split(os.pathsep) if part] if given else []
    return (*(users or [Path(LOCAL_FOLDER)]), data_dir("lookup_tables"))


def known_devices(folders: Sequence[Path] | None = None) -> Mapping[str, Path]:
    """Return the folder of every table that can be found, by name, in alphabetical order."""
    found: dict[str, Path] = {}
    for folder in table_folders() if folders is None else folders:
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (path / DEVICE_FILE).is_file():
                    found.setdefault(path.name, path)
    return dict(sorted(found.items()))


def find_device(name: str, folders: Sequence[Path] | None = None) -> LatencyTable:
    """Load the table called `name`.

    Args:
        name: a table's name, or the path of a table's folder.
        folders: where to look; by default `table_folders()`.

    Raises:
        LatencyTableError: no such device (the known ones are listed), or a damaged table.
    """
    as_path = Path(name)
    if (as_path / DEVICE_FILE).is_file():
        return LatencyTable.load(as_path)
    known = known_devices(folders)
    if name in known:
        return LatencyTable.load(known[name])
    if as_path.is_dir() or as_path.name != name:
        raise LatencyTableError(
            f"{name}: no {DEVICE_FILE} there; give a latency table's folder or one of: "
            + ", ".join(known)
        )
    raise LatencyTableError(
        f"no latency table for device {name!r}{suggest(name, known)}; known devices: "
        f"{', '.join(known) or 'none'}; measure one with 'slimnas latency build --device NAME'"
    )


def require_device_name(name: str) -> None:
    """Refuse a name that no device can have.

    Raises:
        LatencyTableError: it is not a word of letters, digits, '.', '_' and '-'.
    """
    if not re.fullmatch(DEVICE_NAME, name):
        raise LatencyTableError(
            "a device's name, which its table's folder has, must be letters, digits, '.', '_' "
            f"and '-', got {name!r}"
        )


def refuse_taken(output: Path, kind: str, *, force: bool) -> None:
    """Refuse to write a table where it would replace or hide what it must not.

    Args:
        output: the table's folder; its name is the device's.
        kind: of the new table.
        force: replace a finished table of the same kind there.

    Raises:
        LatencyTableError: the name is no device's, a table of another kind has it, here or among
            the known ones, or a finished table is there and `force` is off.
    """
    name = output.name
    require_device_name(name)
    # A table of that name elsewhere would be hidden by this one, or hide it.
    for folder in (output, known_devices().get(name, output)):
        if (folder / DEVICE_FILE).is_file():
            known = LatencyTable.load(folder).device
            if known.kind != kind:
                raise LatencyTableError(
                    f"{name}: is the {known.kind} table of {known.device} in {folder}; "
                    "choose another name with --device or --output"
                )
    if (output / DEVICE_FILE).is_file() and not force:
        raise LatencyTableError(
            f"{output}: holds a finished {kind} table of {LatencyTable.load(output).device.date}; "
            "choose another --output, or replace it with --force"
        )


def provenance_line(table: LatencyTable) -> str:
    """Say in one line what a table's numbers are; every command that uses a table prints it."""
    device = table.device
    runtime = f"{device.runtime.name} {device.runtime.version}".removesuffix(" unknown")
    parts = [
        f"{device.name} ({device.kind}): {device.device}, {device.os}, {runtime}, "
        f"{device.compute_unit}, {device.dtype}, batch {device.batch}"
    ]
    parts += [figure.words for figure in device.errors]
    if not device.errors:
        parts.append("no held-out error known")
    return "; ".join(parts)
