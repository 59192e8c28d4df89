"""Weights in and out: safetensors, tied to their architecture by its digest."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slimnas
from slimnas.arch.architecture import Architecture
from slimnas.errors import WeightsError
from slimnas.nn.tensorfiles import load_tensors, save_tensors
from slimnas.zoo.convert import convert_state_dict
from slimnas.zoo.state import check_state

SCHEMA = "slimnas/weights/1"
_PICKLED = {".pt", ".pth", ".bin"}
_HALVES = (torch.float16, torch.bfloat16)
_WRAPPERS = ("model", "state_dict")
_LEAKS = (
    *(OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, struct.error, pickle.UnpicklingError),
)
"""What torch.load lets through of files that are no checkpoints: text, other pickles, cut ones."""


def save_weights(path: str | Path, state: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Write `state`, the weights of `architecture`, atomically.

    Raises:
        WeightsError: the tensors are not those of `architecture`.
        RunFolderError: the place cannot be written.
    """
    checked = check_state(state, architecture, source="weights to save")
    made = {"schema": SCHEMA, "architecture": architecture.digest, "version": slimnas.__version__}
    save_tensors(path, checked, made)


def load_weights(path: str | Path, architecture: Architecture) -> dict[str, Tensor]:
    """Read the weights of `architecture` from a file of ours or in a layout of others.

    See `slimnas.zoo.convert`.

    Returns:
        Tensors on the CPU under the names of `build(architecture).state_dict()`; what is stored in
        half precision comes in single precision.

    Raises:
        WeightsError: the file is missing, damaged, or holds the weights of something else.
    """
    path = Path(path)
    state, made = _read(path)
    digest = made.get("architecture")
    if digest is not None and digest != architecture.digest:
        raise WeightsError(
            f"{path}: saved for another architecture (digest {digest[:12]}) than "
            f"{architecture.name} (digest {architecture.digest[:12]}); use the architecture.yaml "
            "that lies beside it"
        )
    whole = {
        name: value.float() if value.dtype in _HALVES else value for name, value in state.items()
    }
    return convert_state_dict(whole, architecture, source=str(path))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights (.safetensors or .pth)")
    if path.suffix not in _PICKLED:
        return load_tensors(path, "weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle; it loads, or it fails
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _LEAKS as error:
        raise WeightsError(
            f"{path}: cannot be read as weights ({_line(error)}); expected a checkpoint that "
            "torch.save wrote"
        ) from error
    return _unwrapped(loaded, path), {}


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, which training scripts wrap in a dict of their own."""
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise WeightsError(f"{path}: must hold a dict of tensors, or one under 'model'")
    return dict(loaded)


def _line(error: Exception) -> str:
    kind = type(error).__name__
    speaks = isinstance(error, (OSError, RuntimeError, pickle.UnpicklingError))
    return (str(error).splitlines() or [kind])[0] if speaks else kind
