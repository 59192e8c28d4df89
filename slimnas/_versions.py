"""Versions of what a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import slimnas

_PACKAGES = ("torch", "numpy", "scipy", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Name -> version of slimnas, Python and the libraries that decide results."""
    found = {"slimnas": slimnas.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
