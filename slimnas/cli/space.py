"""`slimnas space`: list, show, validate and record search spaces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, print_json
from slimnas.cli.search_record import record_lines
from slimnas.cli.space_record import record

if TYPE_CHECKING:
    from slimnas.arch.space import SearchSpace, Selection

app = typer.Typer(no_args_is_help=True, help="Search spaces: which networks a search may find.")
app.command("record")(record)

SpaceArgument = Annotated[str, typer.Argument(help="Name of a shipped space, or a .yaml file.")]


@app.command("list")
def list_spaces(as_json: JsonOption = False) -> None:
    """List the shipped search spaces with their smallest and largest network."""
    from slimnas.arch.space import SearchSpace, shipped_spaces

    rows = [_summary(SearchSpace.load(name)) for name in shipped_spaces()]
    if as_json:
        print_json({"spaces": rows})
        return
    for row in rows:
        typer.echo(_line(row))


@app.command()
def show(space: SpaceArgument, as_json: JsonOption = False) -> None:
    """Show a search space, every default written out."""
    from slimnas.arch.space import SearchSpace

    loaded = SearchSpace.load(space)
    said = _record_lines(loaded)
    if as_json:
        print_json({**_summary(loaded), "space": loaded.model_dump(mode="json"), "record": said})
        return
    typer.echo(loaded.to_yaml().rstrip())
    typer.echo(f"# {_line(_summary(loaded))}")
    for line in said:
        typer.echo(f"# {line}")


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="Search space files.")],
    as_json: JsonOption = False,
) -> None:
    """Check search space files; says where each fault is."""
    from slimnas.arch.space import SearchSpace
    from slimnas.errors import SlimnasError, SpecError

    faults, rows = [], []
    for file in files:
        try:
            space = SearchSpace.load(file)
            _check_recipe(space, file)
            rows.append({"file": str(file), **_summary(space)})
        except SlimnasError as error:
            faults.append(str(error))
    if as_json:
        print_json({"valid": rows, "faults": [line for f in faults for line in f.splitlines()]})
    else:
        for row in rows:
            typer.echo(f"ok: {row['file']}: {_line(row)}")
    if faults:
        raise SpecError("\n".join(faults))


def _record_lines(space: SearchSpace) -> list[str]:
    """What the record that ships with a space is, for `slimnas search --supernet shipped`."""
    from slimnas.search.record import shipped_record

    shipped = shipped_record(space)
    return [] if shipped is None else record_lines(shipped)


def _check_recipe(space: SearchSpace, file: Path) -> None:
    if space.supernet.recipe is None:
        return
    from slimnas.supernet.recipe import space_recipe  # imports torch, so only where it is needed

    space_recipe(space, source=str(file))


def _summary(space: SearchSpace) -> dict[str, Any]:
    from slimnas.arch.cost import cost

    def macs(selection: Selection) -> int:
        return cost(space.architecture(selection)).macs

    attention = space.attention_counts()
    least, most = space.smallest()[0], space.largest(attention[-1])
    for stage in range(0 if space.counts_attention else len(space.stages)):
        least = min(space.variants(least, stage), key=macs)
        most = max(space.variants(most, stage), key=macs)
    smallest, largest = cost(space.architecture(least)), cost(space.architecture(most))
    return {
        "name": space.name,
        "slots": [stage.slots for stage in space.stages],
        "max_widths": [stage.width.max for stage in space.stages],
        "max_attention_blocks": attention[-1],
        "macs": {"smallest": smallest.macs, "largest": largest.macs},
        "params": {"smallest": smallest.params, "largest": largest.params},
        "training_resolution": space.supernet.resolution,
    }


def _line(row: dict[str, Any]) -> str:
    macs, params = row["macs"], row["params"]
    return (
        f"{row['name']}: slots {row['slots']}, widths up to {row['max_widths']}, "
        f"{macs['smallest'] / 1e9:.2f} to {macs['largest'] / 1e9:.2f} GMACs, "
        f"{params['smallest'] / 1e6:.2f} to {params['largest'] / 1e6:.1f} M parameters"
    )
