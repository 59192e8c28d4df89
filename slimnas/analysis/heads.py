"""How alike the heads of an attention are: EfficientViT's head similarity, in both readings.

Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention"
(CVPR 2023, section 2.2, Fig. 4). The authors say that a layer's number is max_i max_{j != i}
cos(head i, head j), averaged over batches (github.com/microsoft/Cream issue 178); the caption's
words, an average of each head's maximum, are mean_i max_{j != i}. Neither says whether a head is
its attention map or its output. All four are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from slimnas.analysis.attention_maps import HeadMaps, MapTracer
from slimnas.arch.walk import Component, walk
from slimnas.errors import AnalysisError
from slimnas.nn.build import Network

MEASURES: Mapping[str, str] = MappingProxyType(
    {
        "maps_max": "maps, most alike pair",
        "maps_mean": "maps, mean over heads",
        "outputs_max": "outputs, most alike pair",
        "outputs_mean": "outputs, mean over heads",
    }
)
"""The four numbers of a layer, with words for them."""

BRANCHES: Mapping[str, tuple[str, ...]] = MappingProxyType({"hilo": ("Hi-Fi", "Lo-Fi")})
"""Names of the groups of heads of a block type, in the order they are computed."""

Progress = Callable[[int], None]
"""Told how many images are done."""


@dataclass(frozen=True)
class Stat:
    """A number of an image, over all images.

    Attributes:
        mean: over the images.
        deviation: standard deviation over the images.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class LayerHeads:
    """Head similarity of one attention, or of one of its groups of heads.

    Attributes:
        module: name of the attention module.
        component: name of the component it lies in.
        block: number of that component among the network's blocks, from 0; None for others.
        stage: index of its stage.
        kind: type of the component, such as `vit`.
        branch: name of the group; `` where the module has one only.
        heads: number of heads.
        measures: by name, as in `MEASURES`; those of outputs are left out where none were seen.
    """

    module: str
    component: str
    block: int | None
    stage: int
    kind: str
    branch: str
    heads: int
    measures: Mapping[str, Stat]


@dataclass(frozen=True)
class HeadReport:
    """Head similarity of a network.

    Attributes:
        layers: in execution order.
        images: how many were looked at.
    """

    layers: tuple[LayerHeads, ...]
    images: int


def head_similarity(
    network: Network, batches: Iterable[Tensor], progress: Progress = lambda _: None
) -> HeadReport:
    """Measure how alike heads are on images.

    Each image has its own similarity, of maps or outputs with all windows side by side; the
    result is their mean.

    Args:
        network: runs in evaluation mode, where it lies.
        batches: normalised images (B, c, H, W), on the network's device.
        progress: told how many images are done.

    Raises:
        AnalysisError: no attention of two heads or more, or no images.
    """
    found: dict[tuple[str, int], list[Tensor]] = {}
    heads: dict[tuple[str, int], int] = {}

    def sink(seen: HeadMaps) -> None:
        key = (seen.module, seen.branch)
        heads[key] = seen.maps.shape[1]
        if heads[key] > 1:
            found.setdefault(key, []).append(_measured(seen))

    images = 0
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                with MapTracer(len(batch), sink).watching(network):
                    network(batch)
                images += len(batch)
                progress(images)
    finally:
        network.train(was_training)
    if not images:
        raise AnalysisError("head similarity needs at least one image, got none")
    if not found:
        raise AnalysisError(_nothing_to_compare(network, heads))
    layers = [
        _layer(network, key, heads, torch.cat(values, dim=1)) for key, values in found.items()
    ]
    return HeadReport(tuple(layers), images)


def similarity(features: Tensor) -> Tensor:
    """Both readings of how alike heads are.

    Args:
        features: (B, H, F), H > 1.

    Returns:
        (2, B): max_i max_{j != i} and mean_i max_{j != i} of the cosines of heads i and j.
    """
    directions = F.normalize(features.double(), dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    itself = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    nearest = cosines.masked_fill(itself, -torch.inf).amax(dim=2)
    return torch.stack([nearest.amax(dim=1), nearest.mean(dim=1)])


def _measured(seen: HeadMaps) -> Tensor:
    """(4, B) in the order of `MEASURES`; (2, B) where outputs were not seen."""
    both = [seen.maps] if seen.outputs is None else [seen.maps, seen.outputs]
    return torch.cat([similarity(features) for features in both]).cpu()


def _layer(
    network: Network,
    key: tuple[str, int],
    heads: Mapping[tuple[str, int], int],
    values: Tensor,
) -> LayerHeads:
    module, branch = key
    component, block = _component_of(network, module)
    groups = sum(name == module for name, _ in heads)
    kind = str(component.spec.model_dump()["type"])
    names = BRANCHES.get(kind, ())
    words = names[branch] if len(names) == groups else str(branch + 1)
    return LayerHeads(
        module=module,
        component=component.name,
        block=block,
        stage=component.stage,
        kind=kind,
        branch=words if groups > 1 else "",
        heads=heads[key],
        measures={
            name: Stat(float(row.mean()), float(row.std(correction=0)))
            for name, row in zip(MEASURES, values, strict=False)
        },
    )


def _component_of(network: Network, module: str) -> tuple[Component, int | None]:
    components = list(walk(network.architecture))
    blocks = [part.name for part in components if part.kind == "block"]
    (component,) = [p for p in components if f"{module}.".startswith(f"{p.name}.")]
    return component, blocks.index(component.name) if component.name in blocks else None


def _nothing_to_compare(network: Network, heads: Mapping[tuple[str, int], int]) -> str:
    name = network.architecture.name
    if heads:
        return (
            f"{name}: head similarity compares the heads of an attention, and every attention of "
            f"{name} has one head only; choose a model with two heads or more"
        )
    kinds = sorted(
        {str(b.model_dump()["type"]) for s in network.architecture.stages for b in s.blocks}
    )
    return (
        f"{name}: has no attention, whose heads are what head similarity compares; its blocks are "
        f"{', '.join(kinds)}; choose a model with attention, such as deit_tiny"
    )
