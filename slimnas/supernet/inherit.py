"""From a supernet to stand-alone networks: which channels stay, and their weights.

A width is met by keeping the channels that come first in an order of importance. The order is
found once and shared by everything that reads or writes the channels, so a narrow network's
channels are always a subset of a wider one's. Where heads share a stage's channels, the order
goes round the heads, so that each keeps as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.arch.efficientformer import ConvStem
from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.arch.walk import Component, walk
from slimnas.errors import SpecError
from slimnas.nn.build import Network, build, make_module
from slimnas.nn.channels import HIDDEN, IN, OUT, Channels, Run, Runs
from slimnas.nn.channels_shared import channels_of
from slimnas.nn.resolution import adapt_state_dict
from slimnas.supernet.metapath import MetaPath

if TYPE_CHECKING:
    from slimnas.supernet.supernet import Supernet

Alphas = Sequence[Sequence[Mapping[str, float]]]
"""Per stage and slot, the architecture parameter of each choice."""

ChannelOrder = Mapping[str, Tensor]
"""Group of channels -> int64 indexes, most important first.

Groups: `stages.{i}` (the residual width of a stage), `stem.hidden`, and of every block
`stages.{i}.slots.{j}.blocks.{choice}.hidden`, and what else it has inside its heads.
"""


@dataclass(frozen=True)
class SupernetPart:
    """A module of the supernet and the groups its channels belong to.

    Attributes:
        name: of the module.
        module: at full width.
        channels: how its tensors hold them.
        groups: the component's name of a group -> the supernet's.
        sizes: the component's name of a group -> number of its channels.
    """

    name: str
    module: nn.Module
    channels: Channels
    groups: Mapping[str, str]
    sizes: Mapping[str, int]

    def bounds(self, run: Run) -> tuple[int, int]:
        """First and last position, exclusive, of a run in its group."""
        size = self.sizes[run.group]
        return int(run.first * size), int(run.last * size)


def supernet_parts(supernet: Supernet) -> Iterator[SupernetPart]:
    """Stem, downsamples, every candidate block and head, each with its channel groups."""
    widths = [stage.width.max for stage in supernet.space.stages]
    stem = channels_of(ConvStem(width=widths[0]), widths[0])
    yield SupernetPart(
        "stem",
        supernet.stem,
        stem,
        {OUT: "stages.0", HIDDEN: "stem.hidden"},
        {OUT: widths[0], **stem.sizes},
    )
    last = len(widths) - 1
    for i, (stage, space) in enumerate(
        zip(supernet.super_stages(), supernet.space.stages, strict=True)
    ):
        if stage.downsample is not None and space.downsample is not None:
            yield SupernetPart(
                f"stages.{i}.downsample",
                stage.downsample,
                channels_of(space.downsample, widths[i]),
                {IN: f"stages.{i - 1}", OUT: f"stages.{i}"},
                {IN: widths[i - 1], OUT: widths[i]},
            )
        for j, slot in enumerate(stage.slots):
            assert isinstance(slot, MetaPath)
            for choice, block in slot.blocks.items():
                name = f"stages.{i}.slots.{j}.blocks.{choice}"
                channels = channels_of(supernet.space.blocks.block(choice, widths[i]), widths[i])
                inside = {group: f"{name}.{group}" for group in channels.sizes}
                yield SupernetPart(
                    name,
                    block,
                    channels,
                    {OUT: f"stages.{i}", **inside},
                    {OUT: widths[i], **channels.sizes},
                )
    head = supernet.space.head
    yield SupernetPart(
        "head",
        supernet.head,
        channels_of(head, widths[last]),
        {IN: f"stages.{last}"},
        {IN: widths[last]},
    )


def sum_by_group(supernet: Supernet, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum `values`, one tensor per parameter of the supernet, channel by channel of each group.

    Parameters without a value count as zero. Returns group -> (channels,), float64.
    """
    sums: dict[str, Tensor] = {}
    for part in supernet_parts(supernet):
        for tensor_name, _ in part.module.named_parameters():
            value = values.get(f"{part.name}.{tensor_name}")
            for axis, runs in enumerate(part.channels.axes.get(tensor_name, ())):
                if runs is not None:
                    _add_runs(sums, part, runs, None if value is None else _along(value, axis))
    return sums


