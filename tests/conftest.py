"""Lets the tests import timm, their reference, beside a CPU-only torch."""

from __future__ import annotations

import importlib
import os

# Before torch loads OpenMP: tests run beside each other, and spinning threads starve them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

_KEPT_ALIVE: list[torch.library.Library] = []


def _let_torchvision_import() -> None:
    """Declare two operators whose compiled half needs CUDA; timm imports torchvision."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not installed
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT_ALIVE.append(library)


_let_torchvision_import()
