"""What a trained supernet said about a space, without its weights: a record that ships with it.

Its architecture parameters, and top-1 of a few hundred selections measured on SEARCH images. A
search that starts from a record needs neither images nor weights; what it finds is an
architecture to train.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from slimnas._files import atomic_write_text
from slimnas._resources import data_dir
from slimnas.arch.documents import Spec, dump_yaml, load_document, parse_spec
from slimnas.arch.space import IDENTITY, SearchSpace, Selection
from slimnas.errors import SpecError
from slimnas.search.drops import AccuracyModel, Scales

SCHEMA = "slimnas/search-record/1"
WHAT = "a search record"
SHIPPED = "shipped"
FOLDER = "records"
SUFFIXES = (".yaml", ".yml")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SINGLE, RANDOM, SLIMMED, WALK = "single", "random", "slimmed", "walk"
KINDS = {
    SINGLE: "the largest network and single changes of it",
    RANDOM: "random networks of the space",
    SLIMMED: "randomly slimmed networks",
    WALK: "networks on searches for made-up devices",
}
"""Why a selection was measured."""

Count = Annotated[int, Field(strict=True, ge=1)]


class RecordedData(Spec):
    """The images behind a record.

    Attributes:
        source: what `--data` named.
        description: the source in words, with the images of each split.
        digest: of labels, pixels and splits.
        classes: number of classes.
        images: split -> images.
    """

    source: str
    description: str
    digest: str
    classes: Count
    images: dict[str, Count]


class RecordedError(Spec):
    """Cross-validated error of predicted top-1, of one kind of networks.

    Attributes:
        what: which networks; a key of `KINDS`.
        networks: how many were held out.
        spearman: rank correlation of predicted and measured.
        mean_error_points: mean absolute difference.
    """

    what: str
    networks: Count
    spearman: Annotated[float, Field(ge=-1, le=1)]
    mean_error_points: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Measured:
    """One selection that was measured.

    Attributes:
        selection: of the record's space.
        top1: on SEARCH with inherited weights, in percent.
        kind: a key of `KINDS`.
        group: what is held out together; empty for what is never held out.
    """

    selection: Selection
    top1: float
    kind: str
    group: str


class SearchRecord(Spec):
    """See the module.

    Attributes:
        space: name of the search space.
        space_digest: see `content_digest`.
        resolution: side of the images, pixels.
        search_images: SEARCH images behind every top-1.
        supernet_digest: SHA-256 over the weights of the supernet.
        data: the images.
        recipe: how the supernet was trained.
        seed: of training, splits and the choice of what was measured.
        made: when, on what and with which versions.
        letters: choice -> its letter in `measured`.
        alphas: per stage and slot, the architecture parameter of each choice.
        scales: of the model that predicts what was not measured.
        errors: of that model.
        networks: how many lines `measured` has, so that a cut file is noticed.
        measured: `WIDTHS PATHS TOP1 KIND [GROUP]`, one line per selection; of each stage a width,
            and a letter per slot.
    """

    space: str
    space_digest: str
    resolution: Count
    search_images: Count
    supernet_digest: str
    data: RecordedData
    recipe: dict[str, Any]
    seed: Annotated[int, Field(strict=True, ge=0)]
    made: dict[str, str]
    letters: Annotated[dict[str, str], Field(min_length=1)]
    alphas: tuple[tuple[dict[str, float], ...], ...]
    scales: Scales
    errors: tuple[RecordedError, ...]
    networks: Count
    measured: Annotated[tuple[str, ...], Field(min_length=1)]

    @field_validator("letters")
    @classmethod
    def _distinct(cls, letters: dict[str, str]) -> dict[str, str]:
        if sorted(set(letters.values())) != sorted(letters.values()) or any(
            len(letter) != 1 for letter in letters.values()
        ):
            raise ValueError(f"each choice needs one letter of its own, got {letters}")
        return letters

    @model_validator(mode="after")
    def _whole(self) -> SearchRecord:
        if len(self.measured) != self.networks:
            raise ValueError(
                f"measured: must have {self.networks} lines, has {len(self.measured)}; the file "
                "was cut or changed"
            )
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the content."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()

    @cached_property
    def rows(self) -> tuple[Measured, ...]:
        """Every selection that was measured.

        Raises:
            SpecError: a line is damaged, or a selection is there twice.
        """
        rows = [_row(line, number, self.letters) for number, line in enumerate(self.measured)]
        seen: dict[Selection, int] = {}
        for number, row in enumerate(rows):
            if seen.setdefault(row.selection, number) != number:
                raise SpecError(
                    f"measured[{number}]: is measured[{seen[row.selection]}] once more; each "
                    "selection may be there once"
                )
        return tuple(rows)

    def to_yaml(self) -> str:
        """The YAML form, one line per measured selection."""
        body = self.model_dump(mode="json")
        lines = body.pop("measured")
        return dump_yaml(SCHEMA, body) + "measured:\n" + "".join(f"- {line}\n" for line in lines)

    def save(self, path: Path) -> None:
        """Write YAML atomically."""
        atomic_write_text(path, self.to_yaml())

    @classmethod
    def load(cls, path: Path) -> SearchRecord:
        """Read what `save` wrote.

        Raises:
            SpecError: one line per fault, with file and key.
        """
        record = parse_spec(cls, load_document(path, SCHEMA, WHAT), source=str(path))
        try:
            _ = record.rows
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error
        return record


class RecordEvaluator:
    """Top-1 as the record's supernet would give it: measured, else predicted.

    Args:
        record: that fits `space`, see `open_record`.
        space: the search space.

    Raises:
        SpecError: scales of another space, or impossible ones.
    """

    def __init__(self, record: SearchRecord, space: SearchSpace) -> None:
        self._measured = {row.selection: row.top1 for row in record.rows}
        self._model = AccuracyModel(space, record.scales, self._measured)

    def top1(self, selection: Selection) -> float:
        """Top-1 of `selection` in percent."""
        known = self._measured.get(selection)
        return self._model.top1(selection) if known is None else known

    def is_measured(self, selection: Selection) -> bool:
        """Whether the record holds the selection itself."""
        return selection in self._measured


def open_record(name_or_path: str, space: SearchSpace) -> SearchRecord:
    """The record that ships with `space` (`shipped`), or one from a file, checked against it.

    Raises:
        SpecError: there is none, it is damaged, or of another space.
    """
    path = Path(name_or_path)
    if name_or_path == SHIPPED:
        path = _shipped_path(space)
        if not path.is_file():
            named = ", ".join(shipped_records()) or "none"
            raise SpecError(
                f"search space {space.name}: no record ships with it (with a record: {named}); "
                "leave out --supernet to train one, or make one with 'slimnas space record'"
            )
    record = SearchRecord.load(path)
    try:
        _require_space(record, space)
        RecordEvaluator(record, space)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    return record


def is_record(name_or_path: str) -> bool:
    """Whether `--supernet` names a record, not a checkpoint."""
    return name_or_path == SHIPPED or Path(name_or_path).suffix in SUFFIXES


def shipped_record(space: SearchSpace) -> SearchRecord | None:
    """The record that ships with `space`; none where there is none, or one of another content.

    Raises:
        SpecError: it is damaged.
    """
    path = _shipped_path(space)
    record = SearchRecord.load(path) if path.is_file() else None
    is_its = record is not None and record.space_digest == content_digest(space)
    return record if is_its else None


def shipped_records() -> tuple[str, ...]:
    """Names of the search spaces that come with a record."""
    found = (data_dir("search_spaces") / FOLDER).glob("*.yaml")
    return tuple(sorted(path.stem for path in found))


def content_digest(space: SearchSpace) -> str:
    """SHA-256 (hex) of what decides which selections a space has and what they mean.

    Classes and image sizes are left out: a record's top-1 is of its own data and resolution.
    """
    body = space.model_dump(
        mode="json", include={"stem", "stages", "blocks", "limits"}, exclude_none=True
    )
    text = json.dumps({**body, "channels": space.input.channels}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def letters_of(space: SearchSpace) -> dict[str, str]:
    """A letter for each choice of the space, `-` for identity."""
    offered = dict.fromkeys(choice for stage in space.stages for choice in stage.blocks)
    return {**dict(zip(offered, LETTERS, strict=False)), IDENTITY: "-"}


def line_of(measured: Measured, letters: Mapping[str, str]) -> str:
    """A measured selection as a line of a record."""
    words = [selection_code(measured.selection, letters), repr(measured.top1), measured.kind]
    return " ".join([*words, measured.group] if measured.group else words)


def selection_code(selection: Selection, letters: Mapping[str, str]) -> str:
    """`WIDTHS PATHS` of a selection: `16-32 aa-/ab`."""
    paths = "/".join("".join(letters[choice] for choice in slots) for slots in selection.paths)
    return f"{'-'.join(map(str, selection.widths))} {paths}"


def _shipped_path(space: SearchSpace) -> Path:
    return data_dir("search_spaces") / FOLDER / f"{space.name}.yaml"


def _row(line: str, number: int, letters: Mapping[str, str]) -> Measured:
    choices = {letter: choice for choice, letter in letters.items()}
    try:
        widths, paths, top1, kind, *group = line.split(" ")
        selection = Selection(
            tuple(int(width) for width in widths.split("-")),
            tuple(tuple(choices[letter] for letter in slots) for slots in paths.split("/")),
        )
        percent = float(top1)
    except (ValueError, KeyError) as error:
        raise SpecError(_bad_row(line, number)) from error
    if not 0 <= percent <= 100 or kind not in KINDS or len(group) > 1:
        raise SpecError(_bad_row(line, number))
    return Measured(selection, percent, kind, group[0] if group else "")


def _bad_row(line: str, number: int) -> str:
    return (
        f"measured[{number}]: must be WIDTHS PATHS TOP1 KIND [GROUP] with the letters and kinds "
        f"of the record, got {line!r}"
    )


def _require_space(record: SearchRecord, space: SearchSpace) -> None:
    if record.space_digest != content_digest(space):
        raise SpecError(
            f"space_digest: was made for another content of search space {record.space} than this "
            f"{space.name}; make a record of it with 'slimnas space record', or leave out "
            "--supernet"
        )
    shape = tuple(tuple(set(slot) for slot in stage) for stage in record.alphas)
    wanted = tuple(tuple(set(stage.choices) for _ in range(stage.slots)) for stage in space.stages)
    if shape != wanted:
        raise SpecError(f"alphas: must be of every choice of every slot of {space.name}")
    for number, row in enumerate(record.rows):
        fault = space.fault(row.selection)
        if fault is not None:
            raise SpecError(f"measured[{number}]: {fault}")
