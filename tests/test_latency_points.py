"""`points.csv`: what a line may say, and what no line may."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimnas.errors import LatencyTableError, ZooError
from slimnas.latency.features import FEATURE_NAMES, Features
from slimnas.latency.points import POINT_COLUMNS, load_points, points_to_csv

L1 = Features(1, conv_macs=200_000_000, pointwise_macs=1_000_000_000, traffic_elements=10_000_000)
L3 = L1 + L1 + L1 + Features(networks=-2)
KNOWN = {"l1": L1, "l3": L3, "a, b": L1}


def resolve(name: str) -> Features:
    if name not in KNOWN:
        raise ZooError(f"no model, file or folder {name!r}")
    return KNOWN[name]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "points.csv"


def test_two_columns_are_enough(file: Path) -> None:
    one, three = load_points(write(file, "network,latency_ms", "l1,1.6", "", "l3,3.0"), resolve)
    assert (one.name, one.latency_ms, one.features) == ("l1", 1.6, L1)
    assert (three.weight, three.tag, three.used, three.source) == (1.0, "U", True, "")
    assert one.is_network
    assert one.macs_per_ms == pytest.approx(1.2e9 / 1.6)


def test_optional_columns_in_any_order(file: Path) -> None:
    lines = ["latency_ms,source,weight,network", '1.6,"paper, table 1",4,"a, b"']
    (point,) = load_points(write(file, *lines), resolve)
    assert (point.name, point.source, point.weight) == ("a, b", "paper, table 1", 4.0)


@pytest.mark.parametrize(
    ("column", "value"), [("latency_ms", "1.6"), ("latency_us", "1600"), ("latency_s", "0.0016")]
)
def test_the_column_names_the_unit(file: Path, column: str, value: str) -> None:
    (point,) = load_points(write(file, f"network,{column}", f"l1,{value}"), resolve)
    assert point.latency_ms == pytest.approx(1.6)


def test_a_file_from_a_spreadsheet_is_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfnetwork, latency_ms\r\nl1, 1.6\r\n")
    assert load_points(file, resolve)[0].latency_ms == 1.6


def test_written_points_are_read_again_without_a_zoo(file: Path) -> None:
    points = load_points(write(file, "network,latency_ms,source", "l1,1.6,mine", "l3,3,"), resolve)
    file.write_text(points_to_csv(points))
    assert load_points(file) == points
    assert file.read_text().splitlines()[0] == ",".join(POINT_COLUMNS)


FULL = "name,latency_ms," + ",".join(FEATURE_NAMES)
COUNTS = ",".join(["1", *["7"] * (len(FEATURE_NAMES) - 1)])


def test_features_given_win_over_the_zoo(file: Path) -> None:
    (point,) = load_points(write(file, FULL, f"l1,0.00001,{COUNTS}"), resolve)
    assert point.features is not None
    assert point.features.traffic_elements == 7


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["network,latency_ms", "l1,nan"], r"points.csv:2: latency_ms: must be finite and pos"),
        (["network,latency_ms", "l1,-1"], r":2: latency_ms: must be finite and positive, got '-1'"),
        (["network,latency_ms", "l1,0"], r":2: latency_ms: must be finite and positive, got '0'"),
        (["network,latency_ms", "l1,inf"], r":2: latency_ms: must be finite"),
        (["network,latency_ms", "l1,fast"], r":2: latency_ms: must be a number, got 'fast'"),
        (["network,latency_ms", "l1,1", "l3"], r":3: must have 2 values, has 1"),
        (["network,latency_ms", "l1,1", "l3,3", "l1,1"], r":4: 'l1' is given twice, .* line 2"),
        (["network,latency_ms", "l2,1"], r":2: no model, file or folder 'l2'"),
        (["network,latency_ms", ",1"], r":2: network: must not be empty"),
        (["network,latency_ms,weight", "l1,1,0"], r":2: weight: must be finite and positive"),
        (["network,latency", "l1,1"], r":1: unknown column 'latency' \(did you mean 'latency_"),
        (["network,latency_ms,latency_ms", "l1,1,1"], r":1: column 'latency_ms' is given twice"),
        (["network,latency_ms,latency_s", "l1,1,1"], r":1: must have a column network and one of"),
        (["network", "l1"], r":1: must have a column network and one of latency_ms, latency_us"),
        ([""], r":1: must have a column network .* has no line"),
        (["network,latency_ms,tag", "l1,1,M"], r":2: tag: must be one of D, F, R, T, U, got 'M'"),
        (["network,latency_ms,used", "l1,1,no"], r":2: used: must be 'yes', or 'no' with a reason"),
        ([FULL, f"l1,1,{COUNTS[:-2]},"], r":2: operators: a point needs every feature or none"),
        ([FULL, f"l1,1,1,-7{COUNTS[3:]}"], r":2: streamed_weights: must not be negative, got -7"),
        (["network,latency_ms", '"l1,1'], r":\d: unexpected end of data"),
    ],
)
def test_a_bad_line_is_named(file: Path, lines: list[str], message: str) -> None:
    with pytest.raises(LatencyTableError, match=message) as caught:
        load_points(write(file, *lines), resolve)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["l1,0.0000016"], r":2: latency_ms: l1 would do 7.5e\+08 GMAC a second, which no device"),
        (["l1,1600000"], r":2: latency_ms: l1 would do 0.00075 GMAC a second, which no device"),
        (["l1,1.6", "l3,3", "a, b,1600"], r"must have 2 values"),
        (["l1,1.6", "l3,3", '"a, b",1600'], r":4: .* would do 0.75 GMAC a second and half of the"),
    ],
)
def test_other_units_than_the_column_says(file: Path, lines: list[str], message: str) -> None:
    with pytest.raises(LatencyTableError, match=message):
        load_points(write(file, "network,latency_ms", *lines), resolve)


def test_without_a_zoo_used_points_need_features(file: Path) -> None:
    write(file, "network,latency_ms,used,why_not", "l1,1.6,no,an old phone", "l3,3,yes,")
    with pytest.raises(LatencyTableError, match=r":3: a used point needs every feature"):
        load_points(file)


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"absent\.csv"):
        load_points(tmp_path / "absent.csv", resolve)
