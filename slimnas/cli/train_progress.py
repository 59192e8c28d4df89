"""How training shows that it is alive: a bar on a terminal, a line per epoch in a log, curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import TaskID

from slimnas.cli.bars import RunProgress
from slimnas.cli.train_output import draw_curves

if TYPE_CHECKING:
    from slimnas.train.history import Row
    from slimnas.train.loop import StepReport

CURVES_SECONDS = 60.0


class TrainProgress(RunProgress):
    """A listener of `slimnas.train.run.run_training` that draws on stderr.

    Args:
        folder: the run folder, for the curves.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._task: TaskID | None = None
        self._top1 = ""
        self._drawn_at = time.monotonic()

    def step(self, report: StepReport) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._bars.add_task("training", total=report.steps, state="")
        state = _state(report.images_per_s, report.wait_share, report.loss)
        self._bars.update(self._task, completed=report.step, state=state + self._top1)

    def epoch(self, rows: Sequence[Row]) -> None:
        """Show accuracy; a line where there is no terminal; the curves now and then."""
        row = rows[-1]
        top1 = row.get("test_top1")
        self._top1 = "" if top1 is None else f" TEST top-1 {top1:.1f} %"
        state = _state(row["images_per_s"] or 0.0, row["wait_share"] or 0.0, row["loss"] or 0.0)
        self._log(f"epoch {row['epoch']:g} step {row['step']:g} {state}{self._top1}")
        if time.monotonic() - self._drawn_at > CURVES_SECONDS:
            draw_curves(self._folder)
            self._drawn_at = time.monotonic()


def _state(images_per_s: float, wait_share: float, loss: float) -> str:
    return f"{images_per_s:.0f} images/s, {wait_share:.0%} waiting for data, loss {loss:.3f}"
