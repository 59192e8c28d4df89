"""Every error slimnas raises on purpose. One tree, rooted at `SlimnasError`.

A message is one line and says what must hold, what was given, where, and what to do next.
The command line prints it as it is and exits with 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SlimnasError(Exception):
    """Base class; catch it to catch everything slimnas raises on purpose."""


class SpecError(SlimnasError):
    """Raised when an architecture, search space, device or config file breaks its schema."""


class LatencyTableError(SlimnasError):
    """Raised when a latency table cannot be found, read, built or trusted."""


class MissingLatencyError(LatencyTableError):
    """Raised when a table has no row, and allows no interpolation, for a component."""


class UnreachableTargetError(SlimnasError):
    """Raised when no architecture of the space meets the target latency."""


class DataError(SlimnasError):
    """Raised when a data set is missing, unreadable, empty or has one class only."""


class WeightsError(SlimnasError):
    """Raised when weights or a checkpoint are unreadable or do not fit the architecture."""


class TrainingError(SlimnasError):
    """Raised when training cannot start or go on: memory, processes, or batches that do not fit."""


class UnsupportedModuleError(SlimnasError):
    """Raised when a foreign network has a module that no slimnas architecture describes."""


class InputSizeError(SlimnasError):
    """Raised when a network gets images of another shape than it was built for."""


class RunFolderError(SlimnasError):
    """Raised when a run folder is in use, cannot be written, or belongs to another run."""


class RuntimeUnavailableError(SlimnasError):
    """Raised when an inference runtime is not installed or cannot do what is asked."""


class ExportError(SlimnasError):
    """Raised when an exported file disagrees with the PyTorch module it was made from."""


class ZooError(SlimnasError):
    """Raised when a zoo entry does not exist, exists already, or is damaged."""


class PruneError(SlimnasError):
    """Raised when a model cannot be pruned, a plan does not fit it, or a budget is out of reach."""


class AnalysisError(SlimnasError):
    """Raised when an analysis lacks what it studies, or what it is to time computes wrongly."""


def suggest(given: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known name, else an empty string."""
    close = get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
