"""Runs small prunings that are killed at chosen moments and started again until they end.

A program of its own, as `killed_searches`: it forks before any thread runs. Writes one JSON
object: moment -> number of starts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from prune_world import Events, budget, prune

from slimnas._lock import folder_lock
from slimnas.prune import scored
from slimnas.train import loop

SETTINGS: dict[str, Any] = {
    "correction": "bias",
    "finetune": {"epochs": 1, "batch_size": 20},
    "iterations": 2,
}


class Kills(Events):
    """Kills its own process at the n-th event of a kind: of a stage, or of a file put in place."""

    def __init__(self, kind: str = "", number: int = 0) -> None:
        super().__init__()
        self._kind, self._number = kind, number
        self._counts: Counter[str] = Counter()

    def at(self, name: str, done: int) -> None:
        self.pass_by(name.rpartition(": ")[2])

    def pass_by(self, kind: str) -> None:
        self._counts[kind] += 1
        if kind == self._kind and self._counts[kind] == self._number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self) -> None:
        """Also pass by before and after every file is put in its place."""
        original = Path.replace

        def replace(source: Path, target: Path) -> Path:
            self.pass_by(f"before {target.name}")
            result = original(source, target)
            self.pass_by(f"after {target.name}")
            return result

        Path.replace = replace  # type: ignore[method-assign, assignment]


def until_done(folder: Path, moment: str) -> int:
    """Start until the run ends; `moment` is `3 importance`, `every ...` for each start."""
    number, _, kind = moment.removeprefix("every ").partition(" ")
    for start in range(1, 100):
        child = os.fork()
        if child == 0:
            armed = moment.startswith("every ") or start == 1
            listener = Kills(kind, int(number)) if armed else Kills()
            listener.watch_files()
            with folder_lock(folder):
                prune(folder, budget("60%", 0.6), listener=listener, **SETTINGS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return start
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"{moment}: start {start} failed")
    raise RuntimeError(f"{moment}: never ended")


def main() -> None:
    root, *moments = sys.argv[1:]
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = scored.SAVE_SECONDS = 0.0
    importlib.import_module("torch._dynamo")  # what the first optimizer would import, each time
    starts = {m: until_done(Path(root) / m.replace(" ", "_"), m) for m in moments}
    sys.stdout.write(json.dumps(starts))


if __name__ == "__main__":
    main()
