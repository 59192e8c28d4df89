"""Shards: parts of a build on several hosts, joined; tables recomputed from their samples."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measure_fakes import FakeMachine, FakeRuntime, part_ms, small_space
from typer.testing import CliRunner

from slimnas.cli.latency import app
from slimnas.errors import LatencyTableError
from slimnas.latency import LatencyTable, price_key
from slimnas.latency.spaces import space_components
from slimnas.measure.build import (
    JOURNAL_FILE,
    SAMPLES_FILE,
    BuildJob,
    build_shard,
    build_table,
)
from slimnas.measure.schedule import Networks, Shard
from slimnas.measure.scope import SpaceScope
from slimnas.measure.shards import merge, recompute
from slimnas.measure.timing import Protocol

QUICK = Protocol(rounds=2, passes=2, visit_ms=0.5, sample_ms=0.1)
NETWORKS = Networks(0, 4)  # prices as they were timed


def job(folder: Path, shard: Shard | None = None) -> BuildJob:
    return BuildJob(folder, SpaceScope(small_space()), QUICK, networks=NETWORKS, shard=shard)


def shards(folder: Path, of: int = 3, *, pace: float = 1.0, **runtime: Any) -> list[Path]:
    found = []
    for number in range(1, of + 1):
        # every host has its own pace; the reference brings them together
        machine = FakeMachine(pace=lambda _, number=number: 1 + pace * (number - 1) / 10)
        build_shard(
            job(folder / f"{number}", Shard(number, of)),
            FakeRuntime(**runtime),  # type: ignore[arg-type]
            loader=machine.loader,
            clocks=machine.clocks,
        )
        found.append(folder / f"{number}")
    return found


def test_shards_make_the_table_of_one_host(tmp_path: Path) -> None:
    parts = shards(tmp_path, pace=0.0)
    lines = [(part / JOURNAL_FILE).read_text().splitlines()[1:] for part in parts]
    timed = [{json.loads(line)["entry"] for line in part} for part in lines]
    assert timed[0].isdisjoint(timed[1])
    assert timed[0].isdisjoint(timed[2])
    built = merge(parts, tmp_path / "joined")
    wanted = {price_key(part): part_ms(part) for part in space_components(small_space())}
    checked = 0
    for row in built.table.rows:
        if row.key in wanted:
            assert row.latency_ms == pytest.approx(wanted[row.key], rel=1e-3, abs=2e-6)
            checked += 1
    assert checked >= 12
    assert LatencyTable.load(tmp_path / "joined").rows == built.table.rows
    assert len(built.held_out) == 4


def test_hosts_of_another_pace_are_brought_together(tmp_path: Path) -> None:
    built = merge(shards(tmp_path, pace=1.0), tmp_path / "joined")
    wanted = {price_key(part): part_ms(part) for part in space_components(small_space())}
    paces = [
        row.latency_ms / wanted[row.key]
        for row in built.table.rows
        if row.key in wanted and row.latency_ms > 0.01
    ]
    assert len(paces) >= 10
    assert max(paces) / min(paces) < 1.01
    assert 1.0 <= min(paces) <= max(paces) <= 1.2


def test_a_shard_goes_on_and_an_unfinished_one_is_named(tmp_path: Path) -> None:
    parts = shards(tmp_path, of=2)
    journal = parts[1] / JOURNAL_FILE
    whole = journal.read_bytes()
    journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    with pytest.raises(LatencyTableError, match=r"2: lacks at least 3 of its visits, first "):
        merge(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    machine = FakeMachine(pace=lambda _: 1.1)
    again = build_shard(
        job(parts[1], Shard(2, 2)),
        FakeRuntime(),  # type: ignore[arg-type]
        loader=machine.loader,
        clocks=machine.clocks,
    )
    assert again.visits - again.resumed == 3
    merge(parts, tmp_path / "joined")


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    parts = shards(tmp_path / "one", of=2)
    with pytest.raises(LatencyTableError, match="shard 2 is missing"):
        merge(parts[:1], tmp_path / "joined")
    with pytest.raises(LatencyTableError, match=r"is shard 1 of the build, as .*1 is"):
        merge([parts[0], parts[0]], tmp_path / "joined")
    newer = shards(tmp_path / "two", of=2, version="2")
    with pytest.raises(LatencyTableError, match=r"its runtime is version '2', not '1'"):
        merge([parts[0], newer[1]], tmp_path / "joined")
    with pytest.raises(LatencyTableError, match=r"journal\.jsonl: no build's journal there"):
        merge([tmp_path / "nowhere"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize("given", [(0, 2), (3, 2)])
def test_shard_numbers_must_be_within(given: tuple[int, int]) -> None:
    with pytest.raises(LatencyTableError, match="--shard must be i/n"):
        Shard(*given)
    assert str(Shard(1, 2)) == "1/2"


def test_a_table_is_recomputed_to_the_same_bytes(tmp_path: Path) -> None:
    machine = FakeMachine(noise=0.01)
    wanted = replace(job(tmp_path / "fake"), networks=Networks(None, 4))
    build_table(wanted, FakeRuntime(), loader=machine.loader, clocks=machine.clocks)  # type: ignore[arg-type]
    before = {path.name: path.read_bytes() for path in (tmp_path / "fake").iterdir()}
    (tmp_path / "fake" / "timings.csv").unlink()
    recompute(tmp_path / "fake")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fake").iterdir()} == before
    assert len(before) == 4
    samples = tmp_path / "fake" / SAMPLES_FILE
    lines = gzip.decompress(samples.read_bytes()).splitlines(keepends=True)
    other = lines[-1].replace(b'"network ', b'"networks ').replace(b'"block', b'"blocks')
    assert other != lines[-1]
    samples.write_bytes(gzip.compress(b"".join([*lines[:-1], other])))
    with pytest.raises(LatencyTableError, match=r"must be of a build by this version, these hold"):
        recompute(tmp_path / "fake")
    samples.write_bytes(b"no gzip")
    with pytest.raises(LatencyTableError, match="must hold a build's samples"):
        recompute(tmp_path / "fake")


def test_a_merged_table_is_recomputed_too(tmp_path: Path) -> None:
    merge(shards(tmp_path, of=2), tmp_path / "joined")
    before = (tmp_path / "joined" / "table.csv").read_bytes()
    recompute(tmp_path / "joined")
    assert (tmp_path / "joined" / "table.csv").read_bytes() == before


def test_command_line_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [str(part) for part in shards(tmp_path, of=2)]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["merge", *parts, "--device", "both", "--json"])
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["device"] == {"name": "both", "kind": "measured"}
    assert body["rows"] == len(LatencyTable.load(tmp_path / "lookup_tables" / "both").rows)
    result = CliRunner().invoke(app, ["recompute", "lookup_tables/both"])
    assert result.exit_code == 0, result.output
    assert "held-out network: predicted" in result.stdout
