"""Files of networks, made ahead of timing in several processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from exporting_runtimes import Tracing
from measure_fakes import FakeMachine, FakeRuntime, cost_ms, small_space

from slimnas.arch.walk import walk
from slimnas.errors import ExportError
from slimnas.measure.exports import (
    WORTH_STARTING,
    Exports,
    OnExport,
    exports_slowly,
    in_folder,
)
from slimnas.measure.journal import Visit
from slimnas.measure.machine import usable_cores
from slimnas.measure.networks import network_and_input
from slimnas.measure.plan import Entry, Term
from slimnas.measure.scope import Parts
from slimnas.measure.timing import Protocol
from slimnas.measure.visits import Bench, in_passes
from slimnas.runtimes.registry import get_runtime

TESTS = Path(__file__).parent
TWO = (usable_cores() * 2)[:2]
"""Two processes, on one core where there is no other."""


def networks(count: int) -> list[Parts]:
    space, rng = small_space(), random.Random(0)
    found = {tuple(walk(space.architecture(space.random(rng)))): None for _ in range(50)}
    return list(found)[:count]


at = partial(in_folder, suffix=".txt")


def words(exports: Exports, wanted: Sequence[Parts]) -> list[list[str]]:
    return [exports.model(parts).decode().split() for parts in wanted]


def params(parts: Parts) -> int:
    return sum(one.numel() for one in network_and_input(parts, 1)[0].parameters())


@pytest.fixture(scope="module")
def made() -> list[Parts]:
    wanted = networks(5)
    assert len({params(parts) for parts in wanted}) == 5
    return wanted


def test_several_processes_make_what_one_makes(made: list[Parts], tmp_path: Path) -> None:
    """The same weights, each file once, by other processes with one thread on the given cores."""
    runtime, seen = Tracing(os.getpid()), []
    with Exports(runtime, 1, at(tmp_path / "ahead"), cores=TWO) as exports:
        exports.prepare([*made, *made[:2]], lambda *counts: seen.append(counts))
        ahead = words(exports, made)
        files = sorted((tmp_path / "ahead").iterdir())
        exports.prepare(made, lambda *counts: seen.append(counts))
    assert seen == [(done, 5) for done in range(6)]  # the second time nothing was left
    assert len(files) == 5
    with Exports(runtime, 1, at(tmp_path / "one by one"), cores=TWO[:1]) as exports:
        exports.prepare(made, lambda *counts: seen.append(counts))
        assert not (tmp_path / "one by one").exists()
        alone = words(exports, made)
    assert [one[0] for one in ahead] == [one[0] for one in alone]
    assert len({one[0] for one in ahead}) == 5
    assert {one[1] for one in alone} == {str(os.getpid())}
    workers = {one[1] for one in ahead}
    assert str(os.getpid()) not in workers
    assert 1 <= len(workers) <= 2
    assert {tuple(one[2:]) for one in ahead} == {("+".join(map(str, sorted(set(TWO)))), "1")}
    for pid in map(int, workers):
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.kill(pid, 0)


def test_a_file_is_a_networks_wherever_it_stands(made: list[Parts], tmp_path: Path) -> None:
    moved = tuple(replace(part, name=f"elsewhere.{part.name}", stage=7) for part in made[0])
    with Exports(Tracing(os.getpid()), 1, at(tmp_path), cores=TWO[:1]) as exports:
        first = exports.model(made[0])
        assert exports.model(moved) == first
        assert len(list(tmp_path.iterdir())) == 1


def test_a_network_without_a_form_is_said(made: list[Parts], tmp_path: Path) -> None:
    count = params(made[3])
    with (
        Exports(Tracing(os.getpid(), refuses=count), 1, at(tmp_path), cores=TWO) as exports,
        pytest.raises(ExportError, match=f"no form for {count} parameters"),
    ):
        exports.prepare(made)


def test_killed_processes_leave_the_work(made: list[Parts], tmp_path: Path) -> None:
    with Exports(Tracing(os.getpid(), dies=True), 1, at(tmp_path), cores=TWO) as exports:
        exports.prepare(made)
        assert list(tmp_path.iterdir()) == []
        exports.prepare(made)  # not tried again
        assert {one[1] for one in words(exports, made)} == {str(os.getpid())}


PARENT = """
import os, signal, sys
from pathlib import Path
from exporting_runtimes import Tracing
from test_measure_exports import networks
from slimnas.measure.exports import Exports, in_folder
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    folder = Path(sys.argv[1])
    runtime, place = Tracing(os.getpid(), sleeps_s=60, left=folder), in_folder(folder, ".txt")
    with Exports(runtime, 1, place, cores=(0, 0)) as exports:
        exports.prepare(networks(4))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    """Killed, or interrupted from a terminal, which asks the whole group."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    parent = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = time.monotonic() + 120
    while not (workers := [int(one.name) for one in tmp_path.iterdir() if one.name.isdigit()]):
        assert parent.poll() is None
        assert time.monotonic() < ended, "no process began to export"
        time.sleep(0.05)
    if how is signal.SIGKILL:
        parent.kill()
    else:
        os.killpg(parent.pid, how)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert said.count("Traceback") <= 1  # the parent's own
    assert not list(tmp_path.glob("*.txt"))
    while time.monotonic() < ended and any(map(_lives, workers)):
        time.sleep(0.05)
    assert not any(map(_lives, workers))


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_which_runtimes_export_slowly() -> None:
    names = ("executorch", "coreml", "coreml[cpu]", "onnxruntime", "openvino")
    assert [exports_slowly(FakeRuntime(name=name)) for name in names] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_files_are_those_of_the_runtime(made: list[Parts], tmp_path: Path) -> None:
    """ONNX Runtime's, made in another process: the bytes that it exports here."""
    runtime = get_runtime("onnxruntime")
    with Exports(runtime, 1, at(tmp_path), cores=TWO) as exports:
        exports.prepare(made[:WORTH_STARTING])
        assert len(list(tmp_path.iterdir())) == WORTH_STARTING
        for parts in made[:2]:
            assert exports.model(parts) == runtime.export(*network_and_input(parts, 1))


