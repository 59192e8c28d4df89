"""Images to train, search and test on.

`open_data` is the door for a search, `open_training` for training; `load_source` (what `--data`
names) does not import torch, so names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimnas.data.batches import WHOLE, ImageSet, Part, Split, TrainSource
    from slimnas.data.crop import CropPolicy
    from slimnas.data.load import load_source
    from slimnas.data.sources import Source
    from slimnas.data.splits import DataOptions, DataSplits, SearchData, open_data, split_source
    from slimnas.data.stream_source import StreamOptions
    from slimnas.data.streaming import StreamedImages
    from slimnas.data.training import TrainingData, open_training, require_full_batch
    from slimnas.data.whole import WholeData, open_whole

_HOME = {
    "WHOLE": "batches",
    "CropPolicy": "crop",
    "DataOptions": "splits",
    "DataSplits": "splits",
    "ImageSet": "batches",
    "Part": "batches",
    "SearchData": "splits",
    "Source": "sources",
    "Split": "batches",
    "StreamOptions": "stream_source",
    "StreamedImages": "streaming",
    "TrainSource": "batches",
    "TrainingData": "training",
    "WholeData": "whole",
    "load_source": "load",
    "open_data": "splits",
    "open_training": "training",
    "open_whole": "whole",
    "require_full_batch": "training",
    "split_source": "splits",
}

__all__ = [
    "WHOLE",
    "CropPolicy",
    "DataOptions",
    "DataSplits",
    "ImageSet",
    "Part",
    "SearchData",
    "Source",
    "Split",
    "StreamOptions",
    "StreamedImages",
    "TrainSource",
    "TrainingData",
    "WholeData",
    "load_source",
    "open_data",
    "open_training",
    "open_whole",
    "require_full_batch",
    "split_source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
