"""The folder lock: refused while held, free again however the holder ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slimnas._lock import LOCK_FILE, folder_lock
from slimnas.errors import RunFolderError

HOLD = """
import sys, time
from slimnas._lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_lock_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "run"),
        pytest.raises(RunFolderError, match=rf"in use by another run \(process {os.getpid()}\)"),
        folder_lock(tmp_path / "run"),
    ):
        pass


def test_released_after_success_and_failure(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
    assert not (tmp_path / LOCK_FILE).exists()
    with pytest.raises(ValueError, match="inside"), folder_lock(tmp_path):
        raise ValueError("inside")
    with folder_lock(tmp_path):
        pass


def test_killed_holder_locks_nobody_out(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"process {other.pid}"), folder_lock(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait(30)
    assert (tmp_path / LOCK_FILE).exists()
    with folder_lock(tmp_path):
        pass


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"cannot be written .*--output") as caught:
        folder_lock(tmp_path / "file" / "run").__enter__()
    assert "\n" not in str(caught.value)
