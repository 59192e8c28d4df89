"""Estimated tables: features against timm, the fit against an independent solver, the goals."""

from __future__ import annotations

import csv
from itertools import groupby, pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from slimnas._resources import data_dir
from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace, shipped_spaces
from slimnas.errors import LatencyTableError
from slimnas.latency import LatencyTable, estimate, find_device, missing_components
from slimnas.latency.device_model import (
    COEFFICIENT_NAMES,
    FEATURE_NAMES,
    SCALES,
    Features,
    component_features,
    envelope,
    network_features,
    predict_ms,
)
from slimnas.latency.fit import (
    FAMILY,
    PEAK_MACS_PER_MS,
    POINTS_FILE,
    fit_points,
    fit_table,
    load_points,
)
from slimnas.latency.keys import INTERPOLATED_FIELDS

TABLES = data_dir("lookup_tables")
DEVICES = ("iphone12", "iphone12-ios16")
PUBLISHED_MS = {"iphone12": (1.6, 3.0, 7.0), "iphone12-ios16": (1.4, 2.7, 6.6)}
ROWS = 1 + 12 + 90 + 72 + (72 + 288 + 1152) + 5 * 48  # overhead, stems, blocks, ..., heads


def published_network(name: str) -> Architecture:
    """EfficientFormer L1, L3, L7 (table 1 of the paper's appendix)."""
    widths, depths, attention = {
        "efficientformer_l1": ((48, 96, 224, 448), (3, 2, 6, 4), 1),
        "efficientformer_l3": ((64, 128, 320, 512), (4, 4, 12, 6), 4),
        "efficientformer_l7": ((96, 192, 384, 768), (6, 6, 18, 8), 8),
    }[name]
    stages = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        last = attention if i == 3 else 0
        blocks = [{"type": "mb4d"}] * (depth - last) + [{"type": "mb3d"}] * last
        down = {"downsample": {"type": "conv3x3"}} if i else {}
        stages.append({"width": width, "blocks": blocks, **down})
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": name,
            "stem": {"type": "conv_stem", "width": widths[0]},
            "stages": stages,
            "head": {"type": "linear", "classes": 1000, "distilled": True},
        }
    )


@pytest.mark.parametrize("device", DEVICES)
def test_refitting_gives_the_same_files(device: str, tmp_path: Path) -> None:
    folder = TABLES / device
    fit_table(folder).save(tmp_path)
    for name in ("table.csv", "device.yaml"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("device", DEVICES)
def test_points_are_never_from_memory(device: str) -> None:
    points = load_points(TABLES / device / POINTS_FILE)
    assert {point.tag for point in points} <= {"F", "R", "T"}
    assert all(point.source and (point.used or point.why_not) for point in points)
    used = [point for point in points if point.used]
    assert (len(points), len(used)) == {"iphone12": (18, 12), "iphone12-ios16": (44, 27)}[device]
    assert set(FAMILY) <= {point.name for point in used}


@pytest.mark.parametrize("device", DEVICES)
def test_published_efficientformers_within_ten_percent(device: str) -> None:
    table = find_device(str(TABLES / device))
    for name, published_ms in zip(FAMILY, PUBLISHED_MS[device], strict=True):
        result = estimate(published_network(name), table)
        assert result.latency_ms == pytest.approx(published_ms, rel=0.10), name
        assert result.interval_ms[0] < published_ms < result.interval_ms[1], name
        assert result.interpolated == result.extrapolated == 0


@pytest.mark.parametrize("device", DEVICES)
def test_latency_strictly_grows_in_every_width(device: str) -> None:
    table = LatencyTable.load(TABLES / device)
    assert len(table.rows) == ROWS
    compared = 0
    for axis in ("width_in", "width_out"):

        def fixed(row_key: object, axis: str = axis) -> tuple[object, ...]:
            key = row_key.key  # type: ignore[attr-defined]
            other = {"width_in": key.width_out, "width_out": key.width_in}[axis]
            fields = tuple(item for item in key.fields if item[0] not in INTERPOLATED_FIELDS)
            moves_together = key.component == "block"
            return (key.component, key.type, key.resolution, fields, 0 if moves_together else other)

        ordered = sorted(
            table.rows, key=lambda row: (*map(str, fixed(row)), getattr(row.key, axis))
        )
        for _, members in groupby(ordered, key=fixed):
            line = list(members)
            for smaller, larger in pairwise(line):
                assert getattr(smaller.key, axis) < getattr(larger.key, axis)
                assert smaller.latency_ms < larger.latency_ms, (smaller.key, larger.key)
                compared += 1
    blocks = (90 - 4) + (72 - 2)
    over_inputs = 5 * 12 + 11 * 24 + 23 * 48 + 47 * 5 + blocks
    over_outputs = 6 * 11 + 12 * 23 + 24 * 47 + 48 * 4 + blocks + 2 * 5
    assert compared == over_inputs + over_outputs


@pytest.mark.parametrize("device", DEVICES)
def test_every_shipped_space_is_priced(device: str) -> None:
    table = LatencyTable.load(TABLES / device)
    spaces = [SearchSpace.load(name) for name in shipped_spaces()]
    assert len(spaces) >= 3
    for space in spaces:
        assert missing_components(space, table) == (), space.name
        assert missing_components(space.with_classes(10), table) == (), space.name


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_overhead_add_up_to_the_model(device: str) -> None:
    """The sum of a network's rows is the model's answer for the whole network."""
    table = find_device(str(TABLES / device))
    coefficients = [table.device.model[name] for name in COEFFICIENT_NAMES]
    for name in FAMILY:
        network = published_network(name)
        whole = predict_ms(network_features(network), coefficients)
        assert estimate(network, table).latency_ms == pytest.approx(whole, abs=1e-6 * 50)


@pytest.mark.parametrize("device", DEVICES)
def test_stated_errors_are_those_of_an_independent_leave_one_out(device: str) -> None:
    with (TABLES / device / POINTS_FILE).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["used"] == "yes"]
    counts = np.array([[float(row[name]) for name in FEATURE_NAMES] for row in rows]) / SCALES
    latencies = np.array([float(row["latency_ms"]) for row in rows])
    lower = np.zeros(len(SCALES))
    lower[2] = 1e9 / PEAK_MACS_PER_MS
    errors = {}
    for i, row in enumerate(rows):
        kept = np.arange(len(rows)) != i
        relative = counts[kept] / latencies[kept, None]
        solved = lsq_linear(relative, np.ones(kept.sum()), bounds=(lower, np.inf), tol=1e-14)
        if row["networks"] == "1":
            errors[row["name"]] = 100 * (counts[i] @ solved.x / latencies[i] - 1)
    stated = LatencyTable.load(TABLES / device).device
    for figure, names in zip(stated.errors, (list(errors), FAMILY), strict=True):
        chosen = np.array([errors[name] for name in names])
        assert figure.networks == len(chosen)
        assert figure.mape_percent == pytest.approx(np.abs(chosen).mean(), abs=0.06)
        assert figure.bias_percent == pytest.approx(chosen.mean(), abs=0.06)
        assert figure.max_percent == pytest.approx(np.abs(chosen).max(), abs=0.06)
    assert stated.interval is not None
    sizes = np.sort([100 * abs(1 / (1 + error / 100) - 1) for error in errors.values()])
    held = np.mean(sizes <= stated.interval.high_percent + 0.06)
    assert held >= stated.interval.level


