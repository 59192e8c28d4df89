"""`slimnas analyze mhsa-share`: shares, widths by measurement, and a study that can be stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from measure_fakes import FakeMachine, FakeRuntime, cost_ms, small_model
from prune_cases import ARCHITECTURES
from share_cases import exactly, small

from slimnas.analysis.finished import Finished
from slimnas.analysis.mhsa_share import (
    Goal,
    Layers,
    count_layers,
    distinct_shares,
    layers_of_share,
    scaled,
    solve_width,
    spread,
    with_layers,
)
from slimnas.analysis.share_run import Instruments, ShareStudy, run_share_study
from slimnas.analysis.speed import Speed, SpeedMeter
from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.vit import TransformerBlock
from slimnas.arch.walk import walk
from slimnas.errors import AnalysisError, RunFolderError
from slimnas.measure.timing import Protocol
from slimnas.nn.build import build
from slimnas.report.analysis_share import mhsa_share_figure
from slimnas.zoo.registry import get

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
VIT = small_model("vit")


def test_shares_are_the_closest_there_are() -> None:
    looked_at = 0
    for attention, ffn in product(range(1, 13), repeat=2):
        most = Layers(attention, ffn)
        possible = [Layers(a, ffn) for a in range(1, attention + 1)]
        possible += [Layers(attention, f) for f in range(1, ffn + 1)]
        for percent in range(5, 100, 5):
            found = layers_of_share(percent / 100, most)
            assert found.attention <= attention
            assert found.ffn <= ffn
            best = min(abs(one.share - percent / 100) for one in possible)
            assert abs(found.share - percent / 100) == pytest.approx(best)
            looked_at += 1
    assert looked_at == 144 * 19


def test_what_stays_is_spread_evenly() -> None:
    for most in range(1, 25):
        for count in range(1, most + 1):
            kept = spread(count, most)
            assert len(set(kept)) == count
            assert kept[0] >= 0
            assert kept[-1] < most
            gaps = [b - a for a, b in pairwise(kept)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert spread(12, 12) == tuple(range(12))


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        ("deit_tiny", [(1, 12), (3, 12), (5, 12), (8, 12), (12, 12), (12, 8)]),
        ("swin_tiny", [(1, 12), (3, 12), (5, 12), (8, 12), (12, 12), (12, 8)]),
    ],
)
def test_layers_go_and_nothing_else(model: str, counts: list[tuple[int, int]]) -> None:
    base = get(model).architecture
    found = distinct_shares(base, SHARES)
    assert [(layers.attention, layers.ffn) for _, layers in found] == counts
    shapes = {part.name: part.input for part in walk(base)}
    for _, layers in found:
        network = with_layers(base, layers)
        assert count_layers(network) == layers
        assert network.widths == base.widths
        assert network.depths == base.depths
        saved = 0
        for name, before, after in block_pairs(base, network):
            if before.heads and not after.heads:
                saved += before.attention_cost(shapes[name]).macs  # type: ignore[attr-defined]
            if before.ffn_dim and not after.ffn_dim:
                saved += before.ffn_cost(shapes[name]).macs
        assert cost(base).macs - cost(network).macs == saved
    assert with_layers(base, Layers(12, 12)) == base


def block_pairs(
    base: Architecture, network: Architecture
) -> list[tuple[str, TransformerBlock, TransformerBlock]]:
    pairs = []
    for i, (one, other) in enumerate(zip(base.stages, network.stages, strict=True)):
        for j, (before, after) in enumerate(zip(one.blocks, other.blocks, strict=True)):
            assert isinstance(before, TransformerBlock)
            assert isinstance(after, TransformerBlock)
            pairs.append((f"stages.{i}.blocks.{j}", before, after))
    return pairs


def test_windows_alternate_where_attention_is_left_out() -> None:
    base = get("swin_tiny").architecture
    network = with_layers(base, Layers(8, 12))
    looked_at = 0
    for stage in network.stages:
        shifts = [block.shift for block in stage.blocks if block.heads]  # type: ignore[union-attr]
        assert shifts == [3 * (i % 2) for i in range(len(shifts))]
        looked_at += len(shifts)
    assert looked_at == 8


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("share", SHARES)
def test_sub_networks_run(family: str, share: float) -> None:
    base = small_model(family)
    layers = layers_of_share(share, count_layers(base))
    network = build(scaled(with_layers(base, layers), 0.7, step=4)).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("model", ["deit_tiny", "swin_tiny", "deit_small_distilled"])
def test_widths_scale(model: str) -> None:
    base = get(model).architecture
    assert scaled(base, 1.0, step=4) == base
    before = 0
    for scale in (0.1, 0.25, 0.5, 0.9, 1.1, 2.0):
        network = scaled(base, scale, step=4)
        for stage, own in zip(network.stages, base.stages, strict=True):
            assert stage.width % 4 == 0
            assert stage.width == pytest.approx(own.width * scale, abs=2)
            for block in stage.blocks:
                assert isinstance(block, TransformerBlock)
                assert block.ffn_dim == 4 * stage.width
                assert block.qk_dim == block.v_dim
                assert block.qk_dim % 2 == 0
                assert abs(block.heads * block.v_dim - stage.width) <= block.heads + 2
        assert cost(network).macs > before
        before = cost(network).macs


def measured_by(ms: Callable[[Architecture], float], noise: float = 0.0, seed: int = 0) -> Any:
    rng = random.Random(seed)
    base_ms = ms(get("deit_tiny").architecture)

    def measure(architecture: Architecture) -> Speed:
        measure.calls += 1  # type: ignore[attr-defined]
        return exactly(base_ms / ms(architecture) * (1 + rng.gauss(0, noise)))

    measure.calls = 0  # type: ignore[attr-defined]
    return measure


def by_macs(architecture: Architecture) -> float:
    return 2.0 + cost(architecture).macs / 1e8


def in_steps_of_16(architecture: Architecture) -> float:
    """Kernels that are as fast as at the next multiple of 16."""
    return by_macs(scaled(architecture, 1.0, step=16))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("speedup", [1.25, 1.5, 3.0])
@pytest.mark.parametrize(("ms", "noise"), [(by_macs, 0.0), (by_macs, 0.005)])
def test_widths_are_solved_for(
    share: float, speedup: float, ms: Callable[[Architecture], float], noise: float
) -> None:
    base = get("deit_tiny").architecture
    start = with_layers(base, layers_of_share(share, count_layers(base)))
    measure = measured_by(ms, noise)
    goal = Goal(speedup)
    solved = solve_width(start, goal, measure, macs=cost(base).macs / speedup)
    assert solved.met
    assert ms(base) / ms(solved.trial.architecture) == pytest.approx(speedup, rel=0.035)
    assert measure.calls <= 14
    assert scaled(start, solved.trial.scale, step=goal.step) == solved.trial.architecture


def test_the_closest_width_is_given_where_none_fits() -> None:
    base = get("deit_tiny").architecture
    measure = measured_by(in_steps_of_16)
    goal = Goal(1.37, tolerance=0.0005)
    solved = solve_width(base, goal, measure, macs=cost(base).macs / 1.37)
    assert not solved.met
    assert measure.calls <= goal.trials + 2
    assert solved.trial.speed.speedup == pytest.approx(1.37, rel=0.12)


def test_a_speed_that_no_width_has_ends_the_search() -> None:
    base = small(2)
    seen = []

    def measure(architecture: Architecture) -> Speed:
        seen.append(architecture.digest)
        return exactly(0.5)

    solved = solve_width(base, Goal(2.0), measure, macs=cost(base).macs / 2)
    assert not solved.met
    assert scaled(base, 1 / 16, step=4).digest in seen
    assert len(set(seen)) == len(seen) - 3  # only the narrowest is in doubt, then final


def test_a_chosen_width_is_measured_again() -> None:
    base = get("deit_tiny").architecture
    answers = iter([1.5, 1.8, 1.3, 1.5, 1.51])
    solved = solve_width(
        base, Goal(1.5), lambda _: exactly(next(answers)), macs=cost(base).macs / 1.5
    )
    assert solved.met
    assert solved.trial.speed.speedup == 1.51  # not the look it was chosen by


@pytest.mark.parametrize("disturbed", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_disturbed_look_does_not_lead_astray(disturbed: int, factor: float) -> None:
    base = get("swin_tiny").architecture
    start = with_layers(base, Layers(3, 12))
    looks = 0

    def measure(architecture: Architecture) -> Speed:
        nonlocal looks
        looks += 1
        true = by_macs(base) / by_macs(architecture)
        return exactly(true * (factor if looks == disturbed + 1 else 1.0))

    solved = solve_width(start, Goal(1.25), measure, macs=cost(base).macs / 1.25)
    assert solved.met
    assert solved.looks == looks <= 16
    assert by_macs(base) / by_macs(solved.trial.architecture) == pytest.approx(1.25, rel=0.02)


@pytest.mark.parametrize("batch", [1, 8])
def test_speed_is_that_of_the_machine(batch: int) -> None:
    network = scaled(VIT, 0.5, step=4)
    machine = FakeMachine(noise=0.01)
    meter = SpeedMeter(
        VIT,
        FakeRuntime(),
        Protocol(rounds=9, visit_ms=2.0),
        batch=batch,
        loader=machine.loader,
        clocks=machine.clocks,
    )
    speed = meter(network)
    base_ms, own_ms = (cost_ms(tuple(walk(one))) for one in (VIT, network))
    assert speed.speedup == pytest.approx(base_ms / own_ms, rel=0.02)
    assert speed.low <= speed.speedup <= speed.high
    assert speed.images_per_s == pytest.approx(1e3 * batch / own_ms, rel=0.03)
    assert speed.base_images_per_s == pytest.approx(1e3 * batch / base_ms, rel=0.03)
    assert speed.rounds == 9
    loads = machine.loads
    meter(network)
    assert machine.loads == loads + 1  # the base stays loaded


def test_the_cpu_clock_times_one_thread() -> None:
    with pytest.raises(AnalysisError, match="--clock cpu times one thread of a CPU, got 2"):
        SpeedMeter(VIT, FakeRuntime(threads=2), Protocol(clock="cpu"), batch=1)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            get("efficientformer_l1").architecture,
            "has no block whose attention or FFN can be left out on its own, its blocks are mb4d",
        ),
        (with_layers(small(3), Layers(1, 3)), "has 1 attention and 3 FFN layers, 2 and 3 are"),
    ],
)
def test_a_model_without_the_part_is_refused(architecture: Architecture, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        with_layers(architecture, Layers(2, 3))


def test_a_model_without_attention_is_refused() -> None:
    data = small(2).to_dict()
    data["stages"][0]["blocks"] = [
        {"type": "vit", "heads": 0, "qk_dim": 0, "v_dim": 0, "ffn_dim": 48}
    ]
    with pytest.raises(AnalysisError, match="small_vit: has no attention layer"):
        count_layers(Architecture.from_dict(data))


def test_a_stage_keeps_a_layer() -> None:
    base = ARCHITECTURES["vit"]  # 3 attentions, 2 FFNs; the last block has attention only
    assert count_layers(base) == Layers(3, 2)
    network = with_layers(base, Layers(1, 2))
    assert count_layers(network) == Layers(1, 2)
    assert network.depths == (2,)  # the block that had attention alone is gone


def study(base: Architecture, **changes: Any) -> ShareStudy:
    return replace(ShareStudy(base, (1.25, 1.5), (0.2, 0.5), Goal(1.0), (0, 1)), **changes)


class Counting:
    """Instruments that cost nothing and count, and stop after a number of uses."""

    def __init__(self, base: Architecture, uses: int | None = None) -> None:
        self._base_ms, self._uses = cost(base).macs, uses
        self.used: list[str] = []

    def _use(self, what: str) -> None:
        self.used.append(what)
        if self._uses is not None and len(self.used) > self._uses:
            raise KeyboardInterrupt

    def measure(self, architecture: Architecture) -> Speed:
        self._use("measure")
        return exactly(self._base_ms / cost(architecture).macs)

    def memory(self, architecture: Architecture) -> float:
        self._use("memory")
        return count_layers(architecture).share / 2

    def train(self, architecture: Architecture, *, seed: int) -> float:
        self._use(f"train {architecture.digest} {seed}")
        return 90 + seed + count_layers(architecture).share

    @property
    def instruments(self) -> Instruments:
        return Instruments(self.measure, self.memory, self.train)


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    base = small()
    whole = Counting(base)
    steps = []
    result = run_share_study(
        study(base), whole.instruments, Finished(tmp_path / "a", {}), steps.append
    )
    assert [step.done for step in steps if step.done != steps[0].done][-1] == steps[-1].total
    assert {step.total for step in steps} == {19}  # 4 widths, 5 memories, 5 trainings of 2 seeds
    assert len(result.networks) == 4
    trained = [use for use in whole.used if use.startswith("train")]
    assert len(trained) == 10

    path = tmp_path / "b"

    for stop in (2, 5, 3, 4, 1, 100):
        one = Counting(base, stop)
        try:
            again = run_share_study(study(base), one.instruments, Finished(path, {}))

            break
        except KeyboardInterrupt:
            with path.open("ab") as file:  # as if killed while it wrote
                file.write(b'{"key":"wid')
    else:
        pytest.fail("never finished")
    assert again == result
    done = [use for use in one.used if use.startswith("train")]
    assert len(set(done)) == len(done)


def test_more_shares_reuse_what_is_there(tmp_path: Path) -> None:
    base = small()
    run_share_study(study(base), Counting(base).instruments, Finished(tmp_path / "a", {}))
    more = Counting(base)
    run_share_study(
        study(base, shares=(0.2, 0.4, 0.5)), more.instruments, Finished(tmp_path / "a", {})
    )
    assert more.used.count("memory") == 2
    assert sum(use.startswith("train") for use in more.used) == 4


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    Finished(tmp_path / "a", {"goal": {"step": 4}, "batch": 1})
    message = r"belongs to a run with goal\.step 4, now it is 8; give the same"
    with pytest.raises(RunFolderError, match=message):
        Finished(tmp_path / "a", {"goal": {"step": 8}, "batch": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nonsense\n", "1: must begin with"),
        (b'{"schema":"slimnas/analysis-journal/1","settings":{}}\n[]\n', "2: damaged"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(text + b'{"key":"a","result":1}\n')
    with pytest.raises(RunFolderError, match=message):
        Finished(tmp_path / "a", {})


@pytest.mark.parametrize("result", ["x", [1.0], True])
def test_a_result_that_is_no_number_is_refused(tmp_path: Path, result: object) -> None:
    finished = Finished(tmp_path / "a", {})
    finished.add("top1", result)
    finished.add("whole", 3)
    assert finished.number("whole") == 3.0
    assert finished.number("other") is None
    with pytest.raises(RunFolderError, match="a: top1: damaged, must be a number"):
        finished.number("top1")


@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_the_figure_has_a_panel_for_what_is_known(tmp_path: Path, width_in: float) -> None:
    base = small()
    for number, instruments in enumerate(
        (
            Counting(base).instruments,
            Instruments(Counting(base).measure, Counting(base).memory),
            Instruments(Counting(base).measure),
        )
    ):
        result = run_share_study(study(base), instruments, Finished(tmp_path / str(number), {}))
        figure = mhsa_share_figure(result, width_in)
        assert len(figure.axes) == 4 - number
