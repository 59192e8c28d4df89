"""Per-sample gradients of gates on every unit, from one ordinary forward and backward pass.

A gate is a factor z = 1 on what a unit adds to the network. Its gradient for one sample is the
sum over tokens of activation times gradient of that activation, so it needs no factor in the
network and no loop over samples (Molchanov et al., CVPR 2019, section 3.3). Both are there during
the backward pass: hooks read activations that autograd keeps anyway.

What a gate scales is what really disappears with the unit:

- qk: a query dimension. Scaling the key dimension or their product gives the same gradient.
- v: a value dimension without its bias, which surgery folds into the projection's bias.
- ffn: an input of fc2, after the activation.
- head: all value dimensions of a head together.
- attention_layer, ffn_layer: all that the sub-layer adds to the residual stream.
- embedding: one channel of everything that is written into the residual stream of a stage: by the
  stem or downsampling, and by every sub-layer. LayerNorm counts a channel of zeros though, and no
  longer a removed one, so for these the gate is an approximation of removal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from slimnas.arch.efficientformer import MB4D
from slimnas.arch.walk import Component
from slimnas.nn.build import Network
from slimnas.nn.units import ATTENTION, Positions, attention_of, qkv_rows
from slimnas.prune.scores import EMBEDDING, blocks_of
from slimnas.prune.vector import UnitVector
from slimnas.prune.widths import embedding_groups

Key = tuple[str, str]
Hook = Callable[..., Any]
MIXER, INPUT = "mixer", "input"
"""Writes into the residual stream that are no units: MB4D's pooling, and a stage's beginning."""


class Gates:
    """Records the gates' gradients of a network.

    Args:
        network: any network of slimnas.
        units: its units.
    """

    def __init__(self, network: Network, units: UnitVector) -> None:
        self.network, self.units = network, units
        self.blocks = blocks_of(network.architecture)
        self.groups = embedding_groups(network.architecture)
        self._batch = 0
        self._sums: dict[Key, Tensor] = {}
        self._kept: dict[Key, tuple[Tensor, Tensor | None]] = {}
        self._stream: Tensor | None = None

    @contextlib.contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Record one forward and backward pass of `batch` images.

        The gradient that goes backward must be that of the sum of the samples' losses.
        """
        self._batch = batch
        self._sums, self._kept, self._stream = {}, {}, None
        handles = [
            self._attach(module, hook, before)
            for block in self.blocks
            for module, hook, before in self._hooks(block)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._kept, self._stream = {}, None

    def gradients(self) -> Tensor:
        """What was recorded: (B, U) float64 on the CPU, one gradient per sample and unit."""
        # One transfer: a device is waited for once, not once per unit kind.
        keys = list(self._sums)
        flat = torch.cat([self._sums[key] for key in keys], dim=1).cpu().double()
        parts = torch.split(flat, [self._sums[key].shape[1] for key in keys], dim=1)
        sums = dict(zip(keys, parts, strict=True))
        out = torch.zeros(self._batch, self.units.size, dtype=torch.float64)
        for block in self.blocks:
            self._fill_block(out, block, sums)
        for (owner, kind), value in sums.items():
            if kind in (INPUT, MIXER, "attention_layer", "ffn_layer"):
                group = self.groups[int(owner.split(".")[1])]
                for stage, other in enumerate(self.groups):
                    if other == group:
                        out[:, self.units.where(EMBEDDING, str(stage))] += value
        return out

    def first_bad(self) -> str | None:
        """The layer where the backward pass first met a gradient that is not finite."""
        for (owner, kind), sums in self._sums.items():
            if not bool(torch.isfinite(sums).all()):
                return f"{owner} ({kind})"
        return None

    def _fill_block(self, out: Tensor, block: Component, sums: dict[Key, Tensor]) -> None:
        for kind in ("qk", "v", "ffn"):
            if (block.name, kind) in sums:
                out[:, self.units.where(block.name, kind)] = sums[block.name, kind]
        for kind in ("attention_layer", "ffn_layer"):
            if (block.name, kind) in sums:
                total = sums[block.name, kind].sum(dim=1, keepdim=True)
                out[:, self.units.where(block.name, kind)] = total
        attention = attention_of(block.spec)
        if attention is not None:
            values = sums[block.name, "v"].reshape(self._batch, attention.heads, attention.v_dim)
            out[:, self.units.where(block.name, "head")] = values.sum(dim=2)

    def _attach(self, module: nn.Module, hook: Hook, before: bool) -> Any:
        return (
            module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        )

    def _hooks(self, block: Component) -> Iterator[tuple[nn.Module, Hook, bool]]:
        """Modules of a block, what to call there, and whether before they run."""
        module = self.network.get_submodule(block.name)
        attention = attention_of(block.spec)
        hidden = block.spec.hidden(block.input.channels)  # type: ignore[attr-defined]
        writes = ["attention_layer"] if attention else []
        writes += [MIXER] if isinstance(block.spec, MB4D) else []
        writes += ["ffn_layer"] if hidden else []
        yield module, partial(self._enter, block), True
        if attention is not None:
            qkv = module.get_submodule(f"{ATTENTION[type(block.spec)]}.qkv")
            yield qkv, partial(self._watch_qkv, block), False
        if hidden:
            fc2 = module.get_submodule("mlp.fc2")
            yield fc2, partial(self._watch_hidden, (block.name, "ffn")), True
        if len(writes) > 1:
            between = module.get_submodule("mlp" if isinstance(block.spec, MB4D) else "norm2")
            yield between, partial(self._write_before, (block.name, writes[0])), True
        yield module, partial(self._write_after, (block.name, writes[-1])), False

    def _enter(self, block: Component, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """The residual stream as a block gets it; layouts may have changed since the last one."""
        first = block.name.endswith(".blocks.0")
        if first and block.stage == self.groups[block.stage]:
            self._stream = None
            self._written((block.name, INPUT), given[0])
        self._stream = given[0].detach()

    def _write_before(self, key: Key, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._written(key, given[0])

    def _write_after(self, key: Key, _: nn.Module, given: Any, out: Tensor) -> None:
        self._written(key, out)

    def _written(self, key: Key, stream: Tensor) -> None:
        """Watch the stream after a write. What was written is the difference it made."""
        before, self._stream = self._stream, stream.detach()
        # Kept here, not in the hook: a tensor whose hook holds it is never freed.
        self._kept[key] = (self._stream, before)
        _on_gradient(stream, partial(self._on_stream, key))

    def _watch_hidden(self, key: Key, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._kept[key] = (given[0].detach(), None)
        _on_gradient(given[0], partial(self._on_stream, key))

    def _watch_qkv(self, block: Component, module: nn.Module, given: Any, out: Tensor) -> None:
        self._kept[block.name, "qkv"] = (out.detach(), None)
        bias = cast(Tensor, cast(nn.Linear, module).bias).detach()
        _on_gradient(out, partial(self._on_qkv, block, bias))

    def _on_stream(self, key: Key, gradient: Tensor) -> None:
        value, before = self._kept.pop(key)
        self._sums[key] = self._summed(value if before is None else value - before, gradient)

    def _on_qkv(self, block: Component, bias: Tensor, gradient: Tensor) -> None:
        value, _ = self._kept.pop((block.name, "qkv"))
        attention = attention_of(block.spec)
        assert attention is not None
        queries, _, values = (_columns(rows) for rows in qkv_rows(attention))
        self._sums[block.name, "qk"] = self._summed(value[..., queries], gradient[..., queries])
        without = value[..., values] - bias[values]
        self._sums[block.name, "v"] = self._summed(without, gradient[..., values])

    def _summed(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Activation times gradient, summed per sample: tokens or a map to (B, C)."""
        product = value * gradient
        if product.dim() == 4:
            return product.sum(dim=(2, 3))
        # Windows of one image lie side by side.
        return product.reshape(self._batch, -1, product.shape[2]).sum(dim=1)


def _on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    tensor.register_hook(call)  # type: ignore[no-untyped-call]


def _columns(rows: Positions) -> Any:
    """An index for these columns; a slice, which copies nothing, where they are neighbours."""
    flat = rows.reshape(-1)
    if np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat))):
        return slice(int(flat[0]), int(flat[0]) + len(flat))
    return torch.from_numpy(flat.copy())
