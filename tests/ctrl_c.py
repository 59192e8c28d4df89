"""Ctrl-C for tests that run beside others in one process."""

from __future__ import annotations

import signal


def press_ctrl_c() -> None:
    """Call what Python calls at a Ctrl-C.

    No signal is sent: where it is the process's default action, it would end the test run.
    """
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler), handler
    handler(signal.SIGINT, None)
