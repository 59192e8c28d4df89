"""Atomic writes and readable reads: a file is whole, or it is not there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slimnas.errors import RunFolderError, SlimnasError

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp(\.\w+)?")
"""Names `atomic_path` gives."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block succeeds.

    For writers that want a file name (safetensors, matplotlib). The temporary file is
    removed when the block fails.

    Raises:
        RunFolderError: the folder cannot be written (permission, full disk).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # only now: some writers replace the file they are given
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never half.

    Raises:
        RunFolderError: the folder cannot be written (permission, full disk).
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Like `atomic_write_bytes`, for UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed writer left anywhere below `folder`.

    Only for a folder nobody else writes to, such as a locked run folder.
    """
    for path in Path(folder).rglob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def read_text(path: Path, error_type: type[SlimnasError], what: str) -> str:
    """Read UTF-8 text, turning every way that can fail into one line of `error_type`.

    Args:
        path: the file.
        error_type: the error to raise.
        what: what the file should be, for the message ("a search space").

    Raises:
        error_type: the file is missing, unreadable or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such file; expected {what}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: not UTF-8 text; expected {what}") from error
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror}); expected {what}") from error


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: cannot be written ({error.strerror or error}); "
        "free space or choose another place with --output"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
