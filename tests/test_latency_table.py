"""Latency tables: what is written is read back, and damage is one clear line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up_device import made_up_device

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import walk
from slimnas.errors import LatencyTableError
from slimnas.latency import (
    OVERHEAD,
    LatencyTable,
    PriceKey,
    PriceRow,
    find_device,
    known_devices,
    price_key,
    provenance_line,
)
from slimnas.latency.keys import parse_fields

DEVICE = made_up_device()
BLOCK = PriceKey("block", "mb4d", (("ffn_dim", 64),), "7x7", 16, 16)


def small_table() -> LatencyTable:
    rows = (
        PriceRow(OVERHEAD, 0.25, 0.01, 9, "measured"),
        PriceRow(BLOCK, 0.123456, 0.002, 9, "measured"),
        PriceRow(replace(BLOCK, resolution="14x14"), 0.5, 0.0, 1, "interpolated"),
    )
    return LatencyTable(DEVICE, rows)


def test_saved_table_loads_equal(tmp_path: Path) -> None:
    table = small_table()
    table.save(tmp_path / "bench")
    loaded = LatencyTable.load(tmp_path / "bench")
    assert loaded.device == table.device
    assert loaded.rows == table.rows
    assert sorted(path.name for path in (tmp_path / "bench").iterdir()) == [
        "device.yaml",
        "table.csv",
    ]


def test_components_of_one_kind_share_a_key() -> None:
    architecture = Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "two",
            "stem": {"type": "conv_stem", "width": 16},
            "stages": [
                {"width": 16, "blocks": [{"type": "mb4d"}, {"type": "mb4d", "ffn_dim": 64}]},
                {"width": 32, "downsample": {"type": "conv3x3"}, "blocks": [{"type": "mb3d"}]},
            ],
            "head": {"type": "linear", "classes": 7, "distilled": True},
        }
    )
    keys = [price_key(component) for component in walk(architecture)]
    assert keys[1] == keys[2] == PriceKey("block", "mb4d", (("ffn_dim", 64),), "56x56", 16, 16)
    assert keys[0] == PriceKey("stem", "conv_stem", (("act", "relu"),), "224x224", 3, 16)
    assert keys[3] == PriceKey("downsample", "conv3x3", (), "56x56", 16, 32)
    attention = (("ffn_dim", 128), ("heads", 8), ("qk_dim", 32), ("v_dim", 128))
    assert keys[4] == PriceKey("block", "mb3d", attention, "28x28", 32, 32)
    plain = architecture.with_head(distilled=False)
    assert keys[5] == list(map(price_key, walk(plain)))[-1]
    assert keys[5] == PriceKey("head", "linear", (), "28x28", 32, 7)


def test_fields_are_read_in_any_order() -> None:
    assert parse_fields("heads=8;act=relu;ffn_dim=4") == parse_fields("ffn_dim=4;heads=8;act=relu")
    assert parse_fields("heads=8;act=relu") == (("act", "relu"), ("heads", 8))
    assert parse_fields("") == ()


GOOD = "block,mb4d,ffn_dim=64,7x7,16,16,0.123456,0.002000,9,measured"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD.replace("0.123456", "0"), r"table.csv:3: latency_ms: must be finite and at least"),
        (GOOD.replace("0.123456", "-1"), r"table.csv:3: latency_ms: must be finite and at least"),
        (GOOD.replace("0.123456", "nan"), r"table.csv:3: latency_ms: .* got nan"),
        (GOOD.replace("0.123456", "inf"), r"table.csv:3: latency_ms: .* got inf"),
        (GOOD.replace("0.123456", "fast"), r"table.csv:3: latency_ms: must be a number"),
        (GOOD.replace("0.002000", "-1"), r"table.csv:3: spread_ms: .* not negative"),
        (GOOD.replace(",9,", ",0,"), r"table.csv:3: n: must be at least 1"),
        (GOOD.replace("16,16", "16,x"), r"table.csv:3: width_out: must be a whole number"),
        (GOOD.replace("block", "blok"), r"table.csv:3: component: .*did you mean 'block'"),
        (GOOD.replace("ffn_dim=64", "ffn_dim"), r"table.csv:3: fields: must be name=value"),
        (GOOD[:-3], r"table.csv:3: kind: must be one of"),
        (GOOD[:30], r"table.csv:3: must have 10 values, has .* truncated"),
        (f"{GOOD}\n{GOOD}", r"table.csv:4: block mb4d .* priced twice, first on line 3"),
        ("", r"must have the 3 rows device.yaml states, has 2; the file is truncated"),
    ],
)
def test_damaged_row_is_named_with_file_and_line(tmp_path: Path, bad: str, message: str) -> None:
    small_table().save(tmp_path)
    path = tmp_path / "table.csv"
    lines = path.read_text().splitlines()
    assert lines[2] == GOOD
    kept = [*lines[:2], *([bad] if bad else []), *lines[3:]]
    path.write_text("\n".join(kept) + "\n")
    with pytest.raises(LatencyTableError, match=message) as caught:
        LatencyTable.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("slimnas/latency-table/1", "slimnas/latency-table/2", r"device.yaml: schema: .* version"),
        ("kind: measured", "kind: guessed", r"device.yaml: kind: "),
        ("kind: measured", "kind: estimated", r"estimated table must state errors and interval"),
        ("batch: 1", "batsh: 1", r"unknown key 'batsh' \(did you mean 'batch'"),
        ("rows: 3", "rows: many", r"device.yaml: rows: must be the number of rows"),
        ("schema: ", "schema: [", r"device.yaml: not valid YAML"),
    ],
)
def test_damaged_description_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    small_table().save(tmp_path)
    path = tmp_path / "device.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(LatencyTableError, match=message):
        LatencyTable.load(tmp_path)


def test_missing_column_is_named(tmp_path: Path) -> None:
    small_table().save(tmp_path)
    path = tmp_path / "table.csv"
    path.write_text(path.read_text().replace("spread_ms", "sprd"))
    with pytest.raises(LatencyTableError, match=r"table.csv:1: column 'spread_ms' is missing"):
        LatencyTable.load(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    small_table().save(tmp_path)
    (tmp_path / "table.csv").unlink()
    with pytest.raises(LatencyTableError, match=r"table.csv: no such file"):
        LatencyTable.load(tmp_path)


def test_table_without_rows_or_with_twins_cannot_exist() -> None:
    row = small_table().rows[1]
    with pytest.raises(LatencyTableError, match="at least one row"):
        LatencyTable(DEVICE, ())
    with pytest.raises(LatencyTableError, match="two rows for block mb4d"):
        LatencyTable(DEVICE, (row, row))


def test_own_tables_come_before_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"iphone12", "iphone12-ios16"} <= set(known_devices())
    small_table().save(tmp_path / "mine" / "iphone12")
    small_table().save(tmp_path / "lookup_tables" / "bench")
    assert find_device("bench").device.name == "bench"
    assert find_device("iphone12").device.kind == "estimated"
    monkeypatch.setenv("SLIMNAS_LOOKUP_TABLES", str(tmp_path / "mine"))
    assert find_device("iphone12").device.kind == "measured"
    assert "bench" not in known_devices()
    assert find_device(str(tmp_path / "lookup_tables" / "bench")).device.name == "bench"


def test_unknown_device_lists_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = r"'iphone13' \(did you mean 'iphone12.*known devices: .*, iphone12, iphone12-ios16"
    with pytest.raises(LatencyTableError, match=message):
        find_device("iphone13")
    with pytest.raises(LatencyTableError, match=r"no device.yaml there"):
        find_device(str(tmp_path))


def test_provenance_says_how_far_off_the_numbers_are() -> None:
    assert "no held-out error known" in provenance_line(small_table())
    line = provenance_line(find_device("iphone12"))
    assert line.startswith("iphone12 (estimated): iPhone 12")
    assert "leave-one-out, all networks: mean error" in line
    assert "leave-one-out, EfficientFormer L1, L3, L7: mean error" in line