def group_chunks(supernet: Supernet) -> dict[str, int]:
    """Equal runs of each group that must keep equally many channels; groups of one left out."""
    chunks: dict[str, int] = {}
    for part in supernet_parts(supernet):
        for group, count in part.channels.chunks.items():
            name = part.groups[group]
            chunks[name] = math.lcm(chunks.get(name, 1), count)
    return {group: count for group, count in chunks.items() if count > 1}


def order_of(scores: Mapping[str, Tensor], chunks: Mapping[str, int] | None = None) -> ChannelOrder:
    """Most important channels first; equals in their own order.

    Args:
        scores: group -> importance of its channels.
        chunks: see `group_chunks`; of each run the most important one, then of each run the
            second, and so on.
    """
    chunks = chunks or {}
    return {group: _ranked(score, chunks.get(group, 1)) for group, score in scores.items()}


def magnitude_order(supernet: Supernet) -> ChannelOrder:
    """Channels by the sum of squares of every weight that reads or writes them."""
    squares = {name: p.detach().square() for name, p in supernet.named_parameters()}
    return order_of(sum_by_group(supernet, squares), group_chunks(supernet))


def own_order(supernet: Supernet) -> ChannelOrder:
    """Channels as they are numbered, of heads that share them one of each in turn.

    The order in which a sandwich of networks trains them, so that those it keeps most often are
    those that a narrower network keeps.
    """
    return order_of(sum_by_group(supernet, {}), group_chunks(supernet))


def place(supernet: Supernet, architecture: Architecture) -> Selection:
    """Put the architecture's blocks into slots so that their summed log-probability is largest.

    The order of the blocks stays; the slots left over become identity.

    Raises:
        SpecError: the architecture is outside the supernet's space.
    """
    return place_by(supernet.alphas(), supernet.space, architecture)


def place_by(alphas: Alphas, space: SearchSpace, architecture: Architecture) -> Selection:
    """`place` by architecture parameters alone: per stage and slot, of each choice.

    Raises:
        SpecError: the architecture is outside the space.
    """
    selection = space.select(architecture)
    paths = [
        _place_stage([c for c in slots if c != IDENTITY], of_stage, stage.choices)
        for slots, of_stage, stage in zip(selection.paths, alphas, space.stages, strict=True)
    ]
    return Selection(selection.widths, tuple(paths))


class Inheritance:
    """Makes stand-alone modules and networks that carry a supernet's weights.

    Args:
        supernet: where the weights come from; never changed.
        order: which channels stay in a narrower network; by magnitude if not given.
    """

    def __init__(self, supernet: Supernet, order: ChannelOrder | None = None) -> None:
        self.supernet = supernet
        self.order = magnitude_order(supernet) if order is None else order
        self._parts = {part.name: part for part in supernet_parts(supernet)}

    def components(self, selection: Selection) -> list[tuple[Component, str]]:
        """Components of the selection's network at the supernet's resolution, with the name of
        the supernet's part each inherits from.
        """
        space = self.supernet.space
        architecture = space.architecture(selection)
        sources = iter([f"stages.{i}.slots.{j}.blocks.{c}" for i, j, c in selection.active()])
        return [
            (part, next(sources) if part.kind == "block" else part.name)
            for part in walk(architecture.with_resolution(self.supernet.resolution))
        ]

    def tensors(self, component: Component, source: str) -> dict[str, Tensor]:
        """Weights and buffers of `component`: the supernet's part `source`, sliced.

        Gradients pass to the supernet. Tensors that need no slicing are the supernet's own.
        """
        part = self._parts[source]
        kept = self._kept(component, part)
        whole = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
        return {name: _sliced(tensor, part, name, kept) for name, tensor in whole.items()}

    def module(self, component: Component, source: str) -> nn.Module:
        """A new module for `component` with the weights of the supernet's part `source`."""
        device = next(self._parts[source].module.parameters()).device
        with torch.device("meta"):  # skips the initialisation, which would be overwritten
            made = make_module(component).to_empty(device=device)
        with torch.no_grad():
            tensors = self.tensors(component, source)
            for name, target in [*made.named_parameters(), *made.named_buffers()]:
                target.copy_(tensors[name])
        return made

    def extract(self, architecture: Architecture, *, selection: Selection | None = None) -> Network:
        """The stand-alone network of `architecture` with inherited weights.

        Args:
            architecture: of the space; its input size may differ from the supernet's, then
                attention biases are interpolated.
            selection: which slots its blocks come from; the likeliest if not given.

        Raises:
            SpecError: outside the space, other classes or image channels, or another selection's.
        """
        supernet = self.supernet
        if architecture.head != supernet.space.head:
            raise SpecError(
                f"{architecture.name}: its head must be the supernet's, {supernet.space.head!r}, "
                f"got {architecture.head!r}"
            )
        channels = supernet.space.input.channels
        if architecture.input.channels != channels:
            raise SpecError(
                f"{architecture.name}: input.channels: must be the supernet's, {channels}, "
                f"got {architecture.input.channels}"
            )
        if selection is None:
            selection = place(supernet, architecture)
        elif supernet.space.architecture(selection).stages != architecture.stages:
            raise SpecError(
                f"{architecture.name}: selection must be one that gives this architecture, "
                f"got {selection!r}"
            )
        state = {}
        for component, source in self.components(selection):
            module = self.module(component, source)
            state.update({f"{component.name}.{k}": v for k, v in module.state_dict().items()})
        network = build(architecture)
        trained_at = architecture.with_resolution(supernet.resolution)
        network.load_state_dict(adapt_state_dict(state, source=trained_at, target=architecture))
        return network

    def _kept(self, component: Component, part: SupernetPart) -> dict[str, Tensor]:
        inside = channels_of(component.spec, component.output.channels).sizes
        sizes = {IN: component.input.channels, OUT: component.output.channels, **inside}
        # Ascending, so that the full width is the supernet's own order of channels.
        return {
            axis: self.order[group][: sizes[axis]].sort().values
            for axis, group in part.groups.items()
        }


