"""Runs micro searches that are killed at chosen moments and started again until they end.

A program of its own: it forks before any thread runs, so that every start is a fresh process
without the seconds of a fresh import. Writes one JSON object: moment -> number of starts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from micro import made_up_table, micro_space

from slimnas._lock import folder_lock
from slimnas.data.splits import SearchData, open_data
from slimnas.search.checks import space_digest, table_digest
from slimnas.search.config import SearchConfig, claim
from slimnas.search.run import RunOptions, SearchResult, run_search
from slimnas.supernet.train import SupernetRecipe, TrainedSupernet
from slimnas.train import loop

SIDE = 16
RECIPE = SupernetRecipe(epochs=2, batch_size=32)


class Moments:
    """A listener that kills its own process at the n-th event of a kind."""

    def __init__(self, kind: str = "", number: int = 0) -> None:
        self._kind, self._number = kind, number
        self._seen: Counter[str] = Counter()

    def pass_by(self, kind: str) -> None:
        self._seen[kind] += 1
        if kind == self._kind and self._seen[kind] == self._number:
            os.kill(os.getpid(), signal.SIGKILL)

    def training(self, progress: Any) -> None:
        self.pass_by("step" if progress.search_top1 is None else "epoch")

    def slimming(self, trajectory: Any, target_ms: float) -> None:
        self.pass_by("slimmed")

    def evaluated(self, selection: Any, top1: float) -> None:
        self.pass_by("evaluated")

    def measuring(self, target_ms: float, number: int) -> None:
        self.pass_by("measuring")

    def measured(self, measurement: Any) -> None:
        self.pass_by("measured")

    def watch_files(self) -> None:
        """Also pass by before and after every file is put in its place."""
        original = Path.replace

        def replace(source: Path, target: Path) -> Path:
            self.pass_by(f"before {target.name}")
            result = original(source, target)
            self.pass_by(f"after {target.name}")
            return result

        Path.replace = replace  # type: ignore[method-assign, assignment]


@cache
def digits() -> SearchData:
    return open_data(
        "digits", resolution=(SIDE, SIDE), channels=1, seed=0, max_images=240
    ).for_search()


def search(
    folder: Path,
    targets_ms: tuple[float, ...],
    *,
    listener: Moments | None = None,
    supernet: TrainedSupernet | None = None,
    **changes: Any,
) -> SearchResult:
    space = micro_space()
    table = made_up_table(space)
    config = SearchConfig.model_validate(
        {
            "space": "micro",
            "space_digest": space_digest(space),
            "device": "made-up",
            "table_digest": table_digest(table),
            "targets_ms": targets_ms,
            "resolution": SIDE,
            "recipe": None if supernet else RECIPE,
            "supernet_digest": supernet.digest if supernet else None,
            "calibration_images": 32,
            **changes,
        }
    )
    with folder_lock(folder):
        claim(folder, config)
        return run_search(
            config,
            space,
            table,
            digits(),
            folder,
            listener=listener or Moments(),
            options=RunOptions("cpu", supernet),
        )


def until_done(folder: Path, targets_ms: tuple[float, ...], moment: str) -> int:
    """Start until the search ends; `moment` is `3 step`, or `every 3 step` for each start."""
    number, _, kind = moment.removeprefix("every ").partition(" ")
    is_each = moment.startswith("every ")
    for start in range(1, 200):
        child = os.fork()
        if child == 0:
            armed = is_each or start == 1
            listener = Moments(kind, int(number)) if armed else Moments()
            listener.watch_files()
            search(folder, targets_ms, listener=listener)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return start
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"{moment}: start {start} failed")
    raise RuntimeError(f"{moment}: never ended")


def main() -> None:
    root, targets, *moments = sys.argv[1:]
    torch.set_num_threads(1)
    loop.CHECKPOINT_SECONDS = 0.0  # after every step, so that little runs are resumed too
    importlib.import_module("torch._dynamo")  # what the first optimizer would import, each time
    digits()
    targets_ms = tuple(float(target) for target in targets.split(","))
    starts = {
        moment: until_done(Path(root) / moment.replace(" ", "_"), targets_ms, moment)
        for moment in moments
    }
    sys.stdout.write(json.dumps(starts))


if __name__ == "__main__":
    main()
