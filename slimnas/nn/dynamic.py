"""A backbone for images of any size: what depends on the size is resized when a new one comes.

Detectors and segmenters feed images of many sizes, and attention has tables that are as large as
the map. A size that was not seen before is built once, as the network `with_resolution` of it, with
the modules of the original in it; the few tensors whose shape depends on the size are resized from
the original's at every call, so that gradients reach them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from slimnas.arch.architecture import Architecture
from slimnas.errors import InputSizeError, SpecError
from slimnas.nn.build import FeatureNetwork, Stage, build_features
from slimnas.nn.layers import ResidualBlock
from slimnas.nn.layout import is_tracing
from slimnas.nn.resolution import resizings

KEPT_SIZES = 8
"""Sizes that are kept ready; index tables and masks of a large image take tens of megabytes."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Resized:
    """The network for one size; all that it learned is the original's.

    Attributes:
        network: structure and what follows from the size; its layers are the original's own.
        made: modules that are not the original's.
        shared: original's tensors that those modules take as they are, by name.
        resized: original's tensors that they take resized, by name.
        blocks: residual blocks among `made`, each with the original's that it stands for.
    """

    network: FeatureNetwork
    made: tuple[nn.Module, ...]
    shared: Mapping[str, Place]
    resized: Mapping[str, tuple[Place, Callable[[Tensor], Tensor]]]
    blocks: tuple[tuple[ResidualBlock, ResidualBlock], ...]

    def run(self, x: Tensor, *, training: bool) -> list[Tensor]:
        """Map images of this size to maps."""
        for module in self.made:
            module.training = training
        for block, original in self.blocks:
            block.drop_path = original.drop_path
        tensors = {name: place.tensor for name, place in self.shared.items()}
        for name, (place, resize) in self.resized.items():
            tensors[name] = resize(place.tensor)
        maps: list[Tensor] = functional_call(self.network, tensors, (x,), tie_weights=False)
        return maps


@dataclass(frozen=True)
class Place:
    """A tensor of a module, looked up when it is needed: it may be moved or replaced."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor


class DynamicFeatureNetwork(FeatureNetwork):
    """A `FeatureNetwork` for images of any size that its family takes.

    For each size it computes what the network built for that size computes, with these weights
    moved to it by `slimnas.nn.resolution.adapt_state_dict`. Gradients reach its own parameters and
    BatchNorm's statistics are its own. Convolutions, norms and linear layers are its own modules
    at every size, so that they may be frozen, or replaced before the first call.
    """

    def __init__(
        self, architecture: Architecture, *, stem: nn.Module, stages: Iterable[Stage]
    ) -> None:
        super().__init__(architecture, stem=stem, stages=stages)
        self._sizes: OrderedDict[Size, Resized] = OrderedDict()

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Map images (B, c, H, W) to each stage's map, which `feature_info` describes.

        Raises:
            InputSizeError: no such batch, or a size that the family cannot take.
        """
        own = self.architecture.input.shape
        if is_tracing() or x.dim() != 4 or x.shape[1:] == (own.channels, own.height, own.width):
            return super().forward_features(x)
        return self._for_size((x.shape[2], x.shape[3])).run(x, training=self.training)

    def _for_size(self, size: Size) -> Resized:
        if size not in self._sizes:
            self._sizes[size] = self._make(size)
        self._sizes.move_to_end(size)
        if len(self._sizes) > KEPT_SIZES:
            self._sizes.popitem(last=False)
        return self._sizes[size]

    def _make(self, size: Size) -> Resized:
        try:
            target = self.architecture.with_resolution(size)
        except SpecError as error:
            raise InputSizeError(str(error)) from error
        with LayersOnMeta():
            network = build_features(target)
        for name, module in list(network.named_modules()):
            if _is_layer(module):
                network.set_submodule(name, self._counterpart(name))
        originals = set(self.modules())
        made = tuple(module for module in network.modules() if module not in originals)
        wanted = dict(_learned(network, made))
        resize = resizings(source=self.architecture, target=target)
        places = {name: self._place(name) for name in wanted}
        shared = {name: place for name, place in places.items() if name not in resize}
        for name, place in shared.items():
            if place.tensor.shape != wanted[name].shape:
                raise InputSizeError(
                    f"{self.architecture.name}: {name} depends on the size of the image and cannot "
                    f"be resized from {tuple(place.tensor.shape)} to {tuple(wanted[name].shape)}; "
                    "build the architecture for this size and train it there"
                )
        self._move_derived(made)
        resized = {name: (places[name], resize[name]) for name in places if name in resize}
        return Resized(network, made, shared, resized, tuple(self._blocks(network)))

    def _counterpart(self, name: str) -> nn.Module:
        try:
            return self.get_submodule(name)
        except AttributeError as error:
            raise self._changed(name) from error

    def _blocks(self, network: FeatureNetwork) -> Iterator[tuple[ResidualBlock, ResidualBlock]]:
        for name, module in network.named_modules():
            if isinstance(module, ResidualBlock):
                original = self._counterpart(name)
                if isinstance(original, ResidualBlock):
                    yield module, original

    def _place(self, name: str) -> Place:
        path, _, tensor = name.rpartition(".")
        module = self._counterpart(path)
        if not isinstance(getattr(module, tensor, None), Tensor):
            raise self._changed(name)
        return Place(module, tensor)

    def _changed(self, name: str) -> InputSizeError:
        side = self.architecture.input.shape
        return InputSizeError(
            f"{self.architecture.name}: has no {name} any more (folded?), so it takes "
            f"{side.height}x{side.width} images only; make it anew, dynamic, and do not fold it"
        )

    def _move_derived(self, made: Iterable[nn.Module]) -> None:
        """Bring what follows from the size alone, such as index tables, to the weights' place."""
        like = next(self.parameters())
        for module in made:
            for name, buffer in module.named_buffers(recurse=False):
                dtype = like.dtype if buffer.is_floating_point() else None
                setattr(module, name, buffer.to(device=like.device, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._sizes.clear()  # what follows from the size moves along
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": OrderedDict()}  # copies and files hold no sizes


class LayersOnMeta(TorchFunctionMode):
    """Makes torch's layers without weights: they take no memory and no time to initialise.

    Their weights come from `torch.empty`; what is computed, such as an index table, is real.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def dynamic(network: FeatureNetwork) -> DynamicFeatureNetwork:
    """Return `network` for images of any size; the modules are shared, not copied."""
    stages = (stage for stage in network.stages if isinstance(stage, Stage))
    made = DynamicFeatureNetwork(network.architecture, stem=network.stem, stages=stages)
    made.training = network.training
    return made


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of torch that learns something; none of them depends on the size."""
    of_torch = type(module).__module__.startswith("torch.nn")
    return of_torch and not module._modules and bool(module._parameters or module._buffers)


def _learned(network: nn.Module, modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are weights, of `modules` themselves, by name in `network`."""
    wanted = set(modules)
    for path, module in network.named_modules():
        if module not in wanted:
            continue
        derived = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in derived:
                yield f"{path}.{name}" if path else name, tensor
