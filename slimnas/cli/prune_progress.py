"""How a pruning run shows that it is alive: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.progress import TaskID

from slimnas.cli.bars import RunProgress

LINE_SECONDS = 10.0


class PruneProgress(RunProgress):
    """A listener of `slimnas.prune.run.run_prune` that draws on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[str, TaskID] = {}
        self._said_at = time.monotonic()

    def stage(self, name: str, done: int, total: int, state: str = "") -> None:
        """Move the bar of a stage; without a terminal write a line now and then and at its end."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, state=state)
        self._bars.update(self._tasks[name], completed=done, total=total, state=state)
        due = time.monotonic() - self._said_at > LINE_SECONDS
        if not self._console.is_terminal and (done >= total or due):
            self._said_at = time.monotonic()
            line = f"{name} {done}/{total} {state}".rstrip()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
