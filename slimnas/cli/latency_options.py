"""What several `slimnas latency` commands have in common: options and the progress of timing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

import typer

from slimnas.cli.output import note

if TYPE_CHECKING:
    from slimnas.measure.scope import Scope
    from slimnas.measure.visits import Progress


class Clock(str, Enum):
    """What tells the time."""

    WALL = "wall"
    CPU = "cpu"


def chosen_scope(space: str | None, model: str | None) -> Scope:
    """Return what a table covers: a space, or what a model can be pruned to.

    Raises:
        BadParameter: both are given, or neither.
    """
    from slimnas.arch.space import SearchSpace
    from slimnas.measure.model_scope import ModelScope
    from slimnas.measure.scope import SpaceScope
    from slimnas.zoo.registry import get

    if (space is None) == (model is None):
        raise typer.BadParameter("give --space or --model, and not both", param_hint="'--space'")
    if space is not None:
        return SpaceScope(SearchSpace.load(space))
    assert model is not None
    return ModelScope(get(model).architecture)


@contextlib.contextmanager
def progress_bar(doing: str) -> Iterator[Progress]:
    """A bar with the remaining time on a terminal, a line every tenth in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, planned: int, what: str) -> None:
            bar.update(task, completed=done, total=planned, description=what)
            if not console.is_terminal and done % max(planned // 10, 1) == 0:
                note(f"{doing} {done}/{planned}: {what}")

        yield show
