"""What images a network's weights were trained on, as its architecture's provenance says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimnas.arch.architecture import Architecture
from slimnas.data.whole import Normalisation
from slimnas.errors import SpecError

KEY = "preprocessing"
TRAINED_AT = "trained_at"
"""Side in pixels of the images that a found network's weights were trained on."""


def normalisation_of(architecture: Architecture) -> Normalisation | None:
    """Mean and deviation per channel that the network's weights were trained with.

    Raises:
        SpecError: the provenance holds something else under `preprocessing`.
    """
    given = architecture.provenance.get(KEY)
    if given is None:
        return None
    channels = architecture.input.channels
    try:
        mean, std = (tuple(float(v) for v in given[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != channels or len(std) != channels or min(std, default=0.0) <= 0:
        raise SpecError(
            f"{architecture.name}: provenance.{KEY}: must hold mean and std, {channels} numbers "
            f"each and std above 0, got {given!r}"
        )
    return mean, std


def preprocessing(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What to put under `preprocessing` in a provenance."""
    return {"mean": list(mean), "std": list(std)}
