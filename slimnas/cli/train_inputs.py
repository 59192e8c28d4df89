"""What the command line of `slimnas train` names, found and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimnas.cli.output import note

if TYPE_CHECKING:
    from slimnas.data.training import TrainingData
    from slimnas.train.config import TrainConfig
    from slimnas.train.network_recipe import NetworkRecipe
    from slimnas.train.start import Start


@dataclass(frozen=True)
class Asked:
    """The command line, grouped.

    Attributes:
        model, weights, pretrained, from_scratch, recipe, resolution, train_on, trackers: as given.
        flags: fields of the recipe that have an option of their own.
        changes: those given by `--set`.
        settings: those that `TrainConfig` takes as they are.
    """

    model: str
    weights: Path | None
    pretrained: bool
    from_scratch: bool
    recipe: str
    flags: dict[str, Any]
    changes: tuple[str, ...]
    settings: dict[str, Any]
    resolution: int | None
    train_on: str
    trackers: tuple[str, ...]


@dataclass(frozen=True)
class Inputs:
    """What a run is, before its data are opened.

    Attributes:
        asked: the command line.
        start: the network.
        config: the settings, as far as they are known.
    """

    asked: Asked
    start: Start
    config: TrainConfig


def find_inputs(asked: Asked) -> Inputs:
    """Find network and recipe; downloads published weights if they are asked for.

    Raises:
        SlimnasError: one line.
    """
    from slimnas.arch.documents import parse_spec
    from slimnas.errors import SpecError
    from slimnas.train.config import TrainConfig
    from slimnas.train.recipe import check_schedule
    from slimnas.train.start import find_start

    if asked.settings["images_per_epoch"] is not None and not asked.settings["stream"]:
        raise SpecError(
            "--images-per-epoch: is for streams; give --stream as well, or --max-images"
        )
    recipe = chosen_recipe(asked.recipe, asked.flags, asked.changes)
    check_schedule(recipe)
    start = find_start(
        asked.model,
        weights=asked.weights,
        pretrained=asked.pretrained,
        from_scratch=asked.from_scratch,
        resolution=asked.resolution,
    )
    shape = start.architecture.input.shape
    config = parse_spec(
        TrainConfig,
        {
            **asked.settings,
            "model": asked.model,
            "architecture_digest": start.architecture.digest,
            "weights": start.words,
            "weights_digest": start.weights_digest,
            "resolution": (shape.height, shape.width),
            "recipe_name": asked.recipe,
            "recipe": recipe.model_dump(),
        },
        source="command line",
    )
    return Inputs(asked, start, config)


def chosen_recipe(name: str, flags: dict[str, Any], changes: Sequence[str]) -> NetworkRecipe:
    """The recipe of that name or file with what the command line overrides.

    Args:
        name: of the recipe.
        flags: field -> value.
        changes: `KEY=VALUE`, the value in YAML; of a field in a field `KEY.KEY=VALUE`.

    Raises:
        SpecError: no such recipe or field, or a value it may not have.
    """
    from slimnas.train.recipes import load_recipe, override_recipe

    recipe = load_recipe(name)
    values = dict(flags)
    for change in changes:
        key, value = _parsed(change)
        outer, _, inner = key.partition(".")
        if inner:
            before = values.get(outer)
            value = {**(before if isinstance(before, dict) else {}), inner: value}
        values[outer] = value
    taught = values.get("distillation", recipe.distillation)
    if values.get("teacher") is not None and taught == "none" and "distillation" not in values:
        note("distillation: hard, since there is a teacher; --distillation soft is the other way")
        values["distillation"] = "hard"
    return override_recipe(recipe, values, source="command line")


def open_images(inputs: Inputs) -> TrainingData:
    """Open what `--data` and `--test-data` name.

    Raises:
        DataError: one line.
    """
    from slimnas.data.crop import CropPolicy
    from slimnas.data.splits import DataOptions
    from slimnas.data.stream_source import StreamOptions
    from slimnas.data.training import open_training

    config = inputs.config
    crop = config.recipe.crop
    options = DataOptions(
        resolution=config.resolution,
        channels=inputs.start.architecture.input.shape.channels,
        seed=config.seed,
        skip_bad_images=config.skip_bad_images,
        max_images=config.max_images,
    )
    return open_training(
        config.data,
        options,
        test_spec=config.test_data,
        crop=None if crop is None else CropPolicy(crop.scale, crop.ratio, crop.interpolation),
        normalisation=inputs.start.normalisation,
        stream=StreamOptions(images_per_epoch=config.images_per_epoch) if config.stream else None,
    )


def _parsed(change: str) -> tuple[str, Any]:
    import yaml

    from slimnas.errors import SpecError

    key, equals, text = change.partition("=")
    if not (key.strip() and equals):
        raise SpecError(f"--set {change!r}: must be KEY=VALUE, such as mixup=0.2")
    try:
        return key.strip(), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--set {change!r}: {text!r} is no YAML value") from error
