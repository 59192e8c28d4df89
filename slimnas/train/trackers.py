"""Experiment trackers, by accelerate: TensorBoard, and whatever else is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from slimnas._settings import flat_settings
from slimnas.errors import RuntimeUnavailableError, suggest
from slimnas.train.history import Row

AUTO, NONE = "auto", "none"
TENSORBOARD = "tensorboard"
PROJECT = "slimnas"
LOGS = "logs"
"""Folder in the run folder that trackers write to."""


def tracker_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The trackers that are meant: `auto` is TensorBoard if it is installed, `none` none.

    Raises:
        RuntimeUnavailableError: accelerate does not know one, or it is not installed.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    names: list[str] = []
    for name in asked or (AUTO,):
        if name == AUTO:
            names += [TENSORBOARD] if TENSORBOARD in installed else []
        elif name in installed:
            names.append(name)
        elif name in known:
            raise RuntimeUnavailableError(
                f"--tracker {name}: is not installed; pip install {name.replace('_', '-')}, or "
                f"choose one of: {', '.join([*installed, NONE])}"
            )
        elif name != NONE:
            raise RuntimeUnavailableError(
                f"--tracker {name}: must be one of {', '.join((AUTO, NONE, *known))}"
                f"{suggest(name, known)}"
            )
    return tuple(dict.fromkeys(names))


@contextmanager
def tracking(accelerator: Accelerator, settings: Mapping[str, Any]) -> Iterator[None]:
    """Open the trackers that `accelerator` was made with, and close them when the block ends.

    Args:
        accelerator: made with names of trackers, or without any.
        settings: of the run, for trackers that list runs by them.
    """
    accelerator.init_trackers(PROJECT)
    # TensorBoard's way to keep settings is a second run beside the curves; config.yaml has them.
    plain = {k: v for k, v in flat_settings(settings).items() if isinstance(v, (str, int, float))}
    for tracker in accelerator.trackers:
        if tracker.name != TENSORBOARD:
            tracker.store_init_configuration(plain)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def track(accelerator: Accelerator, row: Row, prefix: str) -> None:
    """Send the numbers of a step or an epoch, named `prefix/name`, to the open trackers."""
    values = {f"{prefix}/{k}": v for k, v in row.items() if v is not None and k != "step"}
    step = row["step"]
    accelerator.log(values, step=None if step is None else int(step))
