"""Do these tensors fit this architecture?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.errors import WeightsError
from slimnas.nn.build import build

BATCH_COUNTER = ".num_batches_tracked"
SHOWN = 10
"""Faults of one kind that are named; the rest are counted."""


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of `architecture`, nothing allocated."""
    with torch.device("meta"):
        network = build(architecture)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def check_state(
    state: Mapping[str, Tensor], architecture: Architecture, *, source: str
) -> dict[str, Tensor]:
    """Return `state` in the architecture's order, if it holds exactly its tensors.

    BatchNorm's batch counters may be missing (some formats drop them) and count as zero.

    Raises:
        WeightsError: missing, unknown, misshapen or non-finite tensors.
    """
    expected = expected_shapes(architecture)
    missing = [name for name in expected if name not in state and BATCH_COUNTER not in name]
    unknown = [name for name in state if name not in expected]
    misshapen = [
        f"{name}: {architecture.name} needs shape {expected[name]}, got {tuple(tensor.shape)}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if missing or unknown or misshapen:
        faults = [_some("missing ", missing), _some("unknown ", unknown), _some("", misshapen)]
        raise WeightsError(
            f"{source}: does not fit {architecture.name}: {'; '.join(filter(None, faults))}"
        )
    checked = {name: state.get(name, torch.zeros((), dtype=torch.int64)) for name in expected}
    for name, tensor in checked.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{source}: {name}: holds values that are not finite")
    return checked


def _some(what: str, faults: Sequence[str]) -> str:
    if not faults:
        return ""
    more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    return f"{what}{', '.join(faults[:SHOWN])}{more}"
