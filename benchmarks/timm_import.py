"""Lets timm be imported beside a CPU-only torch: call `let_timm_import` before importing it."""

from __future__ import annotations

import functools
import importlib

import torch


@functools.cache  # what it returns must live as long as the process
def let_timm_import() -> torch.library.Library | None:
    """Declare two operators whose compiled half needs CUDA; timm imports torchvision.

    Nothing is declared where torchvision imports, or is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
