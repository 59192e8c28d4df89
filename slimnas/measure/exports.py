"""Files of networks for runtimes that export slowly: made once each, in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from multiprocessing.connection import wait
from pathlib import Path

import torch

from slimnas._files import atomic_write_bytes
from slimnas.measure.machine import usable_cores, use_cores
from slimnas.measure.networks import identity, network_and_input
from slimnas.measure.scope import Parts
from slimnas.runtimes.base import FileRuntime, Runtime

SLOW_EXPORTS = ("executorch", "coreml")
"""Runtimes that take a second per block."""

MOST_PROCESSES = 8
"""Each holds PyTorch and a network being exported: about a gigabyte."""

WORTH_STARTING = 4
"""Files to make from which processes save more time than they take to start."""

OnExport = Callable[[int, int], None]
"""Called with the files made so far and those to make."""


def exports_slowly(runtime: Runtime) -> bool:
    """Tell whether the files of `runtime` are worth keeping and making side by side."""
    return runtime.name.partition("[")[0] in SLOW_EXPORTS


class Exports:
    """Files of networks, each made once.

    Processes that Python starts import the main module: a script that prepares exports needs its
    `if __name__ == "__main__"`.

    Args:
        runtime: what exports them.
        batch: images per call.
        place: where a network's file is kept; the same for networks that compute the same.
        cores: that processes may use, whatever the calling thread is pinned to later; by default
            all that it may use now. One process per core, at most `MOST_PROCESSES`.
    """

    def __init__(
        self,
        runtime: FileRuntime,
        batch: int,
        place: Callable[[Parts], Path],
        *,
        cores: Iterable[int] | None = None,
    ) -> None:
        self._runtime, self._batch, self._place = runtime, batch, place
        self._cores = tuple(usable_cores() if cores is None else cores)
        self._pool: ProcessPoolExecutor | None = None
        self._alone = len(self._cores) < 2

    def model(self, parts: Parts) -> bytes:
        """The file of a network, exported unless it is there."""
        path = self._place(parts)
        if not path.exists():
            _export(self._runtime, parts, self._batch, path)
        return path.read_bytes()

    def prepare(self, networks: Iterable[Parts], on_export: OnExport | None = None) -> None:
        """Export the networks that have no file yet, several at a time where cores allow.

        Nothing may be timed meanwhile. A few are left to `model`, and so is what lacks where
        processes cannot be started, or one is killed.

        Raises:
            ExportError: the runtime has no form for one of them.
        """
        paths = {self._place(parts): parts for parts in networks}
        todo = {path: parts for path, parts in paths.items() if not path.exists()}
        if self._alone or len(todo) < WORTH_STARTING:
            return
        show = on_export or (lambda *_: None)
        longest_first = sorted(todo.items(), key=lambda item: -len(item[1]))
        try:
            pool = self._opened()
            with _starting(self._cores):
                waiting = [
                    pool.submit(_export, self._runtime, parts, self._batch, path)
                    for path, parts in longest_first
                ]
            try:
                show(0, len(todo))
                for made, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    show(made, len(todo))
            finally:
                for future in waiting:
                    future.cancel()
        except BrokenProcessPool:
            self._alone = True
            self.close()

    def close(self) -> None:
        """End the processes; what they are exporting is finished first."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Exports:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                min(len(self._cores), MOST_PROCESSES),
                multiprocessing.get_context("spawn"),  # a fork would inherit held locks
                _begin,
                (signal.getsignal(signal.SIGINT) is not signal.SIG_IGN,),
            )
        return self._pool


def in_folder(folder: Path, suffix: str) -> Callable[[Parts], Path]:
    """Return a `place` in `folder`: files named by what a network computes."""

    def place(parts: Parts) -> Path:
        return folder / f"{sha256(str(identity(parts)).encode()).hexdigest()}{suffix}"

    return place


def _export(runtime: FileRuntime, parts: Parts, batch: int, path: Path) -> None:
    network, x = network_and_input(parts, batch)
    atomic_write_bytes(path, runtime.export(network, x))


@contextlib.contextmanager
def _starting(cores: Iterable[int]) -> Iterator[None]:
    """Let processes that are started meanwhile have `cores`, and ignore Ctrl-C until they `_begin`.

    Interrupted while they import, each would print a traceback.
    """
    own = usable_cores()
    use_cores(cores)
    main = threading.current_thread() is threading.main_thread()
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, heard)
        use_cores(own)


def _begin(interruptible: bool) -> None:
    """Make this process one that exports: on one thread, and no longer than its parent lives.

    Args:
        interruptible: whether Ctrl-C ends its parent; a job in the background ignores it.
    """
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
