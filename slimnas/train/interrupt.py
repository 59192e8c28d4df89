"""Ctrl-C between steps instead of in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt(*, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C (SIGINT) instead of raising `KeyboardInterrupt`; raise at a second.

    Only the main thread gets signals; elsewhere nothing changes.

    Args:
        patient: note a second one as well: launchers of several processes pass on a Ctrl-C that
            the terminal has sent to all of them.

    Yields:
        A function that says whether there was one.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and not patient:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
