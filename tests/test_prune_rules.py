"""Width rules: ratios made by hand from known rules must give those rules back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.cli.prune_rules import rules
from slimnas.errors import MissingLatencyError, PruneError, SpecError
from slimnas.latency.devices import find_device
from slimnas.prune.costs import Budget
from slimnas.prune.findings import compare_with_savit, published_findings
from slimnas.prune.ratios import RatioSet, channel_ratios
from slimnas.prune.rules import instantiate, make_rule, rule_rows
from slimnas.prune.segments import chosen, fit_levels
from slimnas.prune.widths import BlockPlan, WidthPlan, attention_dims, block_components
from slimnas.zoo.registry import get

Widths = Callable[[int], tuple[float, float, float]]
"""Shares of QK, V and FFN that stay of the block at a position; 0 for QK: no attention."""


def made(name: str, *rules: Widths) -> RatioSet:
    source = get(name).architecture
    budgets = []
    for number, rule in enumerate(rules):
        blocks = {}
        for place, (part, block) in enumerate(block_components(source)):
            heads, qk_dim, v_dim = attention_dims(block)
            qk, v, ffn = rule(place)
            heads = heads if qk else 0
            hidden = block.hidden(part.input.channels)
            blocks[part.name] = BlockPlan(
                tuple(range(heads)),
                (tuple(range(round(qk * qk_dim))),) * heads,
                (tuple(range(round(v * v_dim))),) * heads,
                tuple(range(round(ffn * hidden))),
            )
        plan = WidthPlan(source.digest, blocks)
        label = f"macs-{number}"
        budgets.append(channel_ratios(source, plan.architecture(source), plan, label=label))
    return RatioSet(source, tuple(budgets))


def late(place: int) -> tuple[float, float, float]:
    """EfficientViT's picture: QK and FFN cut, V kept but at the end, the end cut most."""
    return (0.2, 0.5, 0.2) if place >= 9 else (0.4, 0.98, 0.7)


def test_a_known_rule_comes_back() -> None:
    rule = make_rule(made("deit_tiny", late))
    found = {
        quantity: [(level.first, level.last, level.value) for level in choice.levels]
        for quantity, choice in rule.choices.items()
    }
    assert found == {  # 0.4 and 0.2 of 64; 0.7 and 0.2 of 4, in quarters
        "qk_dim": [(0, 8, 24), (9, 11, 16)],
        "v_ratio": [(0, 8, 1), (9, 11, 0.5)],
        "ffn_ratio": [(0, 8, 2.75), (9, 11, 0.75)],
    }
    flat = make_rule(made("deit_tiny", late), depth_dependent="no")
    assert [len(choice.levels) for choice in flat.choices.values()] == [1, 1, 1]
    assert flat.choices["qk_dim"].levels[0].value == 24  # the median block
    rows = rule_rows(rule)
    assert len(rows) == 1 + 6
    assert rows[1][:3] == ("Q and K dims per head", "1 to 9", "24")


def test_budgets_are_joined_by_their_median_or_chosen() -> None:
    ratios = made("deit_tiny", lambda _: (0.75, 1, 0.75), late, lambda _: (0.5, 1, 0.5))
    joined = make_rule(ratios)
    assert joined.choices["ffn_ratio"].by_budget == pytest.approx(
        {"macs-0": 3.0, "macs-1": 2.8, "macs-2": 2.0}, abs=0.01
    )
    assert joined.choices["qk_dim"].levels[0].value == 32
    only = make_rule(ratios, budgets=["macs-2"])
    assert [level.value for level in only.choices["ffn_ratio"].levels] == [2]
    assert only.budgets == ("macs-2",)
    with pytest.raises(PruneError, match="no budget 'macs-9' in the ratios; they have macs-0"):
        make_rule(ratios, budgets=["macs-9"])
    with pytest.raises(PruneError, match="at least 1"):
        make_rule(ratios, multiple=0)


def test_noise_is_no_dependence_on_depth() -> None:
    rng = np.random.default_rng(0)
    several = 0
    for seed in range(150):
        values = rng.normal(32, 8, 12)
        fits = fit_levels(values, step=8, rounded=lambda x: round(x / 8) * 8, seed=seed)
        several += chosen(fits).levels > 1
    assert several <= 15  # the test's level is 5 % of 150


