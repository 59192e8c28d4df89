"""One process per output folder: a lock that goes away with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from slimnas.errors import RunFolderError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[Path]:
    """Create `folder` if needed and hold `<folder>/.lock` while the block runs.

    The operating system drops the lock when the holder ends, killed or not, so that a file left
    behind locks nobody out. A second lock on the folder is refused, in the same process too.

    Yields:
        The folder.

    Raises:
        RunFolderError: another run holds the lock (names its process id), or the folder cannot
            be written.
    """
    folder = Path(folder)
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    except BlockingIOError:
        raise RunFolderError(
            f"{folder}: in use by another run (process {_holder(path)}); wait for it to end, "
            "or choose another folder with --output"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"{folder}: cannot be written ({error.strerror or error}); "
            "choose another folder with --output"
        ) from error
    try:
        yield folder
    finally:
        # Removed while still held: whoever opened it before sees below that it is not the same.
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