def test_a_few_start_no_processes(made: list[Parts], tmp_path: Path) -> None:
    with Exports(Tracing(os.getpid()), 1, at(tmp_path), cores=TWO) as exports:
        exports.prepare(made[: WORTH_STARTING - 1])
        assert list(tmp_path.iterdir()) == []


def test_networks_are_prepared_a_pass_at_a_time(made: list[Parts]) -> None:
    """All networks of a pass and the reference, before any of them is timed."""
    machine, events = FakeMachine(), []

    def prepare(wanted: Sequence[Parts], on_export: OnExport) -> None:
        events.append({cost_ms(parts) for parts in wanted})
        for count in range(26):
            on_export(count, 25)

    entries = [Entry(f"{i}", (Term(parts, 1.0),)) for i, parts in enumerate(made[1:])]
    protocol = Protocol(rounds=1, passes=2)
    visits: list[Visit] = []
    shown: list[str] = []

    def keep(visit: Visit) -> None:
        visits.append(visit)
        events.append(visit.entry)

    bench = Bench(FakeRuntime(), protocol, made[0], machine.loader, machine.clocks, prepare)
    passes = in_passes(entries, protocol)
    bench.make(passes, visits, keep, lambda done, planned, what: shown.append(what))
    costs = {cost_ms(parts) for parts in made}
    assert [events[0], events[5]] == [costs, costs]
    assert sorted(events[1:5]) == sorted(events[6:]) == ["0", "1", "2", "3"]
    ahead = [one for one in shown if one.startswith("exporting ahead")]
    assert ahead[:3] == [f"exporting ahead, {count} of 25" for count in (0, 2, 4)]
    assert ahead[-1] == "exporting ahead, 25 of 25"
    assert len(ahead) == 2 * 14