@pytest.mark.parametrize(
    ("values", "starts"),
    [
        ([4, 4, 4, 4, 4, 4, 1, 1, 1, 1, 1, 1], (0, 6)),
        ([4, 4, 4, 4, 3, 3, 3, 3, 1, 1, 1, 1], (0, 4, 8)),
        ([4] * 12, (0,)),
        ([4, 4.02, 4, 3.98, 4.01, 3.99, 3.9, 3.92, 3.91, 3.9, 3.9, 3.9], (0,)),  # cannot be built
        ([4, 1, 4, 1, 4, 1, 4, 1, 4, 1, 4, 1], (0,)),
        ([4, 4], (0,)),
    ],
)
def test_levels(values: list[float], starts: tuple[int, ...]) -> None:
    fits = fit_levels(values, step=0.25, rounded=lambda x: round(x * 4) / 4)
    assert chosen(fits).starts == starts


def test_best_fit_is_the_brute_force_one() -> None:
    rng = random.Random(3)
    values = [rng.random() for _ in range(9)]
    fits = fit_levels(values, step=0.01, rounded=lambda x: x)

    def loss(*edges: int) -> float:
        parts = [values[a:b] for a, b in zip((0, *edges), (*edges, 9), strict=True)]
        return sum(float(np.var(part)) * len(part) for part in parts)

    best = min((loss(a, b), (0, a, b)) for a in range(2, 6) for b in range(a + 2, 8))
    assert fits[2].starts == best[1]
    assert fits[2].explained == pytest.approx(1 - best[0] / (9 * float(np.var(values))))


def test_stages_are_levels_of_several_stages() -> None:
    ratios = made("swin_tiny", lambda i: (0.5, 1, 0.25 if i >= 4 else 1))  # from stage 3 on
    rule = make_rule(ratios)
    levels = [(level.first, level.last, level.value) for level in rule.choices["ffn_ratio"].levels]
    assert levels == [(0, 3, 4), (4, 11, 1)]
    network = rule.architecture(64)
    assert network.widths == (64, 128, 256, 512)
    blocks = [block for stage in network.stages for block in stage.blocks]
    assert [attention_dims(block) for block in blocks[::4]] == [
        (2, 16, 32),
        (8, 16, 32),
        (8, 16, 32),
    ]
    assert [block.shift for block in blocks[:2]] == [0, 3]  # type: ignore[union-attr]


def test_unpruned_ratios_give_the_published_networks() -> None:
    whole = made("deit_tiny", lambda _: (1, 1, 1))
    rule = make_rule(whole)
    assert rule.architecture(192) == get("deit_tiny").architecture
    assert rule.architecture(384) == get("deit_small").architecture
    found = instantiate(rule, Budget("macs", cost(get("deit_small").architecture).macs))
    assert found.width == 384
    for name in ("swin_tiny", "efficientformer_l1"):
        source = get(name).architecture
        rule = make_rule(made(name, lambda _: (1, 1, 1)))
        network = rule.architecture(source.widths[0])
        assert network.widths == source.widths
        # EfficientFormer's V ratio is 2.29, in eighths 2.25, which multiples of 8 make 128 again
        assert network == source


def test_parts_that_are_gone_stay_out() -> None:
    ratios = made("deit_tiny", lambda i: (0, 0, 0.5) if i >= 8 else (0.5, 1, 1))
    network = make_rule(ratios).architecture(128)
    heads = [attention_dims(block)[0] for block in network.stages[0].blocks]
    assert heads == [2] * 8 + [0] * 4
    gone = make_rule(made("deit_tiny", lambda i: (0.5, 1, 1) if i < 5 else (0, 0, 0)))
    assert gone.architecture(128).depths == (5,)
    most = make_rule(made("deit_tiny", lambda i: (0.5, 1, 1) if i == 0 else (0, 0, 0)))
    with pytest.raises(PruneError, match=r"stages.0: the rule leaves nothing of it"):
        most.architecture(128)


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_from_below(kind: str) -> None:
    rule = make_rule(made("deit_tiny", late))

    def total(architecture: Architecture) -> float:
        return float(getattr(cost(architecture), kind))

    limit = 1.02 * total(rule.architecture(160))
    found = instantiate(rule, Budget(kind, limit))  # type: ignore[arg-type]
    assert found.cost == total(found.architecture) <= limit
    affordable = [w for w in range(8, 400, 8) if total(rule.architecture(w)) <= limit]
    assert found.cost == max(total(rule.architecture(w)) for w in affordable)
    assert found.architecture.name == "deit_tiny_rule"
    provenance = found.architecture.provenance["width_rule"]
    assert provenance["ratios_of"] == "deit_tiny"
    with pytest.raises(PruneError, match="the budget must be at least"):
        instantiate(rule, Budget(kind, 10.0))  # type: ignore[arg-type]