def _sliced(tensor: Tensor, part: SupernetPart, name: str, kept: Mapping[str, Tensor]) -> Tensor:
    for axis, runs in enumerate(part.channels.axes.get(name, ())):
        if runs is None:
            continue
        places = [_places(part, run, kept[run.group]) for run in runs]
        lengths = [last - first for first, last in map(part.bounds, runs)]
        starts = [sum(lengths[:i]) for i in range(len(runs))]
        chosen = torch.cat([place + start for place, start in zip(places, starts, strict=True)])
        tensor = tensor.index_select(axis, chosen.to(tensor.device))
        if any(run.keeps_logits for run in runs):
            factors = [
                torch.full((len(place),), (len(place) / length) ** (run.keeps_logits / 2))
                for run, place, length in zip(runs, places, lengths, strict=True)
            ]
            shape = (-1,) + (1,) * (tensor.dim() - axis - 1)
            tensor = tensor * torch.cat(factors).to(tensor).view(shape)
    return tensor


def _places(part: SupernetPart, run: Run, kept: Tensor) -> Tensor:
    """Positions within a run of those of the group's channels that are kept."""
    first, last = part.bounds(run)
    return kept[(kept >= first) & (kept < last)] - first


def _along(value: Tensor, axis: int) -> Tensor:
    """Sum over every axis but one."""
    others = [d for d in range(value.dim()) if d != axis]
    whole = value.cpu().double()  # not every device has float64
    return whole.sum(dim=others) if others else whole


def _add_runs(sums: dict[str, Tensor], part: SupernetPart, runs: Runs, line: Tensor | None) -> None:
    start = 0
    for run in runs:
        size = part.sizes[run.group]
        total = sums.setdefault(part.groups[run.group], torch.zeros(size, dtype=torch.float64))
        first, last = part.bounds(run)
        if line is not None:
            total[first:last] += line[start : start + last - first]
        start += last - first


def _ranked(score: Tensor, chunks: int) -> Tensor:
    best = torch.argsort(score.view(chunks, -1), dim=1, descending=True, stable=True)
    first = torch.arange(chunks, device=score.device)[:, None] * best.shape[1]
    return (best + first).T.flatten()


def _place_stage(
    blocks: list[str], slots: Iterable[Mapping[str, float]], choices: tuple[str, ...]
) -> tuple[str, ...]:
    """Best order-preserving assignment of `blocks` to `slots`, by dynamic programming."""
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for alphas in slots:
        logs = torch.log_softmax(torch.tensor(list(alphas.values()), dtype=torch.float64), 0)
        scores = dict(zip(alphas, logs.tolist(), strict=True))
        after: dict[int, tuple[float, tuple[str, ...]]] = {}
        for placed, (score, path) in best.items():
            options = [(IDENTITY, placed)] if IDENTITY in choices else []
            if placed < len(blocks):
                options.append((blocks[placed], placed + 1))
            for choice, count in options:
                reached = (score + scores[choice], (*path, choice))
                if count not in after or reached[0] > after[count][0]:
                    after[count] = reached
        best = after
    return best[len(blocks)][1]
