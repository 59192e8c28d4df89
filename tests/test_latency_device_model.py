"""The shipped estimated tables: fitted from their points, within their stated errors."""

from __future__ import annotations

import csv
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import lsq_linear

from slimnas._resources import data_dir
from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace, shipped_spaces
from slimnas.latency.device_model import MODELS, envelope, predict_ms
from slimnas.latency.devices import find_device
from slimnas.latency.estimate import estimate, missing_components
from slimnas.latency.features import Features, component_features, network_features
from slimnas.latency.fit import FAMILY, LEFT_OUT_FILE, refit, save_fitted
from slimnas.latency.keys import INTERPOLATED_FIELDS
from slimnas.latency.points import POINTS_FILE, load_points
from slimnas.latency.table import LatencyTable

TABLES = data_dir("lookup_tables")
IPHONES = ("iphone12", "iphone12-ios16")
HUB = ("galaxy-s24", "galaxy-s25")
CORES = ("pixel4-cpu", "galaxy-s10-cpu", "galaxy-a03s-cpu")
DEVICES = (*IPHONES, *HUB, *CORES)
POINTS = {"iphone12": (18, 12), "iphone12-ios16": (44, 27)}
POINTS |= dict.fromkeys(HUB, (26, 21)) | dict.fromkeys(CORES, (130, 106))
PUBLISHED_MS = {"iphone12": (1.6, 3.0, 7.0), "iphone12-ios16": (1.4, 2.7, 6.6)}
MEDIAN_PERCENT = {"iphone12": 10, "iphone12-ios16": 6, "galaxy-s24": 12, "galaxy-s25": 16}
MEDIAN_PERCENT |= dict.fromkeys(CORES, 4)
ROWS = 1 + 12 + 90 + 72 + (72 + 288 + 1152) + 5 * 48  # overhead, stems, blocks, ..., heads

