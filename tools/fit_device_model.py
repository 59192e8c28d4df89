"""Fit the device model again and write the estimated latency tables.

    python tools/fit_device_model.py [FOLDER ...]

Reads `points.csv` and the description in `device.yaml`, writes `table.csv` and `device.yaml`.
The same points always give the same files. Without folders: every table in `lookup_tables/`
that has points.
"""

from __future__ import annotations

import sys
from pathlib import Path

from slimnas.latency.devices import provenance_line
from slimnas.latency.fit import POINTS_FILE, fit_table

TABLES = Path(__file__).resolve().parent.parent / "lookup_tables"


def main(arguments: list[str]) -> None:
    """Fit each folder given, or all of them."""
    folders = [Path(given) for given in arguments] or sorted(
        path.parent for path in TABLES.glob(f"*/{POINTS_FILE}")
    )
    for folder in folders:
        table = fit_table(folder)
        table.save(folder)
        sys.stdout.write(f"{provenance_line(table)}\n")
        for name, value in table.device.model.items():
            sys.stdout.write(f"  {name}: {value:g}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
