"""Safetensors in and out: atomic, with string metadata, one error line for a damaged file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimnas._files import atomic_path
from slimnas.errors import WeightsError


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write `tensors` and `metadata` as one safetensors file, atomically.

    The same content always gives the same bytes.

    Raises:
        RunFolderError: the place cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with atomic_path(Path(path)) as temporary:
        save_file(whole, temporary, metadata=dict(sorted(metadata.items())))


def load_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors on the CPU and its metadata.

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
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a readable safetensors file ({error}); expected {what}"
        ) from error