Array = npt.NDArray[np.float64]


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
    table, fit = refit(folder)
    save_fitted(table, fit, tmp_path)
    for name in ("table.csv", "device.yaml", POINTS_FILE, LEFT_OUT_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_every_shipped_table_is_looked_at() -> None:
    assert sorted(path.parent.name for path in TABLES.glob("*/device.yaml")) == sorted(DEVICES)
    sizes = [path.stat().st_size for path in TABLES.glob("*/*") if path.is_file()]
    assert sum(sizes) < 1_500_000


@pytest.mark.parametrize("device", DEVICES)
def test_points_are_never_from_memory(device: str) -> None:
    points = load_points(TABLES / device / POINTS_FILE)
    assert {point.tag for point in points} <= {"D", "F", "R", "T"}
    assert all(point.source and (point.used or point.why_not) for point in points)
    used = [point for point in points if point.used]
    assert (len(points), len(used)) == POINTS[device]
    assert {point.weight for point in used if point.name in FAMILY} == {4.0}
    assert {point.weight for point in points if point.name not in FAMILY} == {1.0}
    assert len([point for point in used if point.name in FAMILY]) == (1 if device in HUB else 3)


@pytest.mark.parametrize("device", IPHONES)
def test_published_efficientformers_within_five_percent(device: str) -> None:
    """Within 5 % by the table, within 15 % by a fit that has not seen the network."""
    table, left_out = find_device(str(TABLES / device)), _left_out(device)
    for name, published_ms in zip(FAMILY, PUBLISHED_MS[device], strict=True):
        result = estimate(published_network(name), table)
        assert result.latency_ms == pytest.approx(published_ms, rel=0.05), name
        assert result.interval_ms[0] < published_ms < result.interval_ms[1], name
        assert result.interpolated == result.extrapolated == 0
        assert abs(left_out[name]) <= 15, name


@pytest.mark.parametrize("device", DEVICES)
def test_median_leave_one_out_error(device: str) -> None:
    used = {point.name for point in load_points(TABLES / device / POINTS_FILE) if point.used}
    errors = {name: abs(error) for name, error in _left_out(device).items()}
    median = float(np.median([error for name, error in errors.items() if name in used]))
    assert median <= MEDIAN_PERCENT[device]
    stated = LatencyTable.load(TABLES / device).device.errors[0].median_percent
    assert stated == pytest.approx(median, abs=0.1)
    if device in IPHONES:
        assert np.median(list(errors.values())) <= 15  # with the networks that it leaves out


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
    shipped = map(SearchSpace.load, shipped_spaces())
    spaces = [one for one in shipped if one.counts_attention and one.input.resolution == 224]
    assert len(spaces) == 3  # of EfficientFormer's blocks at 224 px, which is what the tables price
    for space in spaces:
        assert missing_components(space, table) == (), space.name
        assert missing_components(space.with_classes(10), table) == (), space.name


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_overhead_add_up_to_the_model(device: str) -> None:
    """The sum of a network's rows is the model's answer for the whole network."""
    table = find_device(str(TABLES / device))
    assert table.device.fit is not None
    terms = MODELS[table.device.fit.model]
    coefficients = [table.device.model[term.coefficient] for term in terms]
    for name in FAMILY:
        network = published_network(name)
        whole = predict_ms(network_features(network), coefficients, terms)
        assert estimate(network, table).latency_ms == pytest.approx(whole, abs=1e-6 * 50)


@pytest.mark.parametrize("device", DEVICES)
def test_stated_errors_are_those_of_an_independent_leave_one_out(device: str) -> None:
    """Another solver, the objective written down again from the documents' words."""
    matrix, latencies, weights, names, whole = _problem(device)
    errors = {}
    for i, name in enumerate(names):
        kept = np.arange(len(names)) != i
        solved = _solve_again(device, matrix[kept], latencies[kept], weights[kept])
        if whole[i]:
            errors[name] = 100 * (matrix[i] @ solved / latencies[i] - 1)
    stated = LatencyTable.load(TABLES / device).device
    family = [name for name in FAMILY if name in errors]
    for figure, chosen_names in zip(stated.errors, (list(errors), family), strict=True):
        chosen = np.array([errors[name] for name in chosen_names])
        assert figure.networks == len(chosen)
        assert figure.mape_percent == pytest.approx(np.abs(chosen).mean(), abs=0.06)
        assert figure.bias_percent == pytest.approx(chosen.mean(), abs=0.06)
        assert figure.max_percent == pytest.approx(np.abs(chosen).max(), abs=0.06)
        assert figure.median_percent == pytest.approx(np.median(np.abs(chosen)), abs=0.06)
    assert stated.interval is not None
    sizes = np.sort([100 * abs(1 / (1 + error / 100) - 1) for error in errors.values()])
    held = np.mean(sizes <= stated.interval.high_percent + 0.06)
    assert held >= stated.interval.level


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_are_the_optimum(device: str) -> None:
    """Karush-Kuhn-Tucker: the slope is zero at a free coefficient, upwards at a bound one."""
    matrix, latencies, weights, _, _ = _problem(device)
    info = LatencyTable.load(TABLES / device).device
    found = np.array(list(info.model.values()))
    relative = matrix / latencies[:, None]
    slope = relative.T @ (weights * (relative @ found - 1))
    strength, prior, floor = _held(device, relative, weights)
    held = prior > 0
    slope[held] += strength * (found - prior)[held] / prior[held] ** 2
    size = np.abs(relative).T @ weights  # what the slope's terms add up to
    free = found > floor
    assert free.sum() >= 4
    assert np.all(np.abs(slope[free]) < 1e-3 * size[free])
    assert np.all(slope[~free] > -1e-3 * size[~free])


def test_the_second_iphone_table_is_held_to_the_first() -> None:
    held, prior = (LatencyTable.load(TABLES / name).device for name in IPHONES)
    assert held.fit is not None
    assert held.fit.prior == prior.name
    assert held.fit.held_to == prior.model


def test_every_component_moves_something() -> None:
    listed = list(envelope())
    assert len(listed) == ROWS - 1
    for component in listed:
        features = component_features(component)
        assert features.networks == 0
        assert features.traffic_elements > 0
        assert features.streamed_weights > 0 or features.dense_macs > 0
    assert Features(networks=1) + Features(dynamic_norms=2) == Features(1, 0, 0, 0, 2, 0, 0)


def _left_out(device: str) -> dict[str, float]:
    with (TABLES / device / LEFT_OUT_FILE).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = {"step to attention at 14x14"}
    return {r["name"]: float(r["left_out_error_percent"]) for r in rows if r["name"] not in steps}


def _problem(device: str) -> tuple[Array, Array, Array, list[str], list[bool]]:
    info = LatencyTable.load(TABLES / device).device
    assert info.fit is not None
    with (TABLES / device / POINTS_FILE).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["used"] == "yes"]
    terms = MODELS[info.fit.model]
    matrix = np.array([[float(row[t.feature]) / t.scale for t in terms] for row in rows])
    latencies = np.array([float(row["latency_ms"]) for row in rows])
    weights = np.array([float(row["weight"]) for row in rows])
    whole = [row["networks"] == "1" for row in rows]
    return matrix, latencies, weights, [row["name"] for row in rows], whole


def _held(device: str, relative: Array, weights: Array) -> tuple[float, Array, Array]:
    """Strength, scaled prior and floor."""
    info = LatencyTable.load(TABLES / device).device.fit
    assert info is not None
    terms = MODELS[info.model]
    prior = np.array([info.held_to.get(term.coefficient, 0.0) for term in terms])
    by_prior = relative @ prior
    if np.any(by_prior > 0):
        prior = prior * np.sum(weights * by_prior) / np.sum(weights * by_prior**2)
    floor = np.zeros(len(terms))
    if info.peak_gmacs_per_s:
        floor[[term.feature for term in terms].index("dense_macs")] = 1e3 / info.peak_gmacs_per_s
    return info.strength, prior, floor


def _solve_again(device: str, matrix: Array, latencies: Array, weights: Array) -> Array:
    relative = matrix / latencies[:, None]
    strength, prior, floor = _held(device, relative, weights)
    held = np.flatnonzero(prior > 0)
    ridge = np.zeros((len(held), len(prior)))
    ridge[np.arange(len(held)), held] = np.sqrt(strength) / prior[held]
    roots = np.sqrt(weights)
    system = np.vstack([relative * roots[:, None], ridge])
    wanted = np.concatenate([roots, np.full(len(held), np.sqrt(strength))])
    seen = np.any(system != 0, axis=0)  # a term without points costs nothing
    solved = lsq_linear(system[:, seen], wanted, bounds=(floor[seen], np.inf), tol=1e-14)
    answer: Array = np.zeros(len(prior))
    answer[seen] = solved.x
    return answer
