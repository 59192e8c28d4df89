"""How a search shows that it is alive: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import TaskID

from slimnas.cli.bars import RunProgress

if TYPE_CHECKING:
    from slimnas.arch.space import Selection
    from slimnas.search.measurements import Measurement
    from slimnas.search.trajectory import Trajectory
    from slimnas.supernet.train import Progress as TrainingProgress


LINES_EVERY = 25
"""Networks of a record per line of a log."""


class SearchProgress(RunProgress):
    """A listener of `slimnas.search.run.run_search` that draws on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._training: TaskID | None = None
        self._slimming: TaskID | None = None
        self._search_top1: float | None = None
        self._weighed = 0
        self._last_step = ""

    def training(self, progress: TrainingProgress) -> None:
        """Update the training bar; after an epoch write a line where there is no terminal."""
        report = progress.report
        if self._training is None:
            self._training = self._bars.add_task("training", total=report.steps, state="")
        if progress.search_top1 is not None:
            self._search_top1 = progress.search_top1
        top1 = "" if self._search_top1 is None else f" search top-1 {self._search_top1:.1f} %"
        state = (
            f"{report.images_per_s:.0f} images/s loss {report.loss:.3f}{top1} "
            f"tau {progress.tau:.2f}"
        )
        self._bars.update(self._training, completed=report.step, state=state)
        if progress.search_top1 is not None:
            self._log(f"training step {report.step}/{report.steps} {state}")

    def evaluated(self, selection: Selection, top1: float) -> None:
        """Count the candidates weighed so far."""
        self._weighed += 1
        if self._slimming is None:  # how far it is to the target is known after the first step
            self._slimming = self._bars.add_task("slimming", total=None, state="")
        state = f"{self._last_step} {self._weighed} candidates weighed".lstrip()
        self._bars.update(self._slimming, state=state)

    def slimming(self, trajectory: Trajectory, target_ms: float) -> None:
        """Move the slimming bar from the largest network's latency towards the target."""
        latency_ms = trajectory.states[-1][1]
        step = trajectory.steps[-1]
        self._last_step = f"{latency_ms:.3f} ms search top-1 {step.top1:.1f} % {step.taken.label}"
        if self._slimming is not None:
            self._bars.update(
                self._slimming,
                total=max(trajectory.latency_ms - target_ms, 1e-9),
                completed=trajectory.latency_ms - max(latency_ms, target_ms),
                state=self._last_step,
            )
        self._log(f"slimming step {len(trajectory.steps)}: {self._last_step}")

    def measuring(self, target_ms: float, number: int) -> None:
        """Say that a network is being measured."""
        state = f"measuring network {number} for {target_ms:g} ms"
        if self._slimming is not None:
            self._bars.update(self._slimming, state=state)

    def measured(self, measurement: Measurement) -> None:
        """Write what a measurement said."""
        one = measurement
        self._last_step = (
            f"measured {one.measured_ms:.3f} ± {one.error_ms:.3f} ms, predicted "
            f"{one.predicted_ms:.3f} ms, target {one.target_ms:g} ms"
        )
        if self._slimming is not None:
            self._bars.update(self._slimming, state=self._last_step)
        self._log(self._last_step)


class RecordProgress(RunProgress):
    """A listener of `slimnas.search.record_making.make_record` that draws on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._task: TaskID | None = None

    def measured(self, number: int, total: int, top1: float) -> None:
        """Move the bar; now and then write a line where there is no terminal."""
        if self._task is None:
            self._task = self._bars.add_task("measuring", total=total, state="")
        self._bars.update(self._task, completed=number, total=total, state=f"top-1 {top1:.1f} %")
        if number % LINES_EVERY == 0:
            self._log(f"measured {number}/{total} networks")

    def fitting(self) -> None:
        """Say that what was measured is being fitted."""
        self._log("fitting what predicts the others, and its error on networks held out")