def test_a_known_device_is_recovered_from_its_latencies() -> None:
    """Latencies made from coefficients give the coefficients back."""
    true = (0.5, 0.05, 0.25, 0.015, 0.007, 3.0, 4.0)
    points = [
        type(point)(**{**vars(point), "latency_ms": predict_ms(point.features, true)})
        for point in load_points(TABLES / "iphone12" / POINTS_FILE)
        if point.used and point.features
    ]
    assert fit_points(points).coefficients == pytest.approx(true, rel=1e-4)


def test_features_of_the_points_follow_from_the_closed_forms() -> None:
    """points.csv was traced from timm; slimnas' closed forms give the same integers."""
    checked = 0
    for device in DEVICES:
        points = {point.name: point for point in load_points(TABLES / device / POINTS_FILE)}
        for name in FAMILY:
            assert points[name].features == network_features(published_network(name)), name
            checked += 1
    assert checked == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientformer_l1", "mobilenetv2_x1.0", "deit_tiny"])
def test_points_can_be_traced_again(name: str) -> None:
    tracer = _tracer()
    points = {point.name: point for point in load_points(TABLES / "iphone12" / POINTS_FILE)}
    point = points[name]
    assert tracer.model_features(point.model, point.resolution) == point.features


def test_attention_step_matches_its_published_growth() -> None:
    """Two blocks of width 160 are what +0.85 M parameters and +0.27 GMACs come from."""
    pytest.importorskip("timm")
    from timm.models.efficientformer_v2 import Attention2d

    block = Attention2d(160, resolution=14)
    assert 2 * sum(p.numel() for p in block.parameters()) == pytest.approx(0.85e6, rel=0.02)
    points = {p.name: p for p in load_points(TABLES / "iphone12-ios16" / POINTS_FILE)}
    step = points["step to attention at 14x14"].features
    assert step is not None
    products = 2 * 8 * (32 + 128) * 196**2 + 2 * 2 * 64 * 196**2  # and two talking-head layers
    macs = 196 * step.streamed_weights + products
    assert macs == pytest.approx(0.27e9, rel=0.05)
    assert step.large_attention_elements == 2 * 8 * 196**2


def test_every_component_moves_something() -> None:
    listed = list(envelope())
    assert len(listed) == ROWS - 1
    for component in listed:
        features = component_features(component)
        assert features.networks == 0
        assert features.traffic_elements > 0
        assert features.streamed_weights > 0 or features.dense_macs > 0
    assert Features(networks=1) + Features(dynamic_norms=2) == Features(1, 0, 0, 0, 2, 0, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",R,", ",M,", r"points.csv:2: tag: must be one of F, R, T, got 'M'"),
        (",1.6,", ",-1.6,", r"points.csv:2: latency_ms: must be finite and positive"),
        (",yes,", ",no,", r"points.csv:2: used: must be 'yes', or 'no' with a reason"),
        (",yes,", ",perhaps,", r"points.csv:2: used: must be"),
        ("11522560", "", r"points.csv:2: a used point needs every feature"),
        ("name,model", "nam,model", r"points.csv:1: columns must be name,model"),
    ],
)
def test_damaged_points_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (TABLES / "iphone12" / POINTS_FILE).read_text()
    assert old in text
    (tmp_path / POINTS_FILE).write_text(text.replace(old, new, 1))
    with pytest.raises(LatencyTableError, match=message):
        fit_table(tmp_path)


def test_too_few_points_are_refused() -> None:
    points = load_points(TABLES / "iphone12" / POINTS_FILE)[:7]
    with pytest.raises(LatencyTableError, match="7 coefficients and needs more points"):
        fit_points(points)


def _tracer() -> ModuleType:
    import importlib.util

    pytest.importorskip("timm")
    path = Path(__file__).parent.parent / "tools" / "trace_features.py"
    spec = importlib.util.spec_from_file_location("trace_features", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
