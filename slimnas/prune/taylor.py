"""Importance of every unit of a network: how much the loss would change if it were removed.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019), section 3. What a
unit is, and what goes with it: `slimnas.prune.gates` (criteria of gates) and
`slimnas.prune.unit_sums` (criteria of weights).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimnas.errors import DataError, PruneError, suggest
from slimnas.nn.build import Network
from slimnas.nn.tensorfiles import load_tensors, save_tensors, tensors_digest
from slimnas.prune.gates import Gates
from slimnas.prune.scores import Scores
from slimnas.prune.supported import check_network
from slimnas.prune.unit_sums import UnitSums
from slimnas.prune.vector import UnitVector

CRITERIA = {
    "taylor": "squared gradient of a unit's gate, of the mean loss per minibatch, averaged",
    "fisher": "squared gradient of a unit's gate per sample, averaged",
    "taylor_weight": "sum of (gradient x weight)^2 over a unit's weights, per minibatch, averaged",
    "taylor_abs": "sum of |gradient x weight| over a unit's weights, gradient of all images",
    "magnitude": "sum of squares of a unit's weights; needs no images",
    "random": "uniform random numbers from the seed; needs no images",
}
"""Criterion -> what it is. A gate's gradient is the sum of gradient x weight of the unit's rows."""

GATED = frozenset({"taylor", "fisher"})
BY_GRADIENT = frozenset({"taylor_weight", "taylor_abs"})
SCHEMA = "slimnas/score-run/1"
WHAT = "an unfinished importance run"


class ScoreRun:
    """An importance pass that can be stopped after any minibatch and continued.

    Continued on the same kind of CPU, it ends with the same scores bit by bit. The network is left
    as it was after every step: training mode, `requires_grad`, gradients.

    Args:
        network: any network of slimnas, on any device; folded ones are refused.
        criteria: some of `CRITERIA`.
        seed: of the `random` criterion.
        data: digest of the images; computed from them if not given.

    Raises:
        PruneError: an unknown criterion, or a network that cannot be pruned.

    Attributes:
        batches: minibatches seen.
        images: images seen.
    """

    def __init__(
        self,
        network: Network,
        criteria: Sequence[str] = ("fisher",),
        *,
        seed: int = 0,
        data: str | None = None,
    ) -> None:
        for criterion in criteria:
            if criterion not in CRITERIA:
                raise PruneError(
                    f"criterion: must be one of {', '.join(CRITERIA)}, got {criterion!r}"
                    f"{suggest(criterion, CRITERIA)}"
                )
        check_network(network)
        self.network, self.criteria, self.seed = network, tuple(dict.fromkeys(criteria)), seed
        self.batches = self.images = self.batch_size = 0
        self._given_data = data
        self._data = data or ""
        self._weights = tensors_digest(network.state_dict())
        self._units = UnitVector(network.architecture)
        self._gates = Gates(network, self._units)
        self._unit_sums = UnitSums(network, self._units)
        self._gated = bool(GATED & set(self.criteria))
        self._by_gradient = bool(BY_GRADIENT & set(self.criteria))
        self._sums = {
            name: torch.zeros(self._units.size, dtype=torch.float64)
            for name in self.criteria
            if name in GATED | {"taylor_weight"}
        }
        self._gradients: dict[str, Tensor] = {}

    @property
    def needs_images(self) -> bool:
        """Whether any of the criteria looks at images."""
        return self._gated or self._by_gradient

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Add one minibatch: images (B, c, H, W) and class numbers (B,).

        Raises:
            InputSizeError: images of another size than the network was built for.
            DataError: labels that are no classes of the network, or an empty minibatch.
            PruneError: a loss or gradient that is not finite; says in which layer and minibatch.
        """
        number, classes = self.batches + 1, self.network.architecture.head.classes
        if labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"minibatch {number}: must have one label per image and at least one image, got "
                f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(
                f"minibatch {number}: labels must be 0 to {classes - 1}, the network's classes, "
                f"got {int(labels.min())} to {int(labels.max())}; give images of its classes"
            )
        first = next(self.network.parameters())
        with scoring(self.network, by_gradient=self._by_gradient):
            self._pass(images.to(first.device, first.dtype), labels.to(first.device))
        if self._given_data is None:
            batch = tensors_digest({"images": images, "labels": labels})
            self._data = hashlib.sha256((self._data + batch).encode()).hexdigest()
        self.batch_size = self.batch_size or len(images)
        self.batches, self.images = number, self.images + len(images)

    def result(self) -> dict[str, Scores]:
        """The scores so far, by criterion.

        Raises:
            PruneError: a criterion needs images and has seen none.
        """
        if self.needs_images and not self.batches:
            raise PruneError(
                f"{', '.join(self.criteria)}: must see at least one image, got none; only "
                "magnitude and random need no images"
            )
        return {name: self._scores(name) for name in self.criteria}

    def save(self, path: str | Path) -> None:
        """Write everything that `load` needs to continue, atomically.

        Raises:
            RunFolderError: the place cannot be written.
        """
        gradients = {f"gradient.{name}": value for name, value in self._gradients.items()}
        progress = {
            "batches": self.batches,
            "images": self.images,
            "batch_size": self.batch_size,
            "data": self._data,
        }
        save_tensors(path, {**self._sums, **gradients}, {**self._identity(), "progress": progress})

    def load(self, path: str | Path) -> None:
        """Continue where `save` was called; the next minibatch is number `batches` from 0.

        Raises:
            WeightsError: the file is missing or damaged.
            PruneError: it holds something else, or a run of other settings, weights or images.
        """
        tensors, metadata = load_tensors(path, WHAT)
        for key, want in self._identity().items():
            if metadata.get(key) != want:
                raise PruneError(
                    f"{path}: {key}: must be {want!r} to continue this run, got "
                    f"{metadata.get(key)!r}; remove the file to start again"
                )
        gradients = dict(self.network.named_parameters()) if self.keeps_gradients else {}
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self._sums, (self._units.size,))
        shapes |= {f"gradient.{name}": tuple(value.shape) for name, value in gradients.items()}
        progress = metadata.get("progress", {})
        started = bool(progress.get("batches"))
        wanted = {k: v for k, v in shapes.items() if started or not k.startswith("gradient.")}
        if wanted != {name: tuple(value.shape) for name, value in tensors.items()}:
            raise PruneError(f"{path}: damaged, its sums do not fit; remove it to start again")
        self._sums = {name: tensors[name] for name in self._sums}
        self._gradients = {name: tensors[f"gradient.{name}"] for name in gradients if started}
        self.batches, self.images = progress["batches"], progress["images"]
        self.batch_size, self._data = progress["batch_size"], progress["data"]

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradient of all images is kept, a float64 copy of the weights' size."""
        return "taylor_abs" in self.criteria

    def _identity(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "architecture": self.network.architecture.digest,
            "weights": self._weights,
            "criteria": list(self.criteria),
            "seed": self.seed,
            "given_data": self._given_data,
        }

    def _pass(self, images: Tensor, labels: Tensor) -> None:
        """One forward and backward pass, and what it adds to the sums."""
        parameters = dict(self.network.named_parameters()) if self._by_gradient else {}
        count = len(images)
        if count == 1:
            # BatchNorm's backward on a CPU misreads the gradient of one image that comes from
            # tokens, whose strides look like those of a map (torch 2.13). Two it reads well.
            images, labels = images.repeat(2, 1, 1, 1), labels.repeat(2)
        with contextlib.ExitStack() as hooks:
            if self._gated:
                hooks.enter_context(self._gates.recording(len(images)))
            sources: list[Tensor] = list(parameters.values())
            if not parameters:
                hooks.enter_context(_graph_begins_after_stem(self.network, sources))
            logits = self.network(images)
            # Summed, not averaged: every sample's own gradient is in it unscaled.
            loss = cross_entropy(logits, labels, reduction="sum")
            found = torch.autograd.grad(loss, sources)
        gates = self._gates.gradients()[:count] if self._gated else None
        gradients = {n: g / len(images) for n, g in zip(parameters, found, strict=False)}
        self._check_finite(images, loss.detach(), gates, gradients)
        if gates is not None and "fisher" in self._sums:
            self._sums["fisher"] += gates.square().sum(dim=0)
        if gates is not None and "taylor" in self._sums:
            self._sums["taylor"] += gates.mean(dim=0).square()
        if "taylor_weight" in self._sums:
            products = {n: (g * parameters[n].detach()).square() for n, g in gradients.items()}
            self._sums["taylor_weight"] += self._unit_sums(products)
        if self.keeps_gradients:
            for name, gradient in gradients.items():
                mine = gradient.cpu().double() * count
                self._gradients[name] = self._gradients[name] + mine if self.batches else mine

    def _check_finite(
        self, images: Tensor, loss: Tensor, gates: Tensor | None, gradients: dict[str, Tensor]
    ) -> None:
        batch = f"minibatch {self.batches + 1}"
        if not bool(torch.isfinite(loss)):
            if not bool(torch.isfinite(images).all()):
                raise PruneError(f"{batch}: images must be finite, got NaN or infinity")
            raise PruneError(
                f"{_first_bad_output(self.network, images)}: its output must be finite, it is not "
                f"in {batch}; check the weights, or use float32"
            )
        bad = None
        if gates is not None and not bool(torch.isfinite(gates).all()):
            bad = self._gates.first_bad()
        elif gradients:
            totals = torch.stack([gradient.sum() for gradient in gradients.values()])
            wrong = torch.isfinite(totals).logical_not().nonzero()
            bad = list(gradients)[int(wrong[-1])] if len(wrong) else None
        if bad is not None:
            raise PruneError(
                f"{bad}: its gradient must be finite, it is not in {batch}; check the weights, or "
                "use float32"
            )

    def _scores(self, criterion: str) -> Scores:
        blocks, embedding = self._units.split(self._vector(criterion))
        return Scores(
            criterion=criterion,
            architecture=self.network.architecture.digest,
            weights=self._weights,
            data=self._data,
            images=self.images,
            batch_size=self.batch_size,
            seed=self.seed,
            blocks=blocks,
            embedding=embedding,
        )

    def _vector(self, criterion: str) -> Tensor:
        if criterion == "random":
            generator = np.random.default_rng(self.seed)
            return torch.from_numpy(generator.random(self._units.size))
        if criterion == "fisher":
            return self._sums[criterion] / self.images
        if criterion in self._sums:
            return self._sums[criterion] / self.batches
        weights = {n: p.detach().cpu().double() for n, p in self.network.named_parameters()}
        if criterion == "magnitude":
            return self._unit_sums({name: value.square() for name, value in weights.items()})
        mean = {name: value / self.images for name, value in self._gradients.items()}
        return self._unit_sums({name: (weights[name] * g).abs() for name, g in mean.items()})


