"""Importing times of single files, as other tools write them, and what of it is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from kit_world import FakeKit, micro_scope
from measure_fakes import part_ms

from slimnas.errors import LatencyTableError
from slimnas.latency import price_key
from slimnas.measure.build import BuiltTable
from slimnas.measure.imported import ImportJob, Stated, import_results, read_mapping
from slimnas.measure.imported_files import name_of, read_file_times

Times = Mapping[str, float]
Writer = Callable[[Path, Times], None]

LITERT = """\
INFO: STARTING!
INFO: Graph: [/data/local/tmp/{name}.tflite]
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if \
exceeding 150 seconds.
INFO: count=6 first=140706 curr=74599 min=74599 max=140706 avg=85791.2 std=24559

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if \
exceeding 150 seconds.
INFO: count=50 first=74456 curr=74516 min=73909 max=75323 avg={average} std=268 p5=1 \
median={us:.9g} p95=2

INFO: Inference timings in us: Init: 18738, First inference: 140706, Warmup (avg): 85791.2, \
Inference (avg): {average}
"""
PERF = """\
Setting intra_op_num_threads to 1
Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.49481 s
Total inference requests: 5
Average inference time cost{total}: {average:.9g} ms
Total inference run time: 0.494854 s
{median}Avg CPU usage: 11 %
"""


def write_csv(unit: str, factor: float) -> Writer:
    def write(folder: Path, times: Times) -> None:
        lines = [f"{name},{ms * factor!r}\n" for name, ms in times.items() for _ in range(3)]
        random.Random(0).shuffle(lines)
        (folder / "times.csv").write_text(f"file,{unit}\n{''.join(lines)}")

    return write


def hub_profile(ms: float) -> dict[str, Any]:
    summary = {
        "estimated_inference_time": round(900 * ms, 3),
        "all_inference_times": [7000 * ms, *[1000 * ms] * 20],
        "inference_memory_peak_range": [50000, 100000],
    }
    return {"execution_summary": summary, "execution_detail": []}


def write_hub_files(folder: Path, times: Times) -> None:
    for name, ms in times.items():
        (folder / f"{name_of(name)}.json").write_text(json.dumps(hub_profile(ms)))


def write_hub_jobs(folder: Path, times: Times) -> None:
    jobs = [{"name": name_of(name), "profile": hub_profile(ms)} for name, ms in times.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))


def write_hub_mapping(folder: Path, times: Times) -> None:
    found = {name: hub_profile(ms) for name, ms in times.items()}
    (folder / "jobs.json").write_text(json.dumps(found, indent=1))


def write_ort_profiles(folder: Path, times: Times) -> None:
    for name, ms in times.items():
        events: list[dict[str, Any]] = [{"cat": "Session", "name": "session_init", "dur": 9}]
        durations = [9000 * ms, *[1000 * ms] * 6]
        events += [{"cat": "Session", "name": "model_run", "dur": d} for d in durations]
        events += [{"cat": "Node", "name": "conv_kernel_time", "dur": 3}]
        (folder / f"{name_of(name)}.json").write_text(json.dumps(events))


def write_perf_medians(folder: Path, times: Times) -> None:
    for name, ms in times.items():
        middle = f"Min Latency: 0.09 s\nP50 Latency: {ms / 1e3!r} s\nP90 Latency: 0.1 s\n"
        text = PERF.format(total=" total", average=3 * ms, median=middle)
        (folder / f"{name_of(name)}.txt").write_text(text)


def write_perf_averages(folder: Path, times: Times) -> None:
    for name, ms in times.items():
        text = PERF.format(total="", average=ms, median="")
        (folder / f"{name_of(name)}.onnx.log").write_text(text)


def write_litert_log(folder: Path, times: Times) -> None:
    runs = [
        LITERT.format(name=name_of(name), average=2e3 * ms, us=1e3 * ms)
        for name, ms in times.items()
    ]
    (folder / "adb.log").write_text("".join(runs))


def write_old_litert(folder: Path, times: Times) -> None:
    for name, ms in times.items():
        text = LITERT.format(name=name_of(name), average=f"{1e3 * ms:.9g}", us=1)
        lines = [line.partition(" p5=")[0] for line in text.splitlines() if "Graph" not in line]
        (folder / f"{name_of(name)}.txt").write_text("\n".join(lines))


@pytest.fixture
def kit(tmp_path: Path) -> FakeKit:
    return FakeKit(tmp_path / "kit")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "given"
    found.mkdir()
    return found


def imported(kit: FakeKit, given: Path, **changes: Any) -> BuiltTable:
    output = given.parent / "tables" / "phone"
    return import_results(ImportJob((given,), output, kit=kit.write(), **changes))


@pytest.mark.parametrize(
    ("write", "runtime"),
    [
        (write_csv("latency_ms", 1.0), "onnxruntime"),
        (write_csv("latency_us", 1e3), "onnxruntime"),
        (write_csv("latency_s", 1e-3), "onnxruntime"),
        (write_hub_files, "qualcomm-ai-hub"),
        (write_hub_jobs, "qualcomm-ai-hub"),
        (write_hub_mapping, "qualcomm-ai-hub"),
        (write_ort_profiles, "onnxruntime"),
        (write_perf_medians, "onnxruntime"),
        (write_perf_averages, "onnxruntime"),
        (write_litert_log, "litert"),
        (write_old_litert, "litert"),
    ],
)
def test_every_tool_gives_the_same_table(
    write: Writer, runtime: str, kit: FakeKit, folder: Path
) -> None:
    write(folder, kit.times())
    built = imported(kit, folder)
    assert built.table.device.kind == "imported"
    assert built.table.device.runtime.name == runtime
    wanted = {price_key(part): part_ms(part) for part in micro_scope().components()}
    rows = [row for row in built.table.rows if row.key in wanted]
    assert len(rows) == len(wanted) >= 10
    for row in rows:
        assert row.latency_ms == pytest.approx(wanted[row.key], rel=0.02, abs=2e-5)
    assert len(built.held_out) == 3
    assert built.table.device.errors[0].mape_percent < 2


def test_samples_give_a_spread(kit: FakeKit, folder: Path) -> None:
    rng = random.Random(0)
    lines = [
        f"{name},{ms * (1 + 0.01 * rng.random())}\n"
        for name, ms in kit.times().items()
        for _ in range(20)
    ]
    (folder / "times.csv").write_text("file,latency_ms\n" + "".join(lines))
    built = imported(kit, folder)
    blocks = [row for row in built.table.rows if row.key.component == "block"]
    assert blocks
    assert all(row.spread_ms > 0 and row.n == 5 for row in blocks)


def test_what_is_stated_is_kept(kit: FakeKit, folder: Path) -> None:
    write_litert_log(folder, kit.times())
    stated = Stated("Galaxy S24", "8 Gen 3", "Android 14", "litert", "1.2", "gpu", 4)
    device = imported(kit, folder, stated=stated).table.device
    assert (device.device, device.soc, device.os) == ("Galaxy S24", "8 Gen 3", "Android 14")
    assert (device.runtime.version, device.compute_unit, device.threads) == ("1.2", "gpu", 4)


def test_names_can_be_mapped(kit: FakeKit, folder: Path, tmp_path: Path) -> None:
    times = {f"model{i}": ms for i, ms in enumerate(kit.times().values())}
    write_hub_jobs(folder, times)
    with pytest.raises(
        LatencyTableError, match=r"no file of the kit is called 'model0'.*--mapping"
    ):
        imported(kit, folder)
    path = tmp_path / "names.csv"
    rows = [f"{given},{file}\n" for given, file in zip(times, kit.times(), strict=True)]
    path.write_text("result,file\n" + "".join(rows))
    assert imported(kit, folder, mapping=read_mapping(path)).table.rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,result\na,b\n", r"1: must have the columns result,file"),
        ("result,file\na,b\na,c\n", r"3: names a result twice"),
        ("result,file\na\n", r"2: must have 2 values, has 1"),
    ],
)
def test_bad_mappings(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    path.write_text(text)
    with pytest.raises(LatencyTableError, match=message):
        read_mapping(path)


@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf"])
def test_times_must_be_positive(value: str) -> None:
    with pytest.raises(LatencyTableError, match=r"t\.csv:3: the time of a must be a positive"):
        read_file_times(f"file,latency_ms\na,1\na,{value}\n", "t.csv")
    number = value.replace("nan", "NaN").replace("inf", "Infinity")
    hub = f'{{"execution_summary": {{"estimated_inference_time": {number}}}}}'
    with pytest.raises(LatencyTableError, match=r"the time of 007_x must be a positive number"):
        read_file_times(hub, "007_x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,latency\na,1\n", "which says the unit"),
        ("file,latency_ms,latency_us\na,1,1000\n", "which says the unit"),
        ("file,latency_ms\na\n", "must have 2 values, has 1"),
        ("file,latency_ms\na,fast\n", "latency_ms must be a number, got 'fast'"),
        ("file,latency_ms\n", "holds no times"),
        ('{"a": {"execution_summary"', "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"a": 1}', "no latency results that slimnas knows"),
        ("[]", "no latency results that slimnas knows"),
        ('{"execution_summary": {}}', "must be a number, got None"),
        ("", "no latency results that slimnas knows"),
    ],
)
def test_bad_files(text: str, message: str) -> None:
    with pytest.raises(LatencyTableError, match=f"^t:?.*{message}"):
        read_file_times(text, "t")


def in_seconds(times: Times) -> Times:
    return {name: ms / 1e3 for name, ms in times.items()}


def in_microseconds(times: Times) -> Times:
    return {name: ms * 1e3 for name, ms in times.items()}


def one_in_seconds(times: Times) -> Times:
    name = max(times, key=times.__getitem__)
    return {**times, name: times[name] / 1e3}


def one_in_microseconds(times: Times) -> Times:
    name = min(times, key=times.__getitem__)
    return {**times, name: times[name] * 1e3}


def some_missing(times: Times) -> Times:
    return dict(list(times.items())[:-5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_seconds, r"are the times in seconds\?"),
        (in_microseconds, r"are the times in microseconds\?"),
        (one_in_seconds, "is it in another unit"),
        (one_in_microseconds, r"is it in another unit|are the times in microseconds"),
        (some_missing, r"5 of \d+ files have no time: .* and 2 more; time them too"),
    ],
)
def test_implausible_times_are_refused(
    change: Callable[[Times], Times], message: str, kit: FakeKit, folder: Path
) -> None:
    write_csv("latency_ms", 1.0)(folder, change(kit.times()))
    with pytest.raises(LatencyTableError, match=message):
        imported(kit, folder)
    assert not (folder.parent / "tables").exists()


def test_a_kit_is_needed_and_tools_are_not_mixed(kit: FakeKit, folder: Path) -> None:
    write_litert_log(folder, kit.times())
    with pytest.raises(LatencyTableError, match="give the kit that was timed with --kit"):
        import_results(ImportJob((folder,), folder.parent / "tables" / "phone"))
    write_csv("latency_ms", 1.0)(folder, kit.times())
    with pytest.raises(LatencyTableError, match="mixes results of csv and litert"):
        imported(kit, folder)
    with pytest.raises(LatencyTableError, match="must be the folder of a latency kit"):
        import_results(ImportJob((folder,), folder / "phone", kit=folder))
