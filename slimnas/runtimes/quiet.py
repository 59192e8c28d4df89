"""Silence for libraries that warn about themselves."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(below: int = logging.ERROR) -> Iterator[None]:
    """Silence what a library warns and logs about its own code or its neighbours' versions.

    Args:
        below: logging level from which on messages are let through.
    """
    level = logging.root.manager.disable
    logging.disable(below - 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
