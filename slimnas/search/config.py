"""Everything that decides what a search finds, as one document in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slimnas._settings import flat_settings, require_same_settings
from slimnas.arch.documents import Spec, load_document, parse_spec, save_document
from slimnas.supernet.train import SupernetRecipe

SCHEMA = "slimnas/search-config/1"
WHAT = "the settings of a search run"
FILE = "config.yaml"

Whole = Annotated[int, Field(strict=True, ge=1)]


class SearchConfig(Spec):
    """Settings of a search run; equal settings and data give equal results on the CPU.

    Attributes:
        space: name or file of the search space.
        space_digest: SHA-256 of its content.
        data: what `--data` names.
        device: name or folder of the latency table.
        table_digest: SHA-256 of its content.
        targets_ms: target latencies, ascending.
        resolution: side of the training images, pixels.
        recipe: how the supernet is trained; None for a supernet trained before.
        supernet_digest: of a supernet trained before; None where this run trains it.
        record_digest: of the search record that stands in for a supernet; `data`, `resolution` and
            `search_images` are the record's then, and no images are read.
        frontier: which actions a slimming step weighs.
        fill: least share of a target that a found network should use; 0 leaves it where the last
            step of slimming ends, as the paper does.
        measure: measure found networks where the table's device is this machine.
        search_images: at most this many SEARCH images judge a candidate.
        calibration_images: TRAIN images that BatchNorm statistics are measured on.
        max_images: use at most this many images of the data; None for all.
        skip_bad_images: leave out images that cannot be decoded.
        seed: of everything random.
    """

    space: str
    space_digest: str
    data: str = "digits"
    device: str
    table_digest: str
    targets_ms: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    resolution: Whole
    recipe: SupernetRecipe | None = SupernetRecipe()
    supernet_digest: str | None = None
    record_digest: str | None = None
    frontier: Literal["per_stage", "paper"] = "per_stage"
    fill: Annotated[float, Field(ge=0, lt=1)] = 0.97
    measure: bool = True
    search_images: Whole = 1000
    calibration_images: Whole = 256
    max_images: Whole | None = None
    skip_bad_images: bool = False
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    def save(self, path: Path) -> None:
        """Write YAML atomically."""
        save_document(path, SCHEMA, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> SearchConfig:
        """Read what `save` wrote.

        Raises:
            SpecError: one line per fault, with file and key.
        """
        return parse_spec(cls, load_document(path, SCHEMA, WHAT), source=str(path))


def refuse_other_run(folder: Path, config: SearchConfig) -> None:
    """Refuse a folder that holds a run with other settings; an empty one is fine.

    Raises:
        RunFolderError: names the settings that differ.
        SpecError: the folder's settings are damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return
    old = flat_settings(SearchConfig.load(path).model_dump())
    require_same_settings(folder, old, flat_settings(config.model_dump()))


def claim(folder: Path, config: SearchConfig) -> None:
    """Write `config` into a new run folder, or check that an old one has the same.

    Raises:
        RunFolderError, SpecError: see `refuse_other_run`.
    """
    refuse_other_run(folder, config)
    if not (folder / FILE).is_file():
        config.save(folder / FILE)
