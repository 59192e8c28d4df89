"""A working directory in which `slimnas search` takes seconds: a small space and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_up_device import made_up_device

from slimnas.arch.space import SearchSpace
from slimnas.arch.walk import component_cost
from slimnas.cli.main import main
from slimnas.latency import OVERHEAD, LatencyTable, PriceRow, price_key, space_components

SPACE = """\
schema: slimnas/search-space/1
name: small
input: {resolution: 32}
stages:
- {width: {min: 16, max: 32}, slots: 2, choices: [mb4d, identity]}
- width: {min: 16, max: 48}
  slots: 2
  choices: [mb4d, mb3d, identity]
  downsample: {type: conv3x3}
head: {type: linear, classes: 10}
blocks:
  mb3d: {heads: 2, qk_dim: 8, v_dim: 8}
supernet: {resolution: 32}
"""
SEARCH = (
    *("search", "--device", "bench", "--space", "space.yaml"),
    *("--epochs", "1", "--max-images", "240", "--search-images", "20", "--train-on", "cpu"),
)


class Answer(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines, without their prefix."""
        lines = self.err.splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]

    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        body = json.loads(self.out)
        assert isinstance(body, dict)
        return body


def lay_out(folder: Path) -> None:
    """Write `space.yaml` and `lookup_tables/bench`, whose prices are 1 ms per 10 million MACs."""
    (folder / "space.yaml").write_text(SPACE)
    save_table(folder / "lookup_tables" / "bench", SearchSpace.from_yaml(SPACE))


def save_table(folder: Path, *spaces: SearchSpace) -> None:
    """Write a table that prices every component of the spaces."""
    device = made_up_device(folder.name, protocol="1 ms per 10 million MACs")
    components = (part for space in spaces for part in space_components(space))
    prices = {price_key(part): 1e-7 * component_cost(part).macs for part in components}
    rows = [PriceRow(key, ms, 0.001, 9, "measured") for key, ms in prices.items()]
    rows.append(PriceRow(OVERHEAD, 0.1, 0.001, 9, "measured"))
    LatencyTable(device, tuple(rows)).save(folder)


def slimnas(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """Run a command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return Answer(code, out, err)
