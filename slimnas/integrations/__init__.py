"""slimnas's models in other libraries; each module says how."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("timm",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
