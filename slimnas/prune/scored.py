"""A network with the importance of its units, in the basis they were estimated in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slimnas.arch.cost import cost
from slimnas.errors import PruneError
from slimnas.nn.build import Network, build
from slimnas.nn.tensorfiles import tensors_digest
from slimnas.prune.basis import to_principal_basis
from slimnas.prune.calibration import Batches, Calibration
from slimnas.prune.scores import Scores
from slimnas.prune.taylor import ScoreRun
from slimnas.train.interrupt import deferred_interrupt
from slimnas.zoo.entry import ARCHITECTURE, WEIGHTS, save_model
from slimnas.zoo.metrics import Metric
from slimnas.zoo.weights import load_weights

SCORED = "scored"
SCORES = "scores.safetensors"
STATE = "scoring.safetensors"
BASIS_IMAGES = 400
"""Images that show the principal axes; more move them little."""
SAVE_SECONDS = 20.0

OnImages = Callable[[str, int, int], None]
"""Stage, images done, images in all."""


@dataclass(frozen=True)
class Scored:
    """A network and its importance scores."""

    network: Network
    scores: Scores


@dataclass(frozen=True)
class Scoring:
    """How importance is estimated.

    Attributes:
        criterion: one of `slimnas.prune.taylor.CRITERIA`.
        basis: `principal` turns heads into their principal axes first, `channels` does not.
        batch_size: images per minibatch.
        seed: of the `random` criterion.
        calibration: the images.
        device: where it is done.
    """

    criterion: str
    basis: str
    batch_size: int
    seed: int
    calibration: Calibration
    device: torch.device


def scored_network(network: Network, scoring: Scoring, folder: Path, on_images: OnImages) -> Scored:
    """Turn `network` into its basis and score it, keeping both in `folder`.

    What is there already is not done again, and a scoring pass that was stopped goes on.

    Args:
        network: left as it is.
        scoring: how.
        folder: gets `scored/` and `scores.safetensors`.
        on_images: told after every minibatch.

    Raises:
        PruneError: see `to_principal_basis` and `ScoreRun`; or a foreign file in the folder.
        WeightsError: a damaged file in the folder.
        KeyboardInterrupt: the pass was interrupted; its state is written.
    """
    turned = _turned(network, scoring, folder / SCORED, on_images).to(scoring.device)
    path = folder / SCORES
    if path.is_file():
        scores = Scores.load(path)
        scores.check(turned.architecture, str(path))
        _require_weights(scores, turned, path)
    else:
        scores = _score(turned, scoring, folder / STATE, on_images)
        scores.save(path)
    (folder / STATE).unlink(missing_ok=True)
    return Scored(turned, scores)


def load_scored(path: str | Path, network: Network) -> Scored:
    """Scores of `network` from a file of another run, whose turned network lies beside it.

    Raises:
        PruneError: they are for another architecture or other weights.
        WeightsError: a damaged file.
    """
    path = Path(path)
    scores = Scores.load(path)
    scores.check(network.architecture, str(path))
    beside = path.parent / SCORED
    if scores.weights != _digest(network) and (beside / ARCHITECTURE).is_file():
        turned = build(network.architecture).eval()
        turned.load_state_dict(load_weights(beside / WEIGHTS, network.architecture))
        network = turned
    _require_weights(scores, network, path)
    return Scored(network, scores)


def _turned(network: Network, scoring: Scoring, folder: Path, on_images: OnImages) -> Network:
    architecture = network.architecture
    if (folder / ARCHITECTURE).is_file():
        turned = build(architecture).eval()
        turned.load_state_dict(load_weights(folder / WEIGHTS, architecture))
        return turned
    turned = network
    if scoring.basis == "principal":
        images = scoring.calibration.images
        total = min(BASIS_IMAGES, len(images))
        batches = Batches(images, scoring.batch_size, scoring.device, limit=total)
        network.to(scoring.device)
        turned = to_principal_basis(
            network, batches, on_batch=lambda done: on_images("basis", done, total)
        )
    counted = cost(architecture)
    save_model(
        folder,
        architecture=architecture,
        weights=turned.state_dict(),
        metrics={
            "params": Metric(counted.params, "computed by closed form"),
            "macs": Metric(counted.macs, "computed by closed form, one image"),
        },
    )
    return turned


def _score(network: Network, scoring: Scoring, state: Path, on_images: OnImages) -> Scores:
    run = ScoreRun(
        network, (scoring.criterion,), seed=scoring.seed, data=scoring.calibration.digest
    )
    if state.is_file():
        run.load(state)
    images = scoring.calibration.images
    saved_at = time.monotonic()
    if run.needs_images:
        with deferred_interrupt() as interrupted:
            batches = Batches(images, scoring.batch_size, scoring.device, start=run.batches)
            for pixels, labels in batches:
                run.step(pixels, labels)
                on_images("importance", run.images, len(images))
                if interrupted() or time.monotonic() - saved_at > SAVE_SECONDS:
                    run.save(state)
                    saved_at = time.monotonic()
                if interrupted():
                    raise KeyboardInterrupt
    return run.result()[scoring.criterion]


def _require_weights(scores: Scores, network: Network, path: Path) -> None:
    if scores.weights != _digest(network):
        raise PruneError(
            f"{path}: its scores are for other weights ({scores.weights[:12]}) than "
            f"{network.architecture.name} has here ({_digest(network)[:12]}); keep the file beside "
            f"the {SCORED} folder of its run, or score this model again"
        )


def _digest(network: Network) -> str:
    return tensors_digest(network.state_dict())
