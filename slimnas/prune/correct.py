"""Correction without training: what stays takes over, as far as it can, for what went.

Layer by layer from the image on, the last linear map of each sub-layer (proj, fc2) is fitted so
that the pruned network's residual stream comes back to the original's: a ridge regression towards
the pruned weights, in closed form, on a few hundred images (`least_squares`), or its bias alone
(`bias`, the mean of what is missing). No gradient step is taken, no label is looked at by the
fit; only how much each position of the stream matters to the loss comes from gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.architecture import Architecture
from slimnas.arch.shapes import FeatureShape
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError, suggest
from slimnas.nn.build import Network
from slimnas.nn.layers import LayerScale
from slimnas.nn.layout import as_layout, layout_of, to_tokens
from slimnas.nn.swin import WindowAttention
from slimnas.prune.apply import survivors
from slimnas.prune.supported import check_network
from slimnas.prune.taylor import scoring
from slimnas.prune.widths import WidthPlan

Correction = Literal["bias", "least_squares"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)

RIDGE = 1.0
"""Pull towards the pruned weights, as a share of the mean second moment of the inputs. Of 0.1, 0.3
and 1, this left the least divergence from the unpruned DeiT-T on held-out images."""
SHARPNESS = 0.5
"""Exponent of a position's weight in the fit, its mean squared gradient: 0 would treat all alike,
1 leaves too few effective samples where only the class token matters."""


@torch.no_grad()
def correct(
    original: Network,
    pruned: Network,
    plan: WidthPlan,
    batches: Iterable[tuple[Tensor, Tensor]],
    method: Correction = "least_squares",
    *,
    importance: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Network:
    """A copy of `pruned` whose sub-layers are fitted to the residual stream of `original`.

    Holds two feature maps per image in memory.

    Args:
        original: the network before, in any basis.
        pruned: what `apply_plan` made of it.
        plan: the plan that was applied.
        batches: images (B, c, H, W) and labels (B,), a few hundred.
        method: `bias` or `least_squares`.
        importance: `position_importance` of `original` on these images, if it is at hand; it is
            the same for every budget.
        on_layer: called after every block with blocks done and blocks in all.

    Returns:
        A new network of the same architecture in evaluation mode; the given ones are untouched.

    Raises:
        PruneError: an unknown method, a plan that does not belong to the two, or no images.
    """
    if method not in CORRECTIONS:
        raise PruneError(
            f"correction: must be one of {', '.join(CORRECTIONS)}, got {method!r}"
            f"{suggest(method, CORRECTIONS)}"
        )
    check_network(original)
    check_network(pruned)
    expected = plan.architecture(original.architecture)
    if expected != pruned.architecture:
        raise PruneError(
            f"correction: the plan makes another network than {pruned.architecture.name}; give "
            "the plan that was applied to it"
        )
    source, corrected = copy.deepcopy(original).eval(), copy.deepcopy(pruned).eval()
    given = list(batches)
    if not given:
        raise PruneError("correction: must see at least one image, got none")
    if importance is None:
        importance = position_importance(source, given)
    first = next(source.parameters())
    streams = _Streams.start([images.to(first.device, first.dtype) for images, _ in given])
    names = {before.name: after for before, after in survivors(plan, *_pair(source, corrected))}
    total = len(importance)
    done = 0
    for component in walk(source.architecture):
        if component.kind == "head":
            break
        mine = source.get_submodule(component.name)
        after = names.get(component.name)
        theirs = corrected.get_submodule(after) if after is not None else None
        if component.kind == "block":
            weights = importance[component.name] ** SHARPNESS
            channels = plan.kept_channels(component.stage, component.output.channels)
            kept = torch.tensor(channels, device=first.device)
            _Block(component, mine, theirs, kept, weights / weights.mean(), method).run(streams)
            done += 1
            if on_layer is not None:
                on_layer(done, total)
        else:
            assert theirs is not None
            streams.advance(mine, theirs, component)
    return corrected


def position_importance(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """How much each position of the stream after each block matters to the loss.

    Args:
        network: left as it was.
        batches: images (B, c, H, W) and labels (B,).

    Returns:
        Block name -> squared gradient of the loss, summed over channels, averaged over images:
        (positions,), float64, mean 1.
    """
    blocks = [part for part in walk(network.architecture) if part.kind == "block"]
    totals: dict[str, Tensor] = {}
    first = next(network.parameters())
    outputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks, scoring(network, by_gradient=False):
        for part in blocks:
            module = network.get_submodule(part.name)
            hooks.callback(module.register_forward_hook(_keep(outputs, part.name)).remove)
        stem = network.get_submodule("stem")
        hooks.callback(stem.register_forward_hook(_begin_graph).remove)
        for images, labels in batches:
            logits = network(images.to(first.device, first.dtype))
            loss = cross_entropy(logits, labels.to(first.device), reduction="sum")
            kept = [outputs[part.name] for part in blocks]
            for part, gradient in zip(blocks, torch.autograd.grad(loss, kept), strict=True):
                squares = _as_tokens(gradient).double().square().sum(dim=(0, 2)).cpu()
                totals[part.name] = totals.get(part.name, torch.zeros_like(squares)) + squares
    least = torch.finfo(torch.float64).tiny
    return {name: total / total.mean().clamp_min(least) for name, total in totals.items()}


def _pair(source: Network, corrected: Network) -> tuple[Architecture, Architecture]:
    return source.architecture, corrected.architecture


def _keep(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        outputs[name] = out

    return hook


def _begin_graph(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.detach().requires_grad_(True)


def _as_tokens(x: Tensor) -> Tensor:
    return to_tokens(x) if x.dim() == 4 else x


@dataclass
class _Streams:
    """The residual streams of both networks, one tensor per batch each."""

    original: list[Tensor]
    pruned: list[Tensor]

    @classmethod
    def start(cls, images: list[Tensor]) -> _Streams:
        return cls(images, list(images))

    def advance(self, mine: nn.Module, theirs: nn.Module, component: Component) -> None:
        """Run a stem or downsampling in both."""
        for streams, module in ((self.original, mine), (self.pruned, theirs)):
            for i, x in enumerate(streams):
                if component.kind == "stem":  # takes the image, whatever it gives
                    streams[i] = module(x)
                    continue
                shape = component.input.with_channels(x.shape[1 if x.dim() == 4 else 2])
                streams[i] = module(as_layout(x, layout_of(module), shape))


@dataclass
class _Fit:
    """Weighted moments of a linear map's inputs and of what it should give."""

    inputs: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    input_sum: Tensor | float = 0.0
    target_sum: Tensor | float = 0.0
    weight: float = 0.0

    def add(self, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add rows: inputs (n, d), targets (n, c), weights (n,)."""
        weighted = x * weight[:, None]
        self.inputs = self.inputs + (weighted.T @ x).double().cpu()
        self.cross = self.cross + (weighted.T @ target).double().cpu()
        self.input_sum = self.input_sum + weighted.sum(dim=0).double().cpu()
        self.target_sum = self.target_sum + (target * weight[:, None]).sum(dim=0).double().cpu()
        self.weight += float(weight.double().sum())

    def solve(self, start: Tensor, method: Correction) -> tuple[Tensor, Tensor]:
        """The map (c, d) and bias (c,) that fit best, pulled towards `start`."""
        x_mean, mean = self.input_sum / self.weight, self.target_sum / self.weight
        assert isinstance(x_mean, Tensor)
        assert isinstance(mean, Tensor)
        if method == "bias":
            return start, mean - start @ x_mean
        moment = self.inputs / self.weight - torch.outer(x_mean, x_mean)
        cross = self.cross / self.weight - torch.outer(x_mean, mean)
        pull = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        if not moment.trace() > 0:
            return start, mean - start @ x_mean
        fitted = torch.linalg.solve(moment + pull, cross + pull @ start.T).T
        return fitted, mean - fitted @ x_mean


@dataclass
class _Block:
    """One block in both networks; `theirs` is None where nothing of it stayed.

    Attributes:
        component: of the original.
        mine: the original's module.
        theirs: the pruned one's, changed in place.
        kept: channels of the original's stream that the pruned one has.
        weights: of the positions, (positions,), mean 1.
        method: see `correct`.
    """

    component: Component
    mine: nn.Module
    theirs: nn.Module | None
    kept: Tensor
    weights: Tensor
    method: Correction
    _middles: list[Tensor] = field(default_factory=list)

    def run(self, streams: _Streams) -> None:
        """Fit the sub-layers one after the other, then move both streams behind the block."""
        outputs = [self._original(x) for x in streams.original]
        if self.theirs is not None:
            for linear, name in _linear_maps(self.theirs):
                is_ffn = name == "mlp.fc2"
                targets = outputs if is_ffn or not _has_ffn(self.theirs) else self._middles
                self._fit(linear, name, streams.pruned, targets)
            for i, x in enumerate(streams.pruned):
                streams.pruned[i] = self.theirs(
                    as_layout(x, layout_of(self.theirs), self._shape(x))
                )
        streams.original[:] = outputs

    def _shape(self, x: Tensor) -> FeatureShape:
        return self.component.input.with_channels(x.shape[1 if x.dim() == 4 else 2])

    def _original(self, x: Tensor) -> Tensor:
        """Run the original's block, keeping the stream between its sub-layers."""
        seen: list[Tensor] = []
        x = as_layout(x, layout_of(self.mine), self._shape(x))
        with _watched(_between(self.mine), seen):
            out: Tensor = self.mine(x)
        self._middles.append(seen[0] if seen else out)
        return out

    def _fit(
        self, linear: nn.Linear | nn.Conv2d, name: str, streams: list[Tensor], targets: list[Tensor]
    ) -> None:
        assert self.theirs is not None
        scale, shift = _after(self.theirs, name)
        fit = _Fit()
        for x, target in zip(streams, targets, strict=True):
            inputs: list[Tensor] = []
            before: list[Tensor] = []
            x = as_layout(x, layout_of(self.theirs), self._shape(x))
            with _watched(linear, inputs), _watched(_between(self.theirs), before):
                self.theirs(x)
            stream = before[0] if name == "mlp.fc2" and before else x
            wanted = _as_tokens(target)[..., self.kept]
            missing = (wanted - _as_tokens(stream) - shift) / scale
            weight = self.weights.to(missing.device, missing.dtype).expand(len(missing), -1)
            fit.add(*self._aligned(name, inputs[0], missing, weight))
        start = linear.weight.detach().double().cpu().flatten(1)
        weight_matrix, bias = fit.solve(start, self.method)
        linear.weight.copy_(weight_matrix.reshape(linear.weight.shape).to(linear.weight))
        assert linear.bias is not None
        linear.bias.copy_(bias.to(linear.bias))

    def _aligned(
        self, name: str, inputs: Tensor, missing: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of inputs, targets and weights in one order; windows are cut alike."""
        attention = getattr(self.theirs, "attn", None)
        if name != "mlp.fc2" and isinstance(attention, WindowAttention):
            missing = attention.windows.split(missing, missing.shape[2])
            weight = attention.windows.split(weight[..., None].contiguous(), 1)[..., 0]
        rows = _as_tokens(inputs)
        return rows.flatten(0, 1), missing.flatten(0, 1), weight.flatten()


def _linear_maps(block: nn.Module) -> Iterator[tuple[nn.Linear | nn.Conv2d, str]]:
    """The last linear map of each sub-layer that is there, in order."""
    for name in ("attn.proj", "token_mixer.proj", "mlp.fc2"):
        part: object = block
        for step in name.split("."):
            part = getattr(part, step, None)
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            yield part, name


def _has_ffn(block: nn.Module) -> bool:
    return getattr(block, "mlp", None) is not None


def _between(block: nn.Module) -> nn.Module | None:
    """The module that reads the stream between the sub-layers: norm2, or the FFN without one."""
    if not _has_ffn(block):
        return None
    norm = getattr(block, "norm2", None)
    return norm if isinstance(norm, nn.Module) else block.get_submodule("mlp")


def _after(block: nn.Module, name: str) -> tuple[Tensor | float, Tensor | float]:
    """Factor and summand per channel between a linear map's output and the residual stream."""
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    norm = getattr(getattr(block, "mlp", None), "norm2", None)
    if name == "mlp.fc2" and isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
    layer_scale = getattr(block, "ls2" if name == "mlp.fc2" else "ls1", None)
    if isinstance(layer_scale, LayerScale):
        scale, shift = scale * layer_scale.gamma, shift * layer_scale.gamma
    if isinstance(scale, Tensor):  # a channel that is scaled away cannot be corrected
        scale = torch.where(scale == 0, torch.inf, scale)
    return scale, shift


@contextlib.contextmanager
def _watched(module: nn.Module | None, seen: list[Tensor]) -> Iterator[None]:
    """Collect what a module is given."""
    if module is None:
        yield
        return
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield
    finally:
        handle.remove()
