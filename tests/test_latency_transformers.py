"""Prices of ViT, DeiT and Swin: two sub-layers per block, interpolated over every pruned width."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import Component, walk
from slimnas.errors import MissingLatencyError
from slimnas.latency import (
    OVERHEAD,
    LatencyTable,
    PriceKey,
    PriceRow,
    component_latency_ms,
    estimate,
    find_device,
    latency_ms,
    missing_components,
    price_key,
    price_keys,
    price_parts,
)
from slimnas.zoo.registry import get
from tests.test_latency_table import DEVICE

VIT = {"type": "vit", "heads": 3, "qk_dim": 8, "v_dim": 16, "ffn_dim": 96}
SWIN = {"type": "swin", "heads": 2, "qk_dim": 8, "v_dim": 8, "ffn_dim": 64, "window": 4}
NO_ATTENTION = {"heads": 0, "qk_dim": 0, "v_dim": 0}


def vit(*blocks: dict[str, Any], distilled: bool = False) -> Architecture:
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "small_vit",
            "input": {"resolution": 32},
            "stem": {"type": "vit_stem", "width": 24, "patch": 8, "distilled": distilled},
            "stages": [{"width": 24, "blocks": list(blocks or (VIT, VIT))}],
            "head": {"type": "token", "classes": 10, "distilled": distilled},
        }
    )


def swin(*blocks: dict[str, Any], side: int = 32) -> Architecture:
    return Architecture.from_dict(
        {
            "schema": "slimnas/architecture/1",
            "name": "small_swin",
            "input": {"resolution": side},
            "stem": {"type": "swin_stem", "width": 16},
            "stages": [{"width": 16, "blocks": list(blocks)}],
            "head": {"type": "linear", "classes": 10},
        }
    )


def known_ms(key: PriceKey) -> float:
    """Linear in each width, with products, and another for each group."""
    w = {name: value for name, value in key.fields if isinstance(value, int)}
    attention = w.get("heads", 0) * (0.1 + 0.02 * w.get("qk_dim", 0) + 0.03 * w.get("v_dim", 0))
    own = 0.01 * len(key.type) + 0.1 * w.get("shift", 0) + 0.001 * len(key.resolution)
    return own + attention + 0.004 * w.get("ffn_dim", 0)


def table_of(*keys: PriceKey, **device: object) -> LatencyTable:
    rows = [PriceRow(key, known_ms(key), 0.001, 16, "measured") for key in dict.fromkeys(keys)]
    rows.append(PriceRow(OVERHEAD, 0.25, 0.0, 16, "measured"))
    return LatencyTable(DEVICE.model_copy(update=device), tuple(rows))


def grid_table(network: Architecture) -> LatencyTable:
    """Rows of stem and head, and of every block's sub-layers at a grid of widths."""
    keys = [price_key(part) for part in walk(network) if part.kind != "block"]
    for part in (part for part in walk(network) if part.kind == "block"):
        for h, q, v in product((1, 3), (1, 4, 8), (1, 16)):
            keys.append(with_widths(part, heads=h, qk_dim=q, v_dim=v, ffn_dim=0))
        keys += [with_widths(part, **NO_ATTENTION, ffn_dim=hidden) for hidden in (1, 24, 96)]
    return table_of(*keys)


def changed(part: Component, **widths: int) -> Component:
    return replace(part, spec=part.spec.model_copy(update=widths))


def with_widths(part: Component, **widths: int) -> PriceKey:
    return price_key(changed(part, **widths))


def block_of(network: Architecture) -> Component:
    return next(part for part in walk(network) if part.kind == "block")


@pytest.mark.parametrize(
    ("network", "keys"),
    [
        (
            vit(VIT),
            [
                "stem vit_stem distilled=0;patch=8 3->24 @ 32x32",
                "block vit heads=3;qk_dim=8;v_dim=16 24->24 @ 4x4+1",
                "block vit ffn_dim=96 24->24 @ 4x4+1",
                "head token distilled=0 24->10 @ 4x4+1",
            ],
        ),
        (
            vit(VIT | NO_ATTENTION, VIT | {"ffn_dim": 0}, distilled=True),
            [
                "stem vit_stem distilled=1;patch=8 3->24 @ 32x32",
                "block vit ffn_dim=96 24->24 @ 4x4+2",
                "block vit heads=3;qk_dim=8;v_dim=16 24->24 @ 4x4+2",
                "head token distilled=1 24->10 @ 4x4+2",
            ],
        ),
        (
            swin(SWIN, SWIN | {"shift": 2}),
            [
                "stem swin_stem patch=4 3->16 @ 32x32",
                "block swin heads=2;qk_dim=8;shift=0;v_dim=8;window=4 16->16 @ 8x8",
                "block swin ffn_dim=64 16->16 @ 8x8",
                "block swin heads=2;qk_dim=8;shift=2;v_dim=8;window=4 16->16 @ 8x8",
                "block swin ffn_dim=64 16->16 @ 8x8",
                "head linear 16->10 @ 8x8",
            ],
        ),
        (
            swin(SWIN | {"shift": 2, "ffn_dim": 0}, side=16),  # one window: nothing shifts
            [
                "stem swin_stem patch=4 3->16 @ 16x16",
                "block swin heads=2;qk_dim=8;shift=0;v_dim=8;window=4 16->16 @ 4x4",
                "head linear 16->10 @ 4x4",
            ],
        ),
    ],
)
def test_keys_name_what_a_price_depends_on(
    tmp_path: Path, network: Architecture, keys: list[str]
) -> None:
    found = [key for part in walk(network) for key in price_keys(part)]
    assert [str(key) for key in found] == keys
    table = table_of(*found)
    table.save(tmp_path / "bench")
    assert LatencyTable.load(tmp_path / "bench").rows == table.rows


