"""Safetensors in and out: atomic, with metadata, one error line for a damaged file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimnas._files import atomic_path
from slimnas.errors import WeightsError

METADATA = "slimnas"


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write `tensors` and `metadata` (plain data) as one safetensors file, atomically.

    The same content always gives the same bytes.

    Raises:
        RunFolderError: the place cannot be written.
    """
    # safetensors refuses tensors that share memory; copies on the CPU never do.
    whole = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    # One metadata key: safetensors writes several in random order, and files would differ.
    text = json.dumps(dict(metadata), sort_keys=True)
    with atomic_path(Path(path)) as temporary:
        save_file(whole, temporary, {METADATA: text})


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
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: damaged or not safetensors ({error}); expected {what}"
        ) from error
