"""Is a criterion right? Units are removed one at a time and the change of the loss is measured.

The first-order prediction of Molchanov et al. (CVPR 2019), section 3, beside the truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.arch.efficientformer import MB3D, MB4D
from slimnas.arch.walk import Component, walk
from slimnas.errors import PruneError
from slimnas.nn.build import Network
from slimnas.nn.layout import run_module
from slimnas.nn.units import ATTENTION, attention_of, qkv_rows
from slimnas.prune.graph import Kind, Unit
from slimnas.prune.ranks import rank_correlation
from slimnas.prune.scores import Scores, blocks_of, unit_shapes
from slimnas.prune.widths import embedding_groups

KINDS: tuple[Kind, ...] = (
    "qk",
    "v",
    "ffn",
    "head",
    "attention_layer",
    "ffn_layer",
    "embedding",
)


@dataclass(frozen=True)
class UnitCheck:
    """One unit: what was predicted and what happened.

    Attributes:
        unit: which.
        importance: its score.
        loss_change: mean loss without it minus mean loss with it.
        squared_change: mean over images of the squared change of the image's loss.
    """

    unit: Unit
    importance: float
    loss_change: float
    squared_change: float


@dataclass(frozen=True)
class KindCheck:
    """Spearman's rank correlations over the units of one kind; None where there are too few.

    Attributes:
        kind: the kind.
        units: units compared.
        with_loss: of importance and |loss_change| (or its square, which ranks alike).
        with_samples: of importance and squared_change, what `fisher` estimates.
    """

    kind: Kind
    units: int
    with_loss: float | None
    with_samples: float | None


@dataclass(frozen=True)
class FirstOrderCheck:
    """Outcome of `first_order_check`.

    Attributes:
        criterion: of the scores.
        images: images the change was measured on.
        loss: mean loss of the whole network on them.
        units: every unit removed.
    """

    criterion: str
    images: int
    loss: float
    units: tuple[UnitCheck, ...]

    def of(self, kind: Kind) -> KindCheck:
        """How well the scores rank the units of one kind."""
        mine = [unit for unit in self.units if unit.unit.kind == kind]
        importance = [unit.importance for unit in mine]
        return KindCheck(
            kind,
            len(mine),
            rank_correlation(importance, [abs(unit.loss_change) for unit in mine]),
            rank_correlation(importance, [unit.squared_change for unit in mine]),
        )

    def kinds(self) -> tuple[KindCheck, ...]:
        """`of` every kind that was looked at."""
        present = {unit.unit.kind for unit in self.units}
        return tuple(self.of(kind) for kind in KINDS if kind in present)


def first_order_check(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    scores: Scores,
    units: int,
    seed: int,
    *,
    kinds: Sequence[Kind] = KINDS,
    on_unit: Callable[[int], None] | None = None,
) -> FirstOrderCheck:
    """Remove a random sample of units of each kind, each alone, and measure the loss.

    Costs about half a forward pass per unit: what comes before its block is computed once.

    Args:
        network: what the scores are for; left as it was.
        batches: minibatches of images (B, c, H, W) and class numbers (B,).
        scores: its importance.
        units: most units of a kind.
        seed: of the sample.
        kinds: which kinds.
        on_unit: called after every removal of every minibatch, with how many there were.

    Raises:
        PruneError: scores of another network, or no images.
    """
    scores.check(network.architecture)
    sample = sample_units(network, units, seed, kinds)
    changes = torch.zeros(2, len(sample), dtype=torch.float64)
    images, total, removals = 0, 0.0, 0
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            for batch, labels in batches:
                whole = _Pass(network, batch, labels)
                for number, unit in enumerate(sample):
                    with removed(network, unit):
                        change = whole.losses_from(unit) - whole.losses
                    changes[0, number] += change.sum()
                    changes[1, number] += change.square().sum()
                    removals += 1
                    if on_unit is not None:
                        on_unit(removals)
                images, total = images + len(labels), total + float(whole.losses.sum())
    finally:
        for module, training in modes:
            module.training = training
    if not images:
        raise PruneError("first-order check: must have at least one image, got none")
    mean = (changes / images).tolist()
    found = [
        UnitCheck(unit, importance_of(scores, unit), change, squared)
        for unit, change, squared in zip(sample, *mean, strict=True)
    ]
    return FirstOrderCheck(scores.criterion, images, total / images, tuple(found))


def importance_of(scores: Scores, unit: Unit) -> float:
    """The score of one unit."""
    if unit.kind == "embedding":
        return float(scores.embedding[int(unit.part.split(".")[1])][unit.number])
    value = getattr(scores.blocks[unit.part], unit.kind)
    where = tuple(number for number in (unit.head, unit.number) if number >= 0)
    return float(value[where] if where else value)


def sample_units(network: Network, count: int, seed: int, kinds: Sequence[Kind]) -> list[Unit]:
    """At most `count` units of each kind, drawn without replacement, in execution order."""
    generator = np.random.default_rng(seed)
    sample: list[Unit] = []
    for kind in kinds:
        every = list(_units(network, kind))
        drawn = generator.permutation(len(every))[:count]
        sample += [every[number] for number in sorted(drawn)]
    return sample


@contextlib.contextmanager
def removed(network: Network, unit: Unit) -> Iterator[None]:
    """Run the network without `unit` inside: what it adds is zero (a value: its bias).

    That is what surgery leaves, except for `embedding`: LayerNorm still counts the channel.
    """
    handles = list(_remove(network, unit))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Pass:
    """A forward pass whose beginning can be used again.

    Attributes:
        losses: of the images, (B,) float64 on the CPU.
    """

    def __init__(self, network: Network, images: Tensor, labels: Tensor) -> None:
        self.network = network
        first = next(network.parameters())
        self.labels = labels.to(first.device)
        self.parts = list(walk(network.architecture))
        self.inputs = {self.parts[0].name: images.to(first.device, first.dtype)}
        network(self.inputs["stem"][:1])  # refuses images of another size in one line
        self.losses = self._run(self.parts, self.inputs)

    def losses_from(self, unit: Unit) -> Tensor:
        """The losses again, from the first part on that `unit` is in."""
        start = 0
        if unit.kind != "embedding":
            start = [part.name for part in self.parts].index(unit.part)
        return self._run(self.parts[start:], dict(self.inputs))

    def _run(self, parts: list[Component], inputs: dict[str, Tensor]) -> Tensor:
        x = inputs[parts[0].name]
        for part in parts:
            inputs[part.name] = x
            module = self.network.get_submodule(part.name)
            # A stem takes an image; its layout is that of what it gives.
            x = module(x) if part.kind == "stem" else run_module(module, x, part.input)
        return cross_entropy(x, self.labels, reduction="none").cpu().double()


def _units(network: Network, kind: Kind) -> Iterator[Unit]:
    architecture = network.architecture
    if kind == "embedding":
        for stage in sorted(set(embedding_groups(architecture))):
            for channel in range(architecture.widths[stage]):
                yield Unit(kind, f"stages.{stage}", -1, channel)
        return
    for block in blocks_of(architecture):
        shape = unit_shapes(block)[kind]
        if kind in ("attention_layer", "ffn_layer"):
            if _sub_layer(network, block, kind) is not None:
                yield Unit(kind, block.name)
        elif kind == "head":
            yield from (Unit(kind, block.name, head) for head in range(shape[0]))
        elif kind == "ffn":
            yield from (Unit(kind, block.name, -1, number) for number in range(shape[0]))
        else:
            yield from (Unit(kind, block.name, *where) for where in np.ndindex(*shape))


def _sub_layer(network: Network, block: Component, kind: str) -> nn.Module | None:
    """The module whose output is what a sub-layer adds to the residual stream."""
    scaled = isinstance(block.spec, (MB3D, MB4D))  # a learned factor comes last
    module = network.get_submodule(block.name)
    if kind == "attention_layer":
        if attention_of(block.spec) is None:
            return None
        return module.get_submodule("ls1" if scaled else ATTENTION[type(block.spec)])
    hidden = unit_shapes(block)["ffn"][0]
    return module.get_submodule("ls2" if scaled else "mlp") if hidden else None


def _remove(network: Network, unit: Unit) -> Iterator[Any]:
    if unit.kind == "embedding":
        yield from _remove_channel(network, unit)
        return
    block = next(b for b in blocks_of(network.architecture) if b.name == unit.part)
    module = network.get_submodule(block.name)
    if unit.kind in ("attention_layer", "ffn_layer"):
        layer = _sub_layer(network, block, unit.kind)
        assert layer is not None
        yield _on_output(layer, slice(None), 0.0)
    elif unit.kind == "ffn":
        yield _on_output(module.get_submodule("mlp.act"), unit.number, 0.0)
    else:
        attention = attention_of(block.spec)
        assert attention is not None
        qkv = module.get_submodule(f"{ATTENTION[type(block.spec)]}.qkv")
        queries, _, values = qkv_rows(attention)
        if unit.kind == "qk":
            yield _on_output(qkv, int(queries[unit.head, unit.number]), 0.0)
            return
        mine = values[unit.head] if unit.kind == "head" else values[unit.head, [unit.number]]
        rows = torch.from_numpy(mine.copy())
        yield _on_output(qkv, rows, cast(Tensor, qkv.bias).detach()[rows])


def _remove_channel(network: Network, unit: Unit) -> Iterator[Any]:
    """Zero a channel of everything that is written into a residual stream."""
    architecture = network.architecture
    first = int(unit.part.split(".")[1])
    for part in walk(architecture):
        if part.kind == "head" or embedding_groups(architecture)[part.stage] != first:
            continue
        module = network.get_submodule(part.name)
        if part.kind == "block":
            for writer in _writers(network, part):
                yield _on_output(writer, unit.number, 0.0)
        elif part.kind == "downsample" or architecture.stages[0].downsample is None:
            yield _on_output(module, unit.number, 0.0)


def _writers(network: Network, block: Component) -> list[nn.Module]:
    layers = [_sub_layer(network, block, kind) for kind in ("attention_layer", "ffn_layer")]
    if isinstance(block.spec, MB4D):  # its pooling is no unit, but it writes
        layers.append(network.get_submodule(f"{block.name}.ls1"))
    return [layer for layer in layers if layer is not None]


def _on_output(module: nn.Module, channels: Any, value: Any) -> Any:
    """Set these channels of what `module` gives."""

    def hook(_: nn.Module, given: Any, out: Tensor) -> Tensor:
        changed = out.clone()
        if changed.dim() == 4:
            changed[:, channels] = value
        else:
            changed[..., channels] = value
        return changed

    return module.register_forward_hook(hook)
