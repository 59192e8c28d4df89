"""Commands that several processes run together, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from slimnas.errors import SlimnasError

OTHERS_WAIT_S = 5.0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes; launchers number them in `RANK`."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """An error that every process has is printed once.

    The main process says it and ends, on which the launcher ends the others while they wait here;
    an error that is another process's alone is said after that.
    """
    try:
        yield
    except SlimnasError:
        if not is_main_process():
            time.sleep(OTHERS_WAIT_S)
        raise
