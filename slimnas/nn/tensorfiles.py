"""Safetensors in and out: atomic, with metadata, one error line for a damaged file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimnas._files import atomic_path
from slimnas.errors import RunFolderError, WeightsError

METADATA = "slimnas"


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write `tensors` and `metadata` (plain data) as one safetensors file, atomically.

    The same content always gives the same bytes.

    Raises:
        RunFolderError: the place cannot be written.
    """
    # safetensors refuses tensors that share memory or have gaps; these copies never do.
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # One metadata key: safetensors writes several in random order, and files would differ.
    text = json.dumps(dict(metadata), sort_keys=True)
    with atomic_path(Path(path)) as temporary:
        try:
            save_file(whole, temporary, {METADATA: text})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise RunFolderError(
                f"{path}: cannot be written ({error}); "
                "free space or choose another place with --output"
            ) from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names and values, whatever the order."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors on the CPU and its metadata, empty for others' files.

    Args:
        path: the file.
        what: what it should hold, for messages ("a supernet checkpoint").

    Raises:
        WeightsError: missing, truncated or damaged.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file; expected {what}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"metadata: must be a mapping, got {metadata!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: damaged or not safetensors ({error}); expected {what}"
        ) from error
