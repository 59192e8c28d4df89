"""The weights a pruner starts from: given, downloaded, or trained here for want of a network.

A built-in model's weights are downloaded. Where the hub cannot be reached, the model is trained
briefly on scikit-learn's digits at a small resolution, so that everything can still be tried; the
result is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import slimnas
from slimnas._lock import folder_lock
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.swin import SwinStem
from slimnas.arch.vit import ViTStem
from slimnas.data.splits import DataOptions
from slimnas.data.whole import Normalisation, WholeData, open_whole
from slimnas.errors import PruneError, WeightsError
from slimnas.nn.build import Network, build
from slimnas.prune.finetune import evaluate, train_on_labels
from slimnas.train.devices import accelerator_for
from slimnas.train.loop import StepReport
from slimnas.train.recipe import TrainRecipe
from slimnas.zoo.create import create_model, find_weights
from slimnas.zoo.entry import ARCHITECTURE, Entry, load_entry, save_model
from slimnas.zoo.hub import hub_in_reach
from slimnas.zoo.metrics import Metric
from slimnas.zoo.preprocessing import normalisation_of
from slimnas.zoo.registry import get
from slimnas.zoo.weights import load_weights

CACHE_VARIABLE = "SLIMNAS_CACHE"
STATE = "training.safetensors"
DIGITS = "digits"
TRAINED_ACCURACY = "digits_top1_percent"
MOST_EPOCHS, FEWEST_EPOCHS = 11, 4
BUDGET_MACS = 6e12
"""Multiply-adds that training may take: about two minutes on two cores."""

OnStep = Callable[[StepReport], None]


@dataclass(frozen=True)
class Start:
    """A network to prune.

    Attributes:
        network: on the CPU, in evaluation mode.
        name: of the model.
        source: where its weights are from, in words.
        normalisation: mean and deviation its images are normalised with; None: the data's own.
        trained_on: the data it was trained on here; None where its weights were given.
    """

    network: Network
    name: str
    source: str
    normalisation: Normalisation | None
    trained_on: str | None = None


class NoHubError(WeightsError):
    """Raised when published weights are wanted and the hub cannot be reached."""


def open_start(model: str, weights: str, *, zoo: str | Path | None = None) -> Start:
    """The network that `--model` and `--weights` name.

    Args:
        model: a zoo name, run folder or architecture file.
        weights: `auto`, `none` or a weights file.
        zoo: see `slimnas.zoo.registry.zoo_folder`.

    Raises:
        NoHubError: `auto`, and the model's published weights cannot be downloaded.
        PruneError: `none`.
        ZooError, SpecError, WeightsError: no such model, or weights that do not fit.
    """
    entry = get(model, zoo=zoo)
    if weights == "none":
        raise PruneError(
            f"--weights none: importance needs trained weights, {entry.name} without them has "
            "none; give a weights file, or leave --weights out to take published ones"
        )
    if weights == "auto":
        path = _find(entry)
        source = _described(entry, path)
    else:
        path = Path(weights)
        source = str(path)
    network = build(entry.architecture).eval()
    network.load_state_dict(load_weights(path, entry.architecture))
    return Start(network, entry.name, source, normalisation_of(entry.architecture))


def train_start(model: str, *, seed: int, train_on: str, spare: Path, on_step: OnStep) -> Start:
    """The model, trained here on digits at a small resolution, or found in the cache.

    Stopped at any moment, it goes on where it was.

    Args:
        model: see `open_start`.
        seed: of weights and batches.
        train_on: auto, cpu, cuda or mps.
        spare: where the result goes if the user's cache cannot be written.
        on_step: called after every step; the last of `steps` ends it.

    Raises:
        RunFolderError: another process trains the same model.
        WeightsError: a damaged file in the cache.
    """
    entry = get(model)
    data = open_digits(proxy_architecture(entry.architecture, 10), seed=seed)
    target = proxy_architecture(entry.architecture, len(data.class_names))
    recipe = proxy_recipe(target, len(data.images))
    identity = json.dumps(
        [target.digest, recipe.model_dump(mode="json"), seed, data.digest, slimnas.__version__]
    )
    key = hashlib.sha256(identity.encode()).hexdigest()
    folder = _writable(cache_folder() / "pretrained" / f"{entry.name}-{key[:16]}", spare)
    if not (folder / ARCHITECTURE).is_file():
        with folder_lock(folder):
            _train(target, data, recipe, key, folder, (seed, train_on, on_step))
    stored = load_entry(folder)
    network = create_model(folder, pretrained=True).eval()
    side = target.input.shape.height
    reached = stored.metrics[TRAINED_ACCURACY].value
    source = (
        f"trained here on {DIGITS} at {side} px ({reached:.1f} % top-1), since the hub could not "
        "be reached"
    )
    return Start(network, entry.name, source, None, trained_on=DIGITS)


def open_digits(
    architecture: Architecture, *, seed: int, max_images: int | None = None
) -> WholeData:
    """The digits a model is trained on, and those held out; the same for one seed."""
    shape = architecture.input.shape
    options = DataOptions(
        resolution=(shape.height, shape.width),
        channels=shape.channels,
        seed=seed,
        max_images=max_images,
    )
    return open_whole(DIGITS, options, hold_out=True)


def proxy_architecture(architecture: Architecture, classes: int) -> Architecture:
    """The same blocks for small images: 4x4 patches of a ViT, or the smallest useful map."""
    stem = architecture.stem
    if isinstance(stem, ViTStem):
        side = 4 * stem.patch
    else:
        side = 8 * stem.patch if isinstance(stem, SwinStem) else 64
    side = min(side, architecture.input.shape.height, architecture.input.shape.width)
    return architecture.with_resolution(side).with_head(classes=classes)


def proxy_recipe(architecture: Architecture, images: int) -> TrainRecipe:
    """A short recipe; larger models get fewer epochs."""
    per_epoch = 3 * cost(architecture).macs * images
    epochs = max(FEWEST_EPOCHS, min(MOST_EPOCHS, int(BUDGET_MACS / per_epoch)))
    return TrainRecipe(
        epochs=epochs,
        batch_size=32,
        lr=5e-4,
        warmup=0.1,
        weight_decay=0.05,
        ema_decay=0.95,
        augment=False,  # a shift of a digit moves it against the patches: slower to learn
    )


def cache_folder() -> Path:
    """$SLIMNAS_CACHE, else $XDG_CACHE_HOME/slimnas, else ~/.cache/slimnas."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "slimnas"


