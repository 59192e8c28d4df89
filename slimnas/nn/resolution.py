"""Moving weights to another input size: what depends on it is listed in `RESIZERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D
from slimnas.arch.efficientformerv2 import V2Attention, V2AttentionDownsample
from slimnas.arch.efficientvit import EfficientViTBlock, window_side
from slimnas.arch.mixers import CGABlock, StridedBlock, WindowBlock
from slimnas.arch.swin import SwinBlock
from slimnas.arch.vit import ViTStem
from slimnas.arch.walk import Component, walk
from slimnas.errors import WeightsError
from slimnas.nn.swin import resize_relative_position_table

Resizer = Callable[[Tensor, Component, Component], Tensor]
"""(tensor, component it is for, component it is wanted for) -> tensor for the latter."""


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


def resize_position_embedding(
    embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resize a ViT's position embedding to another grid of patches, as timm does.

    Bicubic with antialiasing; the embeddings of the extra tokens in front stay.

    Args:
        embedding: (1, extra + rows * columns, C) for `grid` = (rows, columns).
        grid: the grid the embedding is for.
        new_grid: the grid it is wanted for.

    Returns:
        (1, extra + new rows * new columns, C), in the embedding's dtype; `embedding` itself for
        the same grid.

    Raises:
        WeightsError: the embedding is too short for `grid`.
    """
    rows, columns = grid
    patches = rows * columns
    if embedding.dim() != 3 or embedding.shape[1] < patches:
        raise WeightsError(
            f"a position embedding of a {rows}x{columns} grid must be (1, {patches} and the extra "
            f"tokens, width), got {tuple(embedding.shape)}"
        )
    if new_grid == grid:
        return embedding
    extra, learned = embedding[:, :-patches], embedding[:, -patches:]
    picture = learned.float().transpose(1, 2).reshape(1, -1, rows, columns)
    resized = F.interpolate(picture, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([extra, resized.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def _attention_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    grid, new_grid = (before.input.height, before.input.width), after.input
    return resize_attention_bias(table, grid, (new_grid.height, new_grid.width))


def _position_embedding(embedding: Tensor, before: Component, after: Component) -> Tensor:
    grid, new_grid = (before.output.height, before.output.width), after.output
    return resize_position_embedding(embedding, grid, (new_grid.height, new_grid.width))


def _relative_positions(table: Tensor, before: Component, after: Component) -> Tensor:
    assert isinstance(before.spec, SwinBlock)
    window, new_window = before.spec.windows(before.input), before.spec.windows(after.input)
    return resize_relative_position_table(table, window, new_window)


def _group_attention_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    assert isinstance(before.spec, EfficientViTBlock)
    side, new_side = (
        window_side(before.spec.window, part.input.height, part.input.width)
        for part in (before, after)
    )
    return resize_attention_bias(table, (side, side), (new_side, new_side))


def _v2_attention_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    assert isinstance(before.spec, V2Attention)
    seen, wanted = before.spec.grid(before.input), before.spec.grid(after.input)
    return resize_attention_bias(table, (seen.height, seen.width), (wanted.height, wanted.width))


def _window_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    assert isinstance(before.spec, WindowBlock)
    same = before.spec.swin(before.input.channels)
    window, new_window = same.windows(before.input), same.windows(after.input)
    return resize_relative_position_table(table, window, new_window)


def _cascaded_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    assert isinstance(before.spec, CGABlock)
    side, new_side = (
        window_side(before.spec.window, part.input.height, part.input.width)
        for part in (before, after)
    )
    return resize_attention_bias(table, (side, side), (new_side, new_side))


def _strided_bias(table: Tensor, before: Component, after: Component) -> Tensor:
    seen, wanted = before.input.halved(1), after.input.halved(1)
    return resize_attention_bias(table, (seen.height, seen.width), (wanted.height, wanted.width))


RESIZERS: Mapping[type[Spec], tuple[str, Resizer]] = MappingProxyType(
    {
        MB3D: ("token_mixer.attention_biases", _attention_bias),
        SwinBlock: ("attn.relative_position_bias_table", _relative_positions),
        EfficientViTBlock: ("mixer.attention_biases", _group_attention_bias),
        V2Attention: ("token_mixer.attention_biases", _v2_attention_bias),
        V2AttentionDownsample: ("attn.attention_biases", _attention_bias),
        ViTStem: ("pos_embed", _position_embedding),
        WindowBlock: ("mixer.relative_position_bias_table", _window_bias),
        CGABlock: ("mixer.attention_biases", _cascaded_bias),
        StridedBlock: ("mixer.attention_biases", _strided_bias),
    }
)
"""Component -> its tensor whose shape depends on the input size, and how to resize that."""


def adapt_state_dict(
    state: Mapping[str, Tensor], *, source: Architecture, target: Architecture
) -> dict[str, Tensor]:
    """Return the weights of `source` for `target`, the same network at another resolution.

    Attention biases and position embeddings are resized, everything else is shared.

    Raises:
        WeightsError: the two differ in more than their input, or a tensor to resize is missing.
    """
    adapted = dict(state)
    for name, resize in resizings(source=source, target=target).items():
        if name not in state:
            raise WeightsError(f"weights of {source.name}: {name} is missing")
        adapted[name] = resize(state[name])
    return adapted


def resizings(
    *, source: Architecture, target: Architecture
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return how to resize each tensor whose shape depends on the input size, by its name.

    Gradients flow through all of them.

    Raises:
        WeightsError: the two networks differ in more than their input.
    """
    if source.with_resolution(target.input.resolution) != target:
        raise WeightsError(
            f"weights of {source.name} cannot move to {target.name}: the two must differ in "
            "input resolution only"
        )
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for before, after in zip(walk(source), walk(target), strict=True):
        resizer = RESIZERS.get(type(before.spec))
        if resizer is None or _has_no_table(before.spec):
            continue
        tensor, resize = resizer
        found[f"{before.name}.{tensor}"] = _between(resize, before, after)
    return found


def _between(resize: Resizer, before: Component, after: Component) -> Callable[[Tensor], Tensor]:
    return lambda tensor: resize(tensor, before, after)


def _has_no_table(spec: Spec) -> bool:
    if isinstance(spec, SwinBlock):
        return not spec.heads
    return isinstance(spec, WindowBlock) and not spec.position_bias
