"""Importing what a kit's runner timed: a simulated device for exactness, then bad input."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import slimnas
from kit_world import DEVICE, FakeKit, edited, micro_scope
from measure_fakes import CALL_MS, FakeMachine, part_ms

from slimnas.arch.walk import walk
from slimnas.errors import LatencyTableError
from slimnas.latency import LatencyTable, estimate, missing_components, price_key
from slimnas.measure.build import BuiltTable
from slimnas.measure.imported import ImportJob, import_results

Lines = list[dict[str, Any]]


@pytest.fixture
def kit(tmp_path: Path) -> FakeKit:
    return FakeKit(tmp_path / "kit")


def imported(tmp_path: Path, *results: Path, **changes: Any) -> BuiltTable:
    return import_results(ImportJob(results, tmp_path / "tables" / "phone", **changes))


def refused(tmp_path: Path, *results: Path, **changes: Any) -> str:
    """The message of an import that must fail and leave nothing behind."""
    with pytest.raises(LatencyTableError) as caught:
        imported(tmp_path, *results, **changes)
    assert not (tmp_path / "tables").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_results_become_an_exact_table(kit: FakeKit, tmp_path: Path) -> None:
    built = imported(tmp_path, kit.run(tmp_path / "results.jsonl"))
    table = LatencyTable.load(built.path)
    space = micro_scope().space
    wanted = {price_key(part): part_ms(part) for part in micro_scope().components()}
    checked = 0
    for row in table.rows:
        if row.key in wanted:
            assert row.latency_ms == pytest.approx(wanted[row.key], rel=0.02, abs=2e-5)
            checked += 1
    assert checked == len(wanted) >= 10
    assert missing_components(space, table) == ()
    rng = random.Random(1)
    for _ in range(10):
        network = space.architecture(space.random(rng))
        truth = CALL_MS + sum(part_ms(part) for part in walk(network))
        assert estimate(network, table).latency_ms == pytest.approx(truth, rel=0.03)


def test_the_table_says_where_it_is_from(kit: FakeKit, tmp_path: Path) -> None:
    results = kit.run(tmp_path / "results.jsonl")
    built = imported(tmp_path, results)
    device = built.table.device
    assert (device.kind, device.name, device.soc, device.os) == (
        "imported",
        "phone",
        "a chip",
        "an OS 1",
    )
    assert (device.runtime.name, device.runtime.version) == ("onnxruntime", "1.0")
    assert device.errors[0].networks == len(built.held_out) == 3
    assert device.interval is not None
    assert any(kit.manifest.digest[:12] in note for note in device.notes)
    (kept,) = (built.path / "results").iterdir()
    assert gzip.decompress(kept.read_bytes()) == results.read_bytes()


def test_shards_make_the_same_table(kit: FakeKit, tmp_path: Path) -> None:
    whole = imported(tmp_path, kit.run(tmp_path / "whole.jsonl"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in (1, 2, 3):
        kit.run(folder / f"{i}.jsonl", shard=f"{i}/3")
    joined = imported(tmp_path / "joined", folder)
    assert [row.key for row in joined.table.rows] == [row.key for row in whole.table.rows]
    for one, other in zip(joined.table.rows, whole.table.rows, strict=True):
        assert one.latency_ms == pytest.approx(other.latency_ms, rel=0.01, abs=1e-5)


def test_a_slower_pace_is_scaled_away(tmp_path: Path) -> None:
    machine = FakeMachine(pace=lambda now: 1.04 if now > 100.3 else 1.0)
    built = imported(tmp_path, FakeKit(tmp_path / "kit", machine=machine).run(tmp_path / "r.jsonl"))
    exact = imported(tmp_path / "b", FakeKit(tmp_path / "kit2").run(tmp_path / "s.jsonl"))
    total, true = (sum(row.latency_ms for row in one.table.rows) for one in (built, exact))
    assert total == pytest.approx(true, rel=0.08)


def test_a_torn_last_line_is_skipped(kit: FakeKit, tmp_path: Path) -> None:
    path = kit.run(tmp_path / "results.jsonl")
    path.write_text(path.read_text() + '{"entry":"netw')
    assert imported(tmp_path, path).table.rows


def a_time(value: float) -> Callable[[Lines], None]:
    def change(lines: Lines) -> None:
        visits = [line for line in lines if "entry" in line]
        visits[3]["rounds"][1]["samples_ms"][0][2] = value

    return change


def twice(lines: Lines) -> None:
    lines.append(lines[-1])


def unknown_entry(lines: Lines) -> None:
    lines[-1]["entry"] = "block mb9d"


def too_few_terms(lines: Lines) -> None:
    lines[-1]["rounds"][0]["samples_ms"].append([1.0])


def interrupted(lines: Lines) -> None:
    del lines[-5:]


def changed_manifest(lines: Lines) -> None:
    lines[0]["manifest"]["files"][0]["macs"] += 1


def other_name(lines: Lines) -> None:
    lines[0]["kit"] = "f" * 64


def no_device(lines: Lines) -> None:
    del lines[0]["device"]


def jumping(lines: Lines) -> None:
    for i, line in enumerate(lines):
        for one in line.get("rounds", ()):
            one["reference_ms"] = [ms * (1 + 2 * (i % 2)) for ms in one["reference_ms"]]


def in_unit(factor: float) -> Callable[[Lines], None]:
    def change(lines: Lines) -> None:
        for line in lines:
            for one in line.get("rounds", ()):
                one["reference_ms"] = [ms * factor for ms in one["reference_ms"]]
                one["samples_ms"] = [[ms * factor for ms in ones] for ones in one["samples_ms"]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (a_time(math.nan), r"results.jsonl:6: every time of .* must be a positive number, got nan"),
        (a_time(-1.0), "positive number, got -1 ms"),
        (a_time(0.0), "positive number, got 0 ms"),
        (a_time(math.inf), "positive number, got inf ms"),
        (twice, "pass 0 of .* is there twice"),
        (unknown_entry, "entry 'block mb9d' is not in the kit"),
        (too_few_terms, "must have times of its"),
        (interrupted, "5 of .* entries were not timed: .* and 2 more; start run_kit.py again"),
        (changed_manifest, "digest: does not fit the rest"),
        (other_name, "kit: does not name the manifest"),
        (no_device, "results.jsonl:1: damaged header"),
        (jumping, "the reference network took from .* clocks jumped"),
        (in_unit(1e-3), "are the times in seconds"),
        (in_unit(1e3), "are the times in microseconds"),
    ],
)
def test_bad_results_are_refused(
    change: Callable[[Lines], None], message: str, kit: FakeKit, tmp_path: Path
) -> None:
    path = edited(kit.run(tmp_path / "results.jsonl"), change)
    assert re.search(message, refused(tmp_path, path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no latency results that slimnas knows"),
        ("hello\n", "no latency results that slimnas knows"),
        ('{"schema":"slimnas/latency-kit-results/1"}\n', "1: damaged header"),
    ],
)
def test_other_files_are_refused(text: str, message: str, kit: FakeKit, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    assert message in refused(tmp_path, path, kit=kit.write())


def test_a_damaged_line_is_named(kit: FakeKit, tmp_path: Path) -> None:
    path = kit.run(tmp_path / "results.jsonl")
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:-7]
    path.write_text("\n".join(lines) + "\n")
    assert "results.jsonl:5: damaged line" in refused(tmp_path, path)


def test_a_foreign_kit_is_refused(kit: FakeKit, tmp_path: Path) -> None:
    path = kit.run(tmp_path / "results.jsonl")
    other = FakeKit(tmp_path / "other", device="tablet").write()
    assert "is of kit" in refused(tmp_path, path, kit=other)
    second = FakeKit(tmp_path / "other", device="tablet").run(tmp_path / "second.jsonl")
    assert "join results of one kit only" in refused(tmp_path, path, second)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runtime", {"name": "onnxruntime", "version": "1.1"}),
        ("compute_unit", "gpu"),
        ("threads", 2),
        ("soc", "another chip"),
    ],
)
def test_unequal_shards_are_refused(key: str, value: Any, kit: FakeKit, tmp_path: Path) -> None:
    one = kit.run(tmp_path / "1.jsonl", shard="1/2")
    two = kit.run(tmp_path / "2.jsonl", shard="2/2", device={**DEVICE, key: value})
    assert f"device.{key} is {value!r}" in refused(tmp_path, one, two)


def test_a_slower_shard_is_refused(tmp_path: Path) -> None:
    one = FakeKit(tmp_path / "kit").run(tmp_path / "1.jsonl", shard="1/2")
    slow = FakeKit(tmp_path / "kit", machine=FakeMachine(pace=lambda _: 1.5))
    two = slow.run(tmp_path / "2.jsonl", shard="2/2")
    assert "shards must come from equal devices in the same state" in refused(tmp_path, one, two)


def test_a_shard_that_is_missing_or_there_twice(kit: FakeKit, tmp_path: Path) -> None:
    one = kit.run(tmp_path / "1.jsonl", shard="1/2")
    assert "give the other shards too" in refused(tmp_path, one)
    assert "given twice" in refused(tmp_path, one, one)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(one.read_bytes())
    assert "is there twice" in refused(tmp_path, one, copy)


def test_other_tables_are_kept(kit: FakeKit, tmp_path: Path) -> None:
    path = kit.run(tmp_path / "results.jsonl")
    built = imported(tmp_path, path)
    before = (built.path / "table.csv").read_bytes()
    with pytest.raises(LatencyTableError, match=r"holds a finished imported table .*--force"):
        imported(tmp_path, path)
    assert (built.path / "table.csv").read_bytes() == before
    assert imported(tmp_path, path, force=True).table.rows
    with pytest.raises(LatencyTableError, match="is the estimated table"):
        import_results(ImportJob((path,), tmp_path / "iphone12"))
    with pytest.raises(LatencyTableError, match="must be letters"):
        import_results(ImportJob((path,), tmp_path / "a phone"))


def test_noise_beyond_sense_is_refused(kit: FakeKit, tmp_path: Path) -> None:
    def shorter_chains(lines: Lines) -> None:
        for line in lines:
            if str(line.get("entry")).startswith("block"):
                for one in line["rounds"]:
                    one["samples_ms"].reverse()

    path = edited(kit.run(tmp_path / "results.jsonl"), shorter_chains)
    assert "too noisy" in refused(tmp_path, path)


def test_command_line(
    kit: FakeKit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    kit.run(tmp_path / "results.jsonl")
    options = ("--device", "phone", "--soc", "Tensor G3", "--describe", "Pixel 8", "--json")
    answer = slimnas(capsys, "latency", "import", "results.jsonl", *options)
    assert answer.code == 0
    said = json.loads(answer.out)
    assert said["device"] == {"name": "phone", "kind": "imported"}
    table = LatencyTable.load(tmp_path / said["path"])
    assert (table.device.soc, table.device.device) == ("Tensor G3", "Pixel 8")
    answer = slimnas(capsys, "latency", "import", "nothing.jsonl", "--device", "other")
    assert answer.code == 1
    assert "nothing.jsonl: no such file; expected latency results" in answer.err
