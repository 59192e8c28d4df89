"""`apply_plan`: the network that a width plan leaves, with the weights of the one it was made from.

The function of the network changes only by what is removed:

- Logits are scaled by qk_dim**-0.5 of the block as it is, so from d to d' dims the queries are
  multiplied by sqrt(d' / d).
- Rows of attention sum to one, so a removed value dim still adds its bias, times its column of the
  output projection, to every token. That constant goes into the projection's bias.
- A sub-layer that is removed whole adds nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.nn.build import Network, build
from slimnas.nn.units import (
    ATTENTION,
    STEM_HIDDEN,
    Positions,
    attention_of,
    qkv_rows,
    unit_axes,
    unit_positions,
)
from slimnas.prune.supported import check_network
from slimnas.prune.widths import WidthPlan, stream_stage

Tensors = dict[str, Tensor]


def apply_plan(plan: WidthPlan, network: Network, *, name: str | None = None) -> Network:
    """Return a new network with what `plan` keeps of `network`, which is left as it is.

    Device, dtypes, training mode and `requires_grad` of every part are kept.

    Args:
        plan: made for the network's architecture.
        network: built by slimnas, not folded.
        name: the new architecture's; `{source}_pruned` if not given.

    Raises:
        PruneError: a plan for another architecture or that does not fit, or a network with modules
            that cannot be pruned.
    """
    check_network(network)
    source = network.architecture
    pruned = build(plan.architecture(source, name=name))
    first = next(network.parameters())
    pruned.to(device=first.device, dtype=first.dtype)
    everything = network.state_dict()
    state: Tensors = {}
    # Containers have the same names in both; the parts of components are written over below.
    modes = {key: module.training for key, module in network.named_modules()}
    trainable: dict[str, bool] = {}
    for before, after in survivors(plan, source, pruned.architecture):
        prefix = f"{before.name}."
        own = {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}
        part = network.get_submodule(before.name)
        for key, value in _Surgery(plan, source, before, own).tensors().items():
            state[f"{after}.{key}"] = value
        for key, module in part.named_modules(prefix=after):
            modes[key] = module.training
        for key, parameter in part.named_parameters(prefix=after):
            trainable[key] = parameter.requires_grad
    pruned.load_state_dict({key: state[key] for key in pruned.state_dict()}, assign=True)
    for key, parameter in pruned.named_parameters():
        parameter.requires_grad_(trainable[key])
    for key, module in pruned.named_modules():
        module.training = modes[key]
    return pruned


def survivors(
    plan: WidthPlan, source: Architecture, pruned: Architecture
) -> Iterator[tuple[Component, str]]:
    """Every component that stays, and its name in the pruned network."""
    names = iter([part.name for part in walk(pruned)])
    for part in walk(source):
        if part.kind != "block" or not plan.blocks[part.name].vanishes:
            yield part, next(names)


@dataclass(frozen=True)
class _Surgery:
    """Cuts the tensors of one component.

    Attributes:
        plan: what stays.
        source: the architecture before.
        component: of `source`; not a block that vanishes.
        state: its tensors before, by their names inside it.
    """

    plan: WidthPlan
    source: Architecture
    component: Component
    state: Mapping[str, Tensor]

    def tensors(self) -> Tensors:
        """The tensors after; those of a sub-layer that goes are still there, without units."""
        declared = unit_axes(self.component)
        roles = {role for axes in declared.values() for role in axes if role is not None}
        present = {role for name in self.state for role in declared.get(name, ()) if role}
        kept = {role: torch.from_numpy(self._kept(role)) for role in sorted(roles & present)}
        tensors = {}
        for name, tensor in self._same_function().items():
            for axis, role in enumerate(declared.get(name, ())):
                if role is not None:
                    tensor = tensor.index_select(axis, kept[role].to(tensor.device))
            tensors[name] = tensor.clone()
        return tensors

    def _kept(self, role: str) -> Positions:
        """Positions that stay of an axis with this role, ascending."""
        if role == STEM_HIDDEN:
            return self._kept_in_stem()
        kept: list[Positions] = []
        for family, positions in unit_positions(self.component, role).items():
            if family in ("in", "out"):
                kept.append(positions[self._channels(family, len(positions))])
                continue
            block = self.plan.blocks[self.component.name]
            if family == "ffn":
                kept.append(positions[list(block.ffn)])
            elif family == "head":
                kept.append(positions[list(block.heads)])
            else:
                dims = block.qk if family == "qk" else block.v
                kept += [positions[h, list(d)] for h, d in zip(block.heads, dims, strict=True)]
        flat = [positions.reshape(-1) for positions in kept]
        return np.sort(np.concatenate(flat)) if flat else np.zeros(0, dtype=np.int64)

    def _channels(self, side: str, width: int) -> list[int]:
        stage = stream_stage(self.source, self.component, side)
        return list(range(width) if stage is None else self.plan.kept_channels(stage, width))

    def _kept_in_stem(self) -> Positions:
        """The half that stays between a stem's convolutions: the largest weights around it.

        By the sum of squares of what writes and reads a channel, equals in their own order.
        """
        stay = len(self._channels("out", self.component.output.channels)) // 2
        squares = torch.zeros(self.component.output.channels // 2, dtype=torch.float64)
        for name, axes in unit_axes(self.component).items():
            if STEM_HIDDEN in axes and name.endswith((".weight", ".bias")):
                others = [a for a in range(self.state[name].dim()) if a != axes.index(STEM_HIDDEN)]
                weights = self.state[name].detach().cpu().double().square()
                squares += weights.sum(others) if others else weights
        order = torch.argsort(squares, descending=True, stable=True)[:stay].sort().values
        return np.asarray(order.numpy(), dtype=np.int64)

    def _same_function(self) -> Tensors:
        """The tensors with queries scaled and the biases of values that go folded away."""
        state = dict(self.state)
        attention = attention_of(self.component.spec)
        if attention is None or not self.plan.blocks[self.component.name].heads:
            return state
        block = self.plan.blocks[self.component.name]
        module = ATTENTION[type(attention)]
        queries, _, values = qkv_rows(attention)
        if block.qk_dim != attention.qk_dim:
            rows = torch.from_numpy(queries.reshape(-1).copy())
            for name in (f"{module}.qkv.weight", f"{module}.qkv.bias"):
                whole = state[name].clone()
                factor = math.sqrt(block.qk_dim / attention.qk_dim)
                whole[rows.to(whole.device)] *= factor
                state[name] = whole
        goes = np.ones((attention.heads, attention.v_dim), dtype=bool)
        for head, dims in zip(block.heads, block.v, strict=True):
            goes[head, list(dims)] = False
        if goes.any():
            bias = state[f"{module}.qkv.bias"].cpu().double()[torch.from_numpy(values[goes])]
            columns = torch.from_numpy(np.flatnonzero(goes))
            weight = state[f"{module}.proj.weight"].cpu().double()[:, columns]
            old = state[f"{module}.proj.bias"]
            state[f"{module}.proj.bias"] = (old.cpu().double() + weight @ bias).to(old)
        return state
