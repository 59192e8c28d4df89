"""`slimnas search --supernet shipped`: from what a record says, without images or training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slimnas.cli.output import note, print_json, shown_path
from slimnas.cli.runs import no_empty_folder, says_how_to_go_on

if TYPE_CHECKING:
    from slimnas.cli.search import SearchInputs
    from slimnas.search.record import SearchRecord

_UNUSED = {
    "data": "digits",
    "search_images": 1000,
    "max_images": None,
    "skip_bad_images": False,
    "resolution": None,
}
"""Settings of a search that a record has decided, with their defaults."""


def refuse_unused(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse options about images and training, which a record has decided.

    Raises:
        typer.BadParameter: names them.
    """
    names = [key for key, default in _UNUSED.items() if settings.get(key, default) != default]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in [*names, *recipe])
    if flags:
        raise typer.BadParameter(f"a record reads no images and trains nothing; leave out {flags}")


def inputs_from_record(
    name: str,
    space_name: str | None,
    device: str,
    targets_ms: list[float],
    settings: Mapping[str, Any],
) -> SearchInputs:
    """Open a record, its space and the table, and refuse what cannot end well.

    Args:
        name: `shipped`, or a record file.
        space_name: of the search space; else the default one, or the file's.
        device: name or folder of the latency table.
        targets_ms: target latencies, ascending.
        settings: of the command line.

    Raises:
        SpecError: no record, a damaged one, or one of another space.
        MissingLatencyError: the table cannot price the space.
        UnreachableTargetError: a target is below the smallest network.
    """
    from slimnas.arch.documents import parse_spec
    from slimnas.arch.space import SearchSpace
    from slimnas.cli.search import DEFAULT_SPACE, SearchInputs, meter_of
    from slimnas.latency.devices import find_device, provenance_line
    from slimnas.search.checks import check_search, space_digest, table_digest
    from slimnas.search.config import SearchConfig
    from slimnas.search.record import SHIPPED, SearchRecord, open_record

    table = find_device(device)
    note(f"latency table: {provenance_line(table)}")
    if space_name is None:
        space_name = DEFAULT_SPACE if name == SHIPPED else SearchRecord.load(Path(name)).space
    space = SearchSpace.load(space_name)
    record = open_record(name, space)
    given = {key: value for key, value in settings.items() if key not in _UNUSED}
    config = parse_spec(
        SearchConfig,
        {
            **given,
            "space": space_name,
            "space_digest": space_digest(space),
            "data": record.data.source,
            "device": device,
            "table_digest": table_digest(table),
            "targets_ms": targets_ms,
            "resolution": record.resolution,
            "search_images": record.search_images,
            "recipe": None,
            "record_digest": record.digest,
        },
        source="command line",
    )
    check_search(space, table, config)
    return SearchInputs(config, space, table, None, meter_of(config, table, space), record)


def run_record(inputs: SearchInputs, record: SearchRecord, folder: Path, as_json: bool) -> None:
    """Search by a record, write the report and print the result."""
    from slimnas._lock import folder_lock
    from slimnas.cli.progress import SearchProgress
    from slimnas.cli.search_output import json_body, print_result, write_search_report
    from slimnas.search.config import claim
    from slimnas.search.record_run import run_from_record

    with no_empty_folder(folder), folder_lock(folder):
        claim(folder, inputs.config)
        for line in record_lines(record):
            note(line)
        note(f"run folder {shown_path(folder)}")
        if isinstance(inputs.meter, str):
            note(f"found networks will not be measured: {inputs.meter}")
        with SearchProgress() as progress, says_how_to_go_on():
            result = run_from_record(
                inputs.config,
                inputs.space,
                inputs.table,
                record,
                folder,
                listener=progress,
                meter=inputs.meter,
            )
        page = write_search_report(inputs, result, None, folder)
    if as_json:
        print_json(json_body(inputs, result, folder))
    else:
        print_result(inputs, result, folder, page)


def record_lines(record: SearchRecord) -> list[str]:
    """What a record is, and how far what it predicts is off."""
    from slimnas.search.record import KINDS

    epochs = record.recipe.get("epochs")
    trained = "" if epochs is None else f", {epochs} epochs"
    made = (
        f"record of {record.space}: a supernet trained on {record.data.source} "
        f"({record.data.images.get('train', 0):,} images of {record.data.classes} classes at "
        f"{record.resolution} px{trained}), {len(record.rows)} networks measured on "
        f"{record.search_images:,} SEARCH images, {record.made.get('date', 'no date')}"
    )
    errors = [
        f"predicted top-1 of {KINDS.get(error.what, error.what)}: rank correlation "
        f"{error.spearman:.3f}, mean error {error.mean_error_points:.2f} points ({error.networks} "
        "held out)"
        for error in record.errors
    ]
    return [made, *errors]