def score_all(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    criteria: Sequence[str],
    *,
    seed: int = 0,
    data: str | None = None,
    on_batch: Callable[[ScoreRun], None] | None = None,
) -> dict[str, Scores]:
    """Score every unit by several criteria in one pass over the images.

    Args:
        network: any network of slimnas, on any device; left as it was.
        batches: minibatches of images (B, c, H, W) and class numbers (B,); not looked at if no
            criterion needs images.
        criteria: some of `CRITERIA`.
        seed: of the `random` criterion.
        data: digest of the images; computed from them if not given.
        on_batch: called after every minibatch.

    Raises:
        InputSizeError, DataError, PruneError: see `ScoreRun`.
    """
    run = ScoreRun(network, criteria, seed=seed, data=data)
    if run.needs_images:
        for images, labels in batches:
            run.step(images, labels)
            if on_batch is not None:
                on_batch(run)
    return run.result()


def score(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: str,
    *,
    seed: int = 0,
    data: str | None = None,
    on_batch: Callable[[ScoreRun], None] | None = None,
) -> Scores:
    """Score every unit by one criterion; see `score_all`."""
    scores = score_all(network, batches, (criterion,), seed=seed, data=data, on_batch=on_batch)
    return scores[criterion]


@contextlib.contextmanager
def scoring(network: nn.Module, *, by_gradient: bool) -> Iterator[None]:
    """Evaluation mode inside, and gradients of all weights or of none; as it was after."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        network.eval()
        network.requires_grad_(by_gradient)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _graph_begins_after_stem(network: Network, sources: list[Tensor]) -> Iterator[None]:
    """Let the backward pass end at the stem's output, which is added to `sources`.

    Gates need no gradients of weights, a third of the work of a backward pass.
    """

    def begin(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_()
        sources.append(leaf)
        return leaf.view_as(leaf)  # not the leaf itself: hooks are for what has a history

    handle = network.stem.register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def _first_bad_output(network: nn.Module, images: Tensor) -> str:
    """Name of the first layer, in order of execution, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
                found.append(name)

        return look

    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "loss"
