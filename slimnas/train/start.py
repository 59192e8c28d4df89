"""The network that training begins with: an architecture, and weights if it has any."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from slimnas.arch.architecture import Architecture
from slimnas.data.whole import Normalisation
from slimnas.errors import SpecError, WeightsError
from slimnas.nn.build import Network
from slimnas.train.config import FRESH
from slimnas.zoo.create import create_model, find_weights, published_weights
from slimnas.zoo.entry import Entry
from slimnas.zoo.preprocessing import normalisation_of
from slimnas.zoo.registry import get


@dataclass(frozen=True)
class Start:
    """What `--model` and its companions name, found and not yet built.

    Attributes:
        model: as it was asked for.
        name: of the network.
        architecture: at the resolution of training, with its own classes.
        weights: the file training begins with; None for fresh weights.
        words: where the weights are from.
        zoo: the user's zoo.
    """

    model: str
    name: str
    architecture: Architecture
    weights: Path | None
    words: str
    zoo: str | Path | None = None

    @property
    def normalisation(self) -> Normalisation | None:
        """What the weights' images were normalised with, as far as that is known.

        Raises:
            SpecError: the architecture's provenance holds nonsense there.
        """
        return None if self.weights is None else normalisation_of(self.architecture)

    @property
    def weights_digest(self) -> str | None:
        """SHA-256 of the weights file."""
        if self.weights is None:
            return None
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def build(self, classes: int, *, seed: int) -> Network:
        """The network for `classes`, whose classifiers start afresh if it had others.

        Raises:
            WeightsError: the weights are not those of the architecture.
        """
        shape = self.architecture.input.shape
        return create_model(
            self.model,
            pretrained=False if self.weights is None else self.weights,
            classes=classes,
            resolution=(shape.height, shape.width),
            zoo=self.zoo,
            seed=seed,
        )


def find_start(
    model: str,
    *,
    weights: Path | None = None,
    pretrained: bool = False,
    from_scratch: bool = False,
    resolution: int | None = None,
    zoo: str | Path | None = None,
) -> Start:
    """Find the network that `model` names and decide what its training begins with.

    Weights that lie beside the architecture (of a search, a pruning or a training run, or in the
    user's zoo) are taken; published ones are, if asked for.

    Args:
        model: what `slimnas.zoo.registry.get` finds.
        weights: a file with the weights to begin with.
        pretrained: begin with the published weights, downloaded, or the model's own.
        from_scratch: begin with fresh weights, whatever there is.
        resolution: side of the images, pixels; None for the architecture's own.
        zoo: see `slimnas.zoo.registry.zoo_folder`.

    Raises:
        ZooError: nothing of that name.
        SpecError: two of the three ways to begin, or a resolution the family cannot take.
        WeightsError: no such file, or `pretrained` and there are none or none to be downloaded.
    """
    asked = (weights is not None, pretrained, from_scratch)
    if sum(asked) > 1:
        raise SpecError("--weights, --pretrained and --from-scratch exclude each other; give one")
    entry = get(model, zoo=zoo)
    path = weights
    if path is None and not from_scratch:
        path = find_weights(entry) if pretrained else entry.weights
    if weights is not None and not weights.is_file():
        raise WeightsError(f"{weights}: no such file; expected the weights to begin with")
    architecture = entry.architecture
    if resolution is not None:
        architecture = architecture.with_resolution(resolution)
    return Start(model, entry.name, architecture, path, _words(entry, path, weights), zoo)


def _words(entry: Entry, path: Path | None, given: Path | None) -> str:
    if path is None:
        return FRESH
    published = published_weights(entry)
    if given is None and entry.weights is None and published is not None:
        return f"{published.get('repository', 'published')} from the hub"
    return str(path)
