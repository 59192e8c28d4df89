"""`slimnas prune rules`: from channel ratios to a width rule, and a network of it to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimnas.cli.output import JsonOption, print_json, shown_path
from slimnas.cli.seeds import seed_option

if TYPE_CHECKING:
    from slimnas.arch.architecture import Architecture
    from slimnas.latency.table import LatencyTable
    from slimnas.prune.findings import Finding, PublishedComparison
    from slimnas.prune.ratios import RatioSet
    from slimnas.prune.rules import WidthRule

RATIOS = "channel_ratios.json"


class DepthChoice(str, Enum):
    """Whether a width may depend on depth."""

    AUTO = "auto"
    NO = "no"


def rules(
    run: Annotated[
        Path, typer.Argument(help="Run folder of slimnas prune, or channel_ratios.json.")
    ],
    macs: Annotated[
        str | None, typer.Option(help="MACs of a network to train from scratch: 0.6G, or 50%.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="Its parameters instead: 3M, or 50%.")] = None,
    latency: Annotated[str | None, typer.Option(help="Its latency instead: 3ms.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Latency table: a device's name, or a folder.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Its embedding width instead, a multiple of 8.")
    ] = None,
    depth_dependent: Annotated[
        DepthChoice, typer.Option(help="Whether widths may depend on depth where ratios do.")
    ] = DepthChoice.AUTO,
    use: Annotated[
        list[str] | None, typer.Option(help="Budget to read the rule from; else all. Repeatable.")
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 8,
    name: Annotated[str | None, typer.Option(help="Name of the network.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Architecture file to write, such as architecture.yaml.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of the test for dependence on depth.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Turn channel ratios into a compact width rule, with the evidence for each width.

    Example: slimnas prune rules runs/prune-deit_tiny-imagenet --macs 0.6G --output rule.yaml
    """
    from slimnas.prune.findings import compare_with_savit, published_findings
    from slimnas.prune.ratios import RatioSet
    from slimnas.prune.rules import make_rule

    asked = {"--macs": macs, "--params": params, "--latency": latency, "--width": width}
    given = [option for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other")
    if output is not None and not given:
        raise typer.BadParameter("--output needs one of --macs, --params, --latency, --width")
    if (latency is None) != (device is None):
        raise typer.BadParameter("--latency and --device go together")
    ratios = RatioSet.load(run / RATIOS if run.is_dir() else run)
    rule = make_rule(
        ratios,
        multiple=round_to,
        depth_dependent=depth_dependent.value,
        budgets=use,
        seed=seed,
    )
    table = _table(device)
    network = None
    if width is not None:
        network = rule.architecture(width, name=name)
    elif given:
        network = _instance(rule, (macs, params, latency), table, name)
    if output is not None and network is not None:
        network.save(output)
    findings, published = published_findings(ratios), compare_with_savit(ratios)
    if as_json:
        body = {
            **_rule_body(ratios, rule),
            "findings": [_finding_body(ratios, finding) for finding in findings],
            "published": [asdict(comparison) for comparison in published],
            "network": None if network is None else _network_body(network, table, output),
        }
        print_json(body)
        return
    _show_rule(ratios, rule)
    _show_findings(ratios, findings, published)
    if network is not None:
        _show_network(network, table, output)


def _table(device: str | None) -> LatencyTable | None:
    if device is None:
        return None
    from slimnas.latency.devices import find_device

    return find_device(device)


def _instance(
    rule: WidthRule,
    budget: tuple[str | None, str | None, str | None],
    table: LatencyTable | None,
    name: str | None,
) -> Architecture:
    from slimnas.prune.costs import parse_budget
    from slimnas.prune.rules import instantiate

    macs, params, latency = budget
    if macs is not None:
        wanted = parse_budget("macs", macs, rule.source)
    elif params is not None:
        wanted = parse_budget("params", params, rule.source)
    else:
        wanted = parse_budget("latency_ms", latency or "", rule.source, table)
    return instantiate(rule, wanted, table, name=name).architecture


def _rule_body(ratios: RatioSet, rule: WidthRule) -> dict[str, Any]:
    from slimnas.prune.rules import TITLES

    return {
        "model": ratios.source.name,
        "budgets": list(rule.budgets),
        "multiple": rule.multiple,
        "rule": {
            quantity: {
                "title": TITLES[quantity],
                "levels": [asdict(level) for level in choice.levels],
                "unpruned": choice.unpruned,
                "median": choice.median,
                "quartiles": list(choice.quartiles),
                "by_budget": dict(choice.by_budget),
                "fits": [asdict(fit) for fit in choice.fits],
                "reason": choice.reason,
            }
            for quantity, choice in rule.choices.items()
        },
    }


def _finding_body(ratios: RatioSet, finding: Finding) -> dict[str, Any]:
    labels = [budget.label for budget in ratios.budgets]
    return {
        "name": finding.name,
        "finding": finding.statement,
        "measure": finding.measure,
        "values": dict(zip(labels, finding.values, strict=True)),
        "threshold": finding.threshold,
        "at_least": finding.at_least,
        "reproduced": dict(zip(labels, finding.reproduced, strict=True)),
        "verdict": finding.verdict,
    }


def _network_body(
    network: Architecture, table: LatencyTable | None, output: Path | None
) -> dict[str, Any]:
    from slimnas.arch.cost import cost
    from slimnas.latency.estimate import latency_ms

    counted = cost(network)
    return {
        "name": network.name,
        "widths": list(network.widths),
        "depths": list(network.depths),
        "macs": counted.macs,
        "params": counted.params,
        "latency_ms": None if table is None else latency_ms(network, table),
        "file": None if output is None else shown_path(output),
        "architecture": network.to_dict(),
    }


def _show_rule(ratios: RatioSet, rule: WidthRule) -> None:
    from slimnas.prune.rules import TITLES, rule_rows

    typer.echo(f"Width rule from {ratios.source.name} at {', '.join(rule.budgets)}\n")
    _echo_rows(rule_rows(rule))
    typer.echo()
    for quantity, choice in rule.choices.items():
        typer.echo(f"{TITLES[quantity]}: {choice.reason}")


def _show_findings(
    ratios: RatioSet, findings: Sequence[Finding], published: Sequence[PublishedComparison]
) -> None:
    labels = [budget.label for budget in ratios.budgets]
    typer.echo("\nDo EfficientViT's findings (CVPR 2023) hold here?\n")
    rows: list[tuple[str, ...]] = [("finding", "holds", *labels, "threshold", "measured as")]
    for finding in findings:
        values = ["-" if value is None else f"{value:.2f}" for value in finding.values]
        rows.append(
            (
                finding.statement,
                finding.verdict,
                *values,
                finding.threshold_text,
                finding.measure,
            )
        )
    _echo_rows(rows)
    for found in published:
        rank = "no" if found.rank_correlation is None else f"{found.rank_correlation:.2f}"
        typer.echo(
            f"\nFFN units removed per block at {found.label}: rank correlation {rank} with "
            f"{found.record} ({found.gmacs[0]:g} to {found.gmacs[1]:g} GMACs)"
        )
        typer.echo(f"  published {' '.join(f'{count:>4}' for count in found.removed)}")
        typer.echo(f"  here      {' '.join(f'{count:>4}' for count in found.own_removed)}")


def _show_network(network: Architecture, table: LatencyTable | None, output: Path | None) -> None:
    body = _network_body(network, table, output)
    widths, depths = (" ".join(map(str, body[key])) for key in ("widths", "depths"))
    typer.echo(f"\n{network.name}: width {widths}, blocks {depths}, to train from scratch")
    typer.echo(f"params: {body['params']:,}\nmacs: {body['macs']:,}")
    if table is not None:
        typer.echo(f"latency: {body['latency_ms']:.3f} ms by the {table.device.name} table")
    if output is None:
        typer.echo(f"\n{network.to_yaml().rstrip()}")
    else:
        typer.echo(f"written: {body['file']}")


def _echo_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns side by side; the last is not padded."""
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(f"{cell:<{size}}" for cell, size in zip(row, sizes, strict=True))
        typer.echo(line.rstrip())
