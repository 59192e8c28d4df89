"""slimnas: vision transformers that run in N milliseconds on your device.

The public names are resolved when they are first used, so that `import slimnas` is fast and
only what needs torch imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimnas import convert
    from slimnas.arch.architecture import Architecture
    from slimnas.arch.cost import cost
    from slimnas.arch.space import SearchSpace, Selection
    from slimnas.data.splits import open_data
    from slimnas.errors import SlimnasError
    from slimnas.latency.devices import find_device
    from slimnas.latency.estimate import estimate
    from slimnas.latency.table import LatencyTable
    from slimnas.nn.build import build, build_features
    from slimnas.search.run import run_search
    from slimnas.supernet.supernet import Supernet
    from slimnas.zoo.create import create_model
    from slimnas.zoo.export import export_network

__version__ = "0.1.0"

_HOME = {
    "Architecture": "arch.architecture",
    "LatencyTable": "latency.table",
    "SearchSpace": "arch.space",
    "Selection": "arch.space",
    "SlimnasError": "errors",
    "Supernet": "supernet.supernet",
    "build": "nn.build",
    "build_features": "nn.build",
    "cost": "arch.cost",
    "create_model": "zoo.create",
    "estimate": "latency.estimate",
    "export_network": "zoo.export",
    "find_device": "latency.devices",
    "open_data": "data.splits",
    "run_search": "search.run",
}

__all__ = [
    "Architecture",
    "LatencyTable",
    "SearchSpace",
    "Selection",
    "SlimnasError",
    "Supernet",
    "build",
    "build_features",
    "convert",
    "cost",
    "create_model",
    "estimate",
    "export_network",
    "find_device",
    "open_data",
    "run_search",
]


_MODULES = ("convert", "integrations")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
