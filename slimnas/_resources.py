"""Finds the data folders `search_spaces/` and `lookup_tables/` in a wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Return the folder of shipped data called `name`.

    Found by path, not by `importlib.resources`, which fails in editable installs.

    Raises:
        FileNotFoundError: the installation lacks the folder.
    """
    shipped = _PACKAGE / "_data" / name
    if shipped.is_dir():
        return shipped
    checkout = _PACKAGE.parent
    if (checkout / "setup.cfg").is_file() and (checkout / name).is_dir():
        return checkout / name
    raise FileNotFoundError(
        f"slimnas data folder {name!r} is missing: neither {shipped} nor {checkout / name} exists"
    )
