"""Regimes of stages: tables with known power laws give the exponents back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from made_up_device import made_up_device
from measure_fakes import small_space

from slimnas.cli.main import main
from slimnas.latency import (
    LatencyTable,
    PriceKey,
    PriceRow,
    find_device,
    price_keys,
)
from slimnas.latency.regime import StageRegime, regimes
from slimnas.latency.spaces import space_components

WIDTHS = (128, 160, 256, 400, 512)

DEVICE = made_up_device()


def table_of(prices: dict[PriceKey, float]) -> LatencyTable:
    rows = tuple(PriceRow(key, ms, 0.0, 1, "measured") for key, ms in prices.items())
    return LatencyTable(DEVICE, rows)


def mb4d(width: int, resolution: str = "7x7") -> PriceKey:
    return PriceKey("block", "mb4d", (("ffn_dim", 4 * width),), resolution, width, width)


def only(table: LatencyTable) -> StageRegime:
    (regime,) = regimes(table)
    return regime


@pytest.mark.parametrize(
    ("power", "regime", "advice"),
    [
        (0.0, "launch-bound", "hardly changes from 128 to 512 channels (elasticity 0.00)"),
        (0.3, "launch-bound", "remove blocks, narrowing buys little"),
        (0.6, "mixed", "narrowing pays less than it cuts"),
        (1.0, "compute-bound", "grows 4.0x from 128 to 512 channels (elasticity 1.00): compute"),
        (2.0, "compute-bound", "width pays"),
    ],
)
def test_power_law_of_the_width_is_found(power: float, regime: str, advice: str) -> None:
    found = only(table_of({mb4d(width): 0.01 * width**power for width in WIDTHS}))
    assert found.elasticity == pytest.approx(power, abs=1e-9)
    assert found.growth == pytest.approx(4**power)
    assert (found.narrowest, found.widest) == (128, 512)
    assert found.regime == regime
    assert found.sentence.startswith("stage at 7x7, mb4d: price ")
    assert advice in found.sentence


@pytest.mark.parametrize(
    ("fixed", "regime"), [(0.9, "launch-bound"), (0.65, "mixed"), (0.2, "compute-bound")]
)
def test_regime_is_the_share_of_the_price_that_follows_the_macs(fixed: float, regime: str) -> None:
    """A price of fixed share s around 256 channels, the rest with the width squared."""

    def price(width: int) -> float:
        return fixed + (1 - fixed) * (width / 256) ** 2

    found = only(table_of({mb4d(width): price(width) for width in (240, 256, 272)}))
    assert found.elasticity / 2 == pytest.approx(1 - fixed, abs=0.01)
    assert found.regime == regime


def test_stages_and_kinds_are_told_apart_from_the_highest_resolution_on() -> None:
    prices = {mb4d(width, "56x56"): width**2.0 for width in (16, 32)}
    prices |= {mb4d(width, "7x7"): 1.0 for width in (64, 128)}
    attention = tuple(sorted({"ffn_dim": 256, "heads": 8, "qk_dim": 32, "v_dim": 128}.items()))
    for width in (64, 128):
        prices[PriceKey("block", "mb3d", attention, "7x7", width, width)] = float(width)
    prices[mb4d(48, "28x28")] = 1.0  # one width says nothing
    found = regimes(table_of(prices))
    assert [(one.resolution, one.type, one.regime) for one in found] == [
        ("56x56", "mb4d", "compute-bound"),
        ("7x7", "mb3d", "compute-bound"),
        ("7x7", "mb4d", "launch-bound"),
    ]


def test_widths_far_below_the_widest_do_not_count() -> None:
    """Flat up to 64 channels, then with the square; half of what counts begins at 1/8."""
    prices = {mb4d(width): max(1.0, (width / 64) ** 2) for width in (1, 2, 64, 512)}
    assert only(table_of(prices)).elasticity == pytest.approx(2.0)


def sublayer(kind: str, **fields: int) -> PriceKey:
    return PriceKey("block", kind, tuple(sorted(fields.items())), "14x14+1", 192, 192)


def vit_rows(price: Callable[[int], float]) -> dict[PriceKey, float]:
    """Rows of a pruned ViT: only the greatest head widths and FFNs lie on the lines."""
    rows = {sublayer("vit", ffn_dim=dim): price(dim) for dim in (96, 192, 384, 768)}
    for heads in (1, 2, 4):
        rows[sublayer("vit", heads=heads, qk_dim=64, v_dim=64)] = 0.5 * heads
        rows[sublayer("vit", heads=heads, qk_dim=16, v_dim=64)] = 9.0
    return rows


def test_sublayers_of_one_width_are_judged_by_what_pruning_narrows() -> None:
    ffn, attention = regimes(table_of(vit_rows(lambda dim: 1.0 + dim / 1e4)))
    assert (attention.type, attention.varied) == ("vit attention", "heads")
    assert attention.elasticity == pytest.approx(1.0)
    assert attention.regime == "compute-bound"
    assert "from 1 to 4 heads" in attention.sentence
    assert (ffn.type, ffn.varied, ffn.regime) == ("vit FFN", "ffn_dim", "launch-bound")
    assert (ffn.narrowest, ffn.widest) == (96, 768)


def test_space_numbers_its_stages_and_sets_the_range() -> None:
    """The table goes on beyond the space's widths, where its price is another."""
    space = small_space()
    prices = {}
    for component in space_components(space):
        for key in price_keys(component):
            if component.kind == "block" and key.width_in in (16, 32, 48, 64, 96):
                prices[key] = float(key.width_in) ** (component.stage + 1)
    beyond = {mb4d(width, "16x16"): 1e6 for width in (96, 128)}
    table = table_of({**prices, **beyond})
    found = regimes(table, space)
    assert [(one.stage, one.type, one.narrowest, one.widest) for one in found] == [
        (1, "mb4d", 16, 48),
        (2, "mb3d", 32, 96),
        (2, "mb4d", 32, 96),
    ]
    assert [one.elasticity for one in found] == pytest.approx([1.0, 2.0, 2.0])
    assert found[0].sentence.startswith("stage 1 at 16x16, mb4d: price grows 3.0x from 16 to 48")


def test_show_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [one.sentence for one in regimes(find_device("iphone12"))]
    assert len(sentences) == 6
    assert main(["latency", "show", "iphone12"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line in sentences] == sentences
    assert main(["latency", "show", "iphone12", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [one["sentence"] for one in body["regimes"]] == sentences
