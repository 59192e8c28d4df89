"""The whole state of a training run in one safetensors file.

One file, replaced atomically, so that weights, averaged weights, optimiser state and position
always belong together, however a run was stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimnas.errors import RunFolderError, WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors, tensors_digest

SCHEMA = "slimnas/training-state/1"
WHAT = "the state of a training run"


@dataclass
class TrainState:
    """What changes while training; everything else follows from recipe, data and seed.

    Attributes:
        model: the module being trained.
        ema: a module of the same shape with the averaged weights.
        optimizer: its parameter groups hold the model's parameters.
        runner: what a step calls: the model, or a wrapper of it; not saved.
        step: optimiser steps done.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    runner: nn.Module
    step: int = 0


def save_state(path: Path, state: TrainState, identity: str) -> None:
    """Write `state` atomically.

    Args:
        path: the file.
        state: the run's state.
        identity: digest of everything that must be equal for another run to go on from it.

    Raises:
        RunFolderError: the place cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", state.model), ("ema", state.ema)):
        tensors.update({f"{prefix}.{name}": value for name, value in module.state_dict().items()})
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
    metadata = {
        "schema": SCHEMA,
        "identity": identity,
        "step": state.step,
        "digest": tensors_digest(tensors),
    }
    save_tensors(path, tensors, metadata)


def load_state(path: Path, state: TrainState, identity: str) -> None:
    """Put a saved state into `state`.

    Raises:
        WeightsError: the file is damaged, or belongs to a run with other settings or data.
    """
    tensors, metadata = load_tensors(path, WHAT)
    if metadata.get("schema") != SCHEMA:
        raise WeightsError(
            f"{path}: schema: must be {SCHEMA!r}, got {metadata.get('schema')!r}; expected {WHAT}"
        )
    if metadata.get("identity") != identity:
        raise WeightsError(
            f"{path}: belongs to a run with other settings, data or seed; "
            "give the same ones, or another --output"
        )
    if metadata.get("digest") != tensors_digest(tensors):
        raise WeightsError(
            f"{path}: damaged, its contents do not match its digest; delete it to train again"
        )
    groups = _by_prefix(tensors)
    try:
        state.model.load_state_dict(groups.get("model", {}))
        state.ema.load_state_dict(groups.get("ema", {}))
        state.optimizer.load_state_dict(
            {
                "state": _optimizer_state(groups.get("optimizer", {})),
                "param_groups": state.optimizer.state_dict()["param_groups"],
            }
        )
        _lay_out_alike(state.optimizer)
        state.step = int(metadata["step"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise WeightsError(f"{path}: does not fit this run ({first}); delete it") from error


def require_space_on_disk(folder: Path, module: nn.Module, *, besides: int = 0) -> None:
    """Refuse a disk that a training of `module` would fill.

    A checkpoint holds weights, their average and two moments, and is written beside the old one.

    Args:
        folder: of the run; it need not be there yet.
        module: what is trained.
        besides: other files of the run as large as the weights.

    Raises:
        RunFolderError: says how much is needed, and how much there is.
    """
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    needed, free = (2 * 4 + besides) * weights, shutil.disk_usage(there).free
    if free < needed:
        raise RunFolderError(
            f"{folder}: training needs {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free; "
            "free some, or give another --output"
        )


def _lay_out_alike(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their parameters, which files do not keep.

    Fused AdamW takes it for granted: channels-last parameters would get moments of other elements.
    """
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        groups.setdefault(prefix, {})[rest] = tensor
    return groups


def _optimizer_state(tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return state
