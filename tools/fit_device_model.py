"""Fit the device models again and write the estimated latency tables.

    python tools/fit_device_model.py [FOLDER ...]

Reads `points.csv` and the description in `device.yaml`; writes `table.csv`, `device.yaml`,
`leave_one_out.csv` and `points.csv`. The same points always give the same files. Without folders:
every table in `lookup_tables/` that has points, a table after the one it is held to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from slimnas.latency.devices import provenance_line
from slimnas.latency.fit import refit, save_fitted
from slimnas.latency.points import POINTS_FILE
from slimnas.latency.table import DEVICE_FILE

TABLES = Path(__file__).resolve().parent.parent / "lookup_tables"


def main(arguments: list[str]) -> None:
    """Fit each folder given, or all of them."""
    folders = [Path(given) for given in arguments] or [
        path.parent for path in TABLES.glob(f"*/{POINTS_FILE}")
    ]
    for folder in sorted(folders, key=lambda folder: (_has_prior(folder), folder)):
        table, fit = refit(folder)
        save_fitted(table, fit, folder)
        sys.stdout.write(f"{provenance_line(table)}\n")
        for name, value in table.device.model.items():
            sys.stdout.write(f"  {name}: {value:g}\n")


def _has_prior(folder: Path) -> bool:
    described = yaml.safe_load((folder / DEVICE_FILE).read_text(encoding="utf-8"))
    return bool(described["fit"].get("prior"))


if __name__ == "__main__":
    main(sys.argv[1:])
