"""Everything that decides what training gives, as one document in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slimnas._settings import flat_settings, require_same_settings
from slimnas.arch.documents import Spec, load_document, parse_spec, save_document
from slimnas.train.network_recipe import NetworkRecipe
from slimnas.train.recipe import Whole

SCHEMA = "slimnas/train-config/1"
WHAT = "the settings of a training run"
FILE = "config.yaml"
FRESH = "fresh"
LEARNT_LATER = ("data_digest", "classes", "teacher_digest")
"""Settings that the command line does not name: they are known once data and teacher are open."""


class TrainConfig(Spec):
    """Settings of a training run; equal settings and data give equal results on the CPU.

    Attributes:
        model: what was asked for: a zoo name, a file or a folder.
        architecture_digest: of that network, with its own classes, at the resolution of training.
        weights: where the weights are from that training begins with, in words; `fresh` for none.
        weights_digest: SHA-256 of their file; None for fresh ones.
        resolution: height and width of the images, pixels.
        data: what `--data` names.
        test_data: images to judge on; None for those of `data`.
        max_images: use at most this many images of the data; None for all.
        skip_bad_images: leave out images that cannot be decoded.
        stream: read the data while training instead of once before.
        images_per_epoch: when an epoch of a stream ends; None for after all images.
        recipe_name: where the recipe is from, before anything was overridden.
        recipe: how the network is trained.
        precision: of forward passes: `fp32`, `bf16`, or `auto` for bf16 where the GPU has it.
        seed: of everything random.
        data_digest: of images, labels and split; None while the data are not open.
        classes: of the data; None likewise.
        teacher_digest: of the teacher's weights; None without one.
    """

    model: str
    architecture_digest: str
    weights: str = FRESH
    weights_digest: str | None = None
    resolution: tuple[Whole, Whole]
    data: str = "digits"
    test_data: str | None = None
    max_images: Whole | None = None
    skip_bad_images: bool = False
    stream: bool = False
    images_per_epoch: Whole | None = None
    recipe_name: str = "quick"
    recipe: NetworkRecipe
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    data_digest: str | None = None
    classes: Whole | None = None
    teacher_digest: str | None = None

    def save(self, path: Path) -> None:
        """Write YAML atomically."""
        save_document(path, SCHEMA, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read what `save` wrote.

        Raises:
            SpecError: one line per fault, with file and key.
        """
        return parse_spec(cls, load_document(path, SCHEMA, WHAT), source=str(path))


def refuse_other_run(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds a run with other settings; an empty one is fine.

    What `config` does not know yet, of `LEARNT_LATER`, may be anything.

    Raises:
        RunFolderError: names the settings that differ.
        SpecError: the folder's settings are damaged, or another kind of run's.
    """
    path = folder / FILE
    if not path.is_file():
        return
    old, new = TrainConfig.load(path).model_dump(mode="json"), config.model_dump(mode="json")
    unknown = {key for key in LEARNT_LATER if new[key] is None}
    require_same_settings(folder, flat_settings(old), flat_settings(new), besides=unknown)


def claim(folder: Path, config: TrainConfig) -> None:
    """Write `config` into a new run folder, or check that an old one has the same.

    Raises:
        RunFolderError, SpecError: see `refuse_other_run`.
    """
    refuse_other_run(folder, config)
    if not (folder / FILE).is_file():
        config.save(folder / FILE)
