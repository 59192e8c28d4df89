"""Images to train, search and test on.

`open_data` is the door; `load_source` (what `--data` names) does not import torch, so names
are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimnas.data.batches import ImageSet, Split
    from slimnas.data.load import load_source
    from slimnas.data.sources import Source
    from slimnas.data.splits import DataOptions, DataSplits, SearchData, open_data, split_source
    from slimnas.data.whole import WholeData, open_whole

_HOME = {
    "DataOptions": "splits",
    "DataSplits": "splits",
    "ImageSet": "batches",
    "SearchData": "splits",
    "Source": "sources",
    "Split": "batches",
    "WholeData": "whole",
    "load_source": "load",
    "open_data": "splits",
    "open_whole": "whole",
    "split_source": "splits",
}

__all__ = [
    "DataOptions",
    "DataSplits",
    "ImageSet",
    "SearchData",
    "Source",
    "Split",
    "WholeData",
    "load_source",
    "open_data",
    "open_whole",
    "split_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