def test_latency_by_a_table() -> None:
    table = find_device("iphone12")
    rule = make_rule(made("efficientformer_l1", lambda _: (1, 1, 1)))
    found = instantiate(rule, Budget("latency_ms", 2.0), table)
    assert 1.5 < found.cost <= 2.0
    with pytest.raises(PruneError, match="the narrowest network that the table prices costs"):
        instantiate(rule, Budget("latency_ms", 0.5), table)
    with pytest.raises(MissingLatencyError, match="has no price"):
        instantiate(make_rule(made("deit_tiny", late)), Budget("latency_ms", 3.0), table)


def test_width_must_be_a_multiple_of_8() -> None:
    rule = make_rule(made("deit_tiny", late))
    for width in (0, -8, 100):
        with pytest.raises(PruneError, match=f"multiple of 8, got {width}"):
            rule.architecture(width)


def test_a_name_that_no_architecture_may_have_is_one_line() -> None:
    rule = make_rule(made("deit_tiny", late))
    with pytest.raises(SpecError, match=r"width rule: name: .*'my net'") as caught:
        rule.architecture(64, name="my net")
    assert "\n" not in str(caught.value)


def test_published_findings_by_hand() -> None:
    ratios = made("deit_tiny", late)
    found = {finding.name: finding for finding in published_findings(ratios)}
    assert len(found) == 6
    macs = 1 - ratios.budgets[0].macs / cost(ratios.source).macs
    qk = 1 - (9 * 26 / 64 + 3 * 13 / 64) / 12  # 0.4 and 0.2 of 64 dims, rounded
    assert found["qk_cut"].values == (pytest.approx(qk / macs),)
    assert {name: finding.verdict for name, finding in found.items()} == {
        "qk_cut": "yes",
        "ffn_cut": "yes",
        "v_kept": "yes",
        "v_kept_early": "yes",
        "last_blocks": "yes",
        "last_blocks_ffn": "yes",
    }
    other = made("deit_tiny", lambda i: (1, 0.5 if i < 9 else 1, 1), late, lambda _: (1, 1, 1))
    verdicts = {finding.name: finding.verdict for finding in published_findings(other)}
    assert verdicts["v_kept"] == "at 1 of 2 budgets"  # nothing cut: cannot be told
    assert verdicts["qk_cut"] == "at 1 of 2 budgets"
    swin = published_findings(made("swin_tiny", lambda i: (1, 1, 0.5 if i < 10 else 0.1)))
    assert [finding.verdict for finding in swin if finding.name == "last_stage"] == ["yes"]


def test_comparison_with_the_published_record() -> None:
    removed = [62, 65, 0, 2, 7, 4, 16, 112, 135, 346, 542, 537]
    same = made("deit_tiny", lambda i: (1, 1, 1 - removed[i] / 768), lambda _: (1, 1, 0.5))
    one, flat = compare_with_savit(same)
    assert one.own_removed == one.removed == tuple(removed)
    assert one.rank_correlation == pytest.approx(1)
    assert one.record == "SAViT DeiT-T"
    assert flat.rank_correlation is None
    assert [c.record for c in compare_with_savit(made("deit_small", late))] == ["SAViT DeiT-S"]
    assert compare_with_savit(made("swin_tiny", late)) == ()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made("deit_tiny", late, lambda _: (0.5, 1, 0.5)).save_json(tmp_path / "channel_ratios.json")
    return tmp_path


def invoke(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(rules)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_command(run: Path) -> None:
    code, text = invoke(run, "--macs", "0.6G", "--output", run / "rule.yaml")
    assert code == 0
    network = Architecture.load(run / "rule.yaml")
    assert 0.5e9 < cost(network).macs <= 0.6e9
    for words in (
        "Q and K dims per head",
        "Do EfficientViT's findings",
        "SAViT DeiT-T",
        "rule.yaml",
    ):
        assert words in text
    code, text = invoke(run / "channel_ratios.json", "--width", 64, "--json")
    body = json.loads(text)
    assert Architecture.from_dict(body["network"]["architecture"]).widths == (64,)
    assert set(body["rule"]) == {"qk_dim", "v_ratio", "ffn_ratio"}
    assert len(body["findings"]) == 6
    assert (
        body["network"]["macs"]
        == cost(make_rule(RatioSet.load(run / "channel_ratios.json")).architecture(64)).macs
    )
    code, text = invoke(run, "--json", "--use", "macs-1", "--depth-dependent", "no")
    body = json.loads(text)
    assert (body["network"], body["budgets"]) == (None, ["macs-1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--macs", "1G", "--width", "64"], "exclude each other"),
        (["--output", "x.yaml"], "needs one of"),
        (["--latency", "3ms"], "go together"),
        (["--device", "iphone12"], "go together"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_command_refusals(run: Path, options: list[str], message: str) -> None:
    code, text = invoke(run, *options)
    assert code == 2
    assert message in " ".join(text.split())