def _find(entry: Entry) -> Path:
    """The entry's weights; `NoHubError` where they are published but out of reach."""
    published = entry.architecture.provenance.get("weights")
    if entry.source != "built-in" or entry.weights is not None or not published:
        return find_weights(entry)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(published["repository"], published["file"])
    if not isinstance(cached, str) and not hub_in_reach():
        raise NoHubError(f"{entry.name}: the Hugging Face hub cannot be reached")
    try:
        return find_weights(entry)
    except WeightsError as error:
        # Other content than published is no reason to go on without.
        if isinstance(error.__cause__, (OSError, EntryNotFoundError)):
            raise NoHubError(str(error)) from error
        raise


def _described(entry: Entry, path: Path) -> str:
    if entry.weights is None:
        return f"{entry.architecture.provenance['weights']['repository']} from the hub"
    return "the weights that ship with slimnas" if entry.source == "built-in" else str(path)


def _writable(folder: Path, spare: Path) -> Path:
    """`folder`, or `spare` where that cannot be made."""
    if (folder / ARCHITECTURE).is_file():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return spare
    return folder if os.access(folder, os.W_OK) else spare


def _train(
    architecture: Architecture,
    data: WholeData,
    recipe: TrainRecipe,
    identity: str,
    folder: Path,
    how: tuple[int, str, OnStep],
) -> None:
    if (folder / ARCHITECTURE).is_file():  # another process was faster
        return
    seed, train_on, on_step = how
    accelerator = accelerator_for(train_on)
    network = train_on_labels(
        build(architecture, seed=seed),
        data.images,
        recipe,
        accelerator,
        seed=seed,
        checkpoint=folder / STATE,
        identity=identity,
        on_step=on_step,
    )
    assert data.test is not None
    top1 = evaluate(network, data.test, accelerator.device)
    origin = {
        "source": f"slimnas prune: {architecture.name} trained from random weights on {DIGITS}",
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "data_digest": data.digest,
    }
    side = architecture.input.shape.height
    measured = f"measured on {len(data.test)} held-out images of {DIGITS} at {side} px"
    save_model(
        folder,
        architecture=architecture.renamed(architecture.name, origin),
        weights=network.state_dict(),
        metrics={TRAINED_ACCURACY: Metric(top1, measured)},
    )
    (folder / STATE).unlink(missing_ok=True)
