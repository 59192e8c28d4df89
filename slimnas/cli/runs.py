"""What commands with a run folder share."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from slimnas.cli.output import note

RUNS = Path("runs")
"""Where run folders go by default, in the working directory."""


class RunOn(str, Enum):
    """Where networks run and train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


@contextlib.contextmanager
def says_how_to_go_on() -> Iterator[None]:
    """Tell whoever presses Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        note("stopped; the same command goes on where it was")
        raise


@contextlib.contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """A run that is refused leaves no folder behind that it made."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: the run has begun
            for place in made:
                place.rmdir()


def require_writable(folder: Path) -> None:
    """Make `folder` if needed and refuse it before the work whose results it gets.

    Raises:
        RunFolderError: nothing can be written there.
    """
    from slimnas.errors import RunFolderError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another place with "
            "--output"
        ) from error


def plain_name(word: str) -> str:
    """The last part of a name or path, as part of a folder's name: without kind and wildcards."""
    bare = re.sub(r"\.(ya?ml|parquet|tar)$", "", Path(word).name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", bare).strip("-.")
