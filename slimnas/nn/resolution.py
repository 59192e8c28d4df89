"""Moving weights to another input size: only attention biases depend on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import MB3D
from slimnas.arch.walk import Component, walk
from slimnas.errors import WeightsError

BIAS_NAME = "token_mixer.attention_biases"


def resize_attention_bias(
    table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resize a table of attention biases to another grid of tokens.

    The table holds one bias per offset (|dy|, |dx|). It is mirrored to all signed offsets, so
    that the interpolation knows it is even around zero, resized bicubically with the zero and the
    largest offsets mapped onto each other, and cut back to the offsets that are not negative.

    Args:
        table: (heads, rows * columns) for `grid` = (rows, columns).
        grid: the grid the table is for.
        new_grid: the grid it is wanted for.

    Returns:
        (heads, new rows * new columns), in the table's dtype; `table` itself for the same grid.

    Raises:
        WeightsError: the table is not one of `grid`.
    """
    rows, columns = grid
    if table.dim() != 2 or table.shape[1] != rows * columns:
        raise WeightsError(
            f"an attention bias of a {rows}x{columns} grid must be (heads, {rows * columns}), "
            f"got {tuple(table.shape)}"
        )
    if new_grid == grid:
        return table
    offsets = table.float().view(1, -1, rows, columns)
    signed = F.pad(offsets, (columns - 1, 0, rows - 1, 0), mode="reflect")
    size = (2 * new_grid[0] - 1, 2 * new_grid[1] - 1)
    resized = F.interpolate(signed, size=size, mode="bicubic", align_corners=True)
    kept = resized[0, :, new_grid[0] - 1 :, new_grid[1] - 1 :]
    return kept.flatten(1).to(table.dtype)


def adapt_state_dict(
    state: Mapping[str, Tensor], *, source: Architecture, target: Architecture
) -> dict[str, Tensor]:
    """Return the weights of `source` for `target`, the same network at another resolution.

    Attention biases are resized by `resize_attention_bias`, everything else is shared.

    Raises:
        WeightsError: the two differ in more than their input, or a bias is missing.
    """
    if source.with_resolution(1) != target.with_resolution(1):
        raise WeightsError(
            f"weights of {source.name} cannot move to {target.name}: the two must differ in "
            "input resolution only"
        )
    adapted = dict(state)
    for before, after in zip(walk(source), walk(target), strict=True):
        if isinstance(before.spec, MB3D):
            name = f"{before.name}.{BIAS_NAME}"
            if name not in state:
                raise WeightsError(f"weights of {source.name}: {name} is missing")
            adapted[name] = resize_attention_bias(state[name], _grid(before), _grid(after))
    return adapted


def _grid(component: Component) -> tuple[int, int]:
    return component.input.height, component.input.width