def test_a_block_of_two_sublayers_has_no_one_key() -> None:
    block = block_of(vit())
    attention, ffn = price_parts(block)
    assert (attention.name, ffn.name) == ("stages.0.blocks.0.attn", "stages.0.blocks.0.mlp")
    assert price_keys(block) == (price_key(attention), price_key(ffn))
    with pytest.raises(ValueError, match="ask for its price_keys"):
        price_key(block)


def test_estimate_is_the_sum_of_the_sublayers() -> None:
    network = vit(VIT, VIT | {"ffn_dim": 24}, VIT | NO_ATTENTION)
    result = estimate(network, grid_table(network))
    assert [row.component for row in result.rows] == [
        "stem",
        *("stages.0.blocks.0.attn", "stages.0.blocks.0.mlp"),
        *("stages.0.blocks.1.attn", "stages.0.blocks.1.mlp"),
        "stages.0.blocks.2.mlp",
        *("head", "overhead"),
    ]
    assert result.exact == 8
    total = 0.25 + sum(known_ms(key) for part in walk(network) for key in price_keys(part))
    assert result.latency_ms == pytest.approx(total)
    assert latency_ms(network, grid_table(network)) == pytest.approx(total)


@pytest.mark.parametrize("network", [vit(), swin(SWIN, SWIN | {"shift": 2})])
def test_every_width_between_the_rows_is_exact_for_products(network: Architecture) -> None:
    table = grid_table(network)
    asked = 0
    for part in (part for part in walk(network) if part.kind == "block"):
        for h, q, v in product((1, 2, 3), range(1, 9), range(1, 17)):
            for hidden in (0, 1, 17, 96):
                one = changed(part, heads=h, qk_dim=q, v_dim=v, ffn_dim=hidden)
                truth = sum(known_ms(key) for key in price_keys(one))
                assert component_latency_ms(one, table) == pytest.approx(truth, rel=1e-12)
                asked += 1
    assert asked == 2 * 3 * 8 * 16 * 4
    assert missing_components(walk(network), table) == ()


@pytest.mark.parametrize(
    "wider", [{"heads": 4}, {"qk_dim": 9}, {"v_dim": 17}, {"ffn_dim": 97}, {"qk_dim": 64}]
)
def test_beyond_the_rows_is_refused(wider: dict[str, int]) -> None:
    network = vit(VIT, VIT | wider)
    table = grid_table(vit())
    (name,) = wider
    value = wider[name]
    with pytest.raises(
        MissingLatencyError, match=rf"{name}={value}\b.*nearest row: block vit"
    ) as e:
        estimate(network, table)
    assert "measure a table for it with 'slimnas latency build --model MODEL" in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(MissingLatencyError, match=r"^stages\.0\.blocks\.1: the latency table"):
        latency_ms(network, table)
    assert estimate(network, table, allow_extrapolation=True).extrapolated == 1


@pytest.mark.parametrize("device", ["iphone12", "iphone12-ios16"])
def test_tables_of_spaces_name_the_command_for_models(device: str) -> None:
    for network in (vit(), swin(SWIN)):
        with pytest.raises(MissingLatencyError) as caught:
            estimate(network, find_device(device), allow_extrapolation=True)
        line = str(caught.value)
        assert "(no row of that type)" in line
        assert line.endswith(
            "measure a table for it with 'slimnas latency build --model MODEL --device NAME', "
            "MODEL being the network before it was pruned"
        )
        assert "\n" not in line


def test_pruned_efficientformer_needs_a_table_of_its_model() -> None:
    l1 = get("efficientformer_l1").architecture.to_dict()
    l1["stages"][0]["blocks"] = [{"type": "mb4d", "ffn_dim": 100}]
    with pytest.raises(MissingLatencyError, match=r"build --model MODEL --device NAME"):
        latency_ms(Architecture.from_dict(l1), find_device("iphone12"))


def test_sublayers_are_not_mixed_up() -> None:
    """An FFN of n hidden units is no attention of n heads, and a shift is another group."""
    network = swin(SWIN, SWIN | {"shift": 2})
    (attention, _), (shifted, ffn) = (
        price_keys(part) for part in walk(network) if part.kind == "block"
    )
    assert len({attention.group, shifted.group}) == 2
    assert len(ffn.point) != len(attention.point)
    table = table_of(attention, ffn)
    assert table.prices.find(shifted) is None


def attention(**widths: int) -> PriceKey:
    fields = {"heads": 8, "qk_dim": 32, "v_dim": 128, "ffn_dim": 192} | widths
    return PriceKey("block", "mb3d", tuple(sorted(fields.items())), "7x7", 48, 48)


def test_pruned_mb3d_is_interpolated_where_rows_allow_it() -> None:
    grid = product((16, 32), (64, 128), (96, 192))
    table = table_of(*(attention(qk_dim=q, v_dim=v, ffn_dim=f) for q, v, f in grid))
    rng = random.Random(0)
    for _ in range(20):
        key = attention(
            qk_dim=rng.randint(16, 32), v_dim=rng.randint(64, 128), ffn_dim=rng.randint(96, 192)
        )
        price = table.prices.find(key)
        assert price is not None
        assert price.kind in ("exact", "interpolated")
        assert price.latency_ms == pytest.approx(known_ms(key))
    lone = table_of(*(attention(ffn_dim=hidden) for hidden in (96, 192)))
    for key in (attention(qk_dim=16), attention(heads=4), attention(v_dim=64)):
        price = lone.prices.find(key)
        assert price is not None
        assert price.kind == "extrapolated"
