"""From a supernet to stand-alone networks: which channels stay, and their weights.

A width is met by keeping the channels that come first in an order of importance. The order is
found once and shared by everything that reads or writes the channels, so a narrow network's
channels are always a subset of a wider one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import Spec
from slimnas.arch.efficientformer import MB3D, MB4D, ConvStem
from slimnas.arch.space import IDENTITY, Selection
from slimnas.arch.walk import Component, walk
from slimnas.errors import SpecError
from slimnas.nn.build import Network, build, make_module
from slimnas.nn.channels import CHANNEL_AXES, HIDDEN, IN, OUT
from slimnas.nn.resolution import adapt_state_dict
from slimnas.supernet.metapath import MetaPath

if TYPE_CHECKING:
    from slimnas.supernet.supernet import Supernet

ChannelOrder = Mapping[str, Tensor]
"""Group of channels -> int64 indexes, most important first.

Groups: `stages.{i}` (the residual width of a stage), `stem.hidden`, and
`stages.{i}.slots.{j}.blocks.{choice}.hidden`.
"""


@dataclass(frozen=True)
class SupernetPart:
    """A module of the supernet with the groups its channel axes belong to."""

    name: str
    spec_type: type[Spec]
    module: nn.Module
    groups: Mapping[str, str]


def supernet_parts(supernet: Supernet) -> Iterator[SupernetPart]:
    """Stem, downsamples, every candidate block and head, each with its channel groups."""
    yield SupernetPart("stem", ConvStem, supernet.stem, {OUT: "stages.0", HIDDEN: "stem.hidden"})
    last = len(supernet.space.stages) - 1
    for i, (stage, space) in enumerate(
        zip(supernet.super_stages(), supernet.space.stages, strict=True)
    ):
        if stage.downsample is not None and space.downsample is not None:
            yield SupernetPart(
                f"stages.{i}.downsample",
                type(space.downsample),
                stage.downsample,
                {IN: f"stages.{i - 1}", OUT: f"stages.{i}"},
            )
        for j, slot in enumerate(stage.slots):
            assert isinstance(slot, MetaPath)
            for choice, block in slot.blocks.items():
                name = f"stages.{i}.slots.{j}.blocks.{choice}"
                yield SupernetPart(
                    name,
                    type(supernet.space.blocks.block(choice, space.width.max)),
                    block,
                    {OUT: f"stages.{i}", HIDDEN: f"{name}.hidden"},
                )
    yield SupernetPart("head", type(supernet.space.head), supernet.head, {IN: f"stages.{last}"})


def sum_by_group(supernet: Supernet, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum `values`, one tensor per parameter of the supernet, channel by channel of each group.

    Parameters without a value count as zero. Returns group -> (channels,), float64.
    """
    sums: dict[str, Tensor] = {}
    for part in supernet_parts(supernet):
        axes = CHANNEL_AXES[part.spec_type]
        for tensor_name, parameter in part.module.named_parameters():
            for axis, axis_name in enumerate(axes.get(tensor_name, ())):
                if axis_name is None:
                    continue
                group = part.groups[axis_name]
                total = sums.setdefault(
                    group, torch.zeros(parameter.shape[axis], dtype=torch.float64)
                )
                value = values.get(f"{part.name}.{tensor_name}")
                if value is not None:
                    others = [d for d in range(value.dim()) if d != axis]
                    whole = value.cpu().double()  # not every device has float64
                    total += whole.sum(dim=others) if others else whole
    return sums


def order_of(scores: Mapping[str, Tensor]) -> ChannelOrder:
    """Most important channels first; equals in their own order."""
    return {
        group: torch.argsort(score, descending=True, stable=True) for group, score in scores.items()
    }


def magnitude_order(supernet: Supernet) -> ChannelOrder:
    """Channels by the sum of squares of every weight that reads or writes them."""
    squares = {name: p.detach().square() for name, p in supernet.named_parameters()}
    return order_of(sum_by_group(supernet, squares))


def place(supernet: Supernet, architecture: Architecture) -> Selection:
    """Put the architecture's blocks into slots so that their summed log-probability is largest.

    The order of the blocks stays; the slots left over become identity.

    Raises:
        SpecError: the architecture is outside the supernet's space.
    """
    widths = supernet.space.select(architecture).widths
    stages = zip(architecture.stages, supernet.super_stages(), supernet.space.stages, strict=True)
    paths = [
        _place_stage([block.type for block in spec.blocks], stage.slots, space.choices)
        for spec, stage, space in stages
    ]
    return Selection(widths, tuple(paths))


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

    def module(self, component: Component, source: str) -> nn.Module:
        """A new module for `component` with the weights of the supernet's part `source`."""
        part = self._parts[source]
        device = next(part.module.parameters()).device
        with torch.device("meta"):  # skips the initialisation, which would be overwritten
            made = make_module(component).to_empty(device=device)
        tensors = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
        kept = self._kept(component, part)
        with torch.no_grad():
            for name, target in [*made.named_parameters(), *made.named_buffers()]:
                target.copy_(_sliced(tensors[name], part, name, kept))
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
        sizes = {IN: component.input.channels, OUT: component.output.channels}
        spec = component.spec
        if isinstance(spec, ConvStem):
            sizes[HIDDEN] = spec.width // 2
        elif isinstance(spec, (MB4D, MB3D)):
            sizes[HIDDEN] = spec.hidden(component.input.channels)
        # Ascending, so that the full width is the supernet's own order of channels.
        return {
            axis: self.order[group][: sizes[axis]].sort().values
            for axis, group in part.groups.items()
        }


def _sliced(tensor: Tensor, part: SupernetPart, name: str, kept: Mapping[str, Tensor]) -> Tensor:
    for axis, axis_name in enumerate(CHANNEL_AXES[part.spec_type].get(name, ())):
        if axis_name is not None:
            tensor = tensor.index_select(axis, kept[axis_name].to(tensor.device))
    return tensor


def _place_stage(
    blocks: list[str], slots: Iterable[nn.Module], choices: tuple[str, ...]
) -> tuple[str, ...]:
    """Best order-preserving assignment of `blocks` to `slots`, by dynamic programming."""
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}
    for slot in slots:
        assert isinstance(slot, MetaPath)
        scores = dict(
            zip(slot.choices, torch.log_softmax(slot.alpha.detach(), 0).tolist(), strict=True)
        )
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
