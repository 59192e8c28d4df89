"""`slimnas analyze ablate`: widths of Q, K and V, gates by finite differences, stop and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cli_world import slimnas
from efficientvit_cases import efficientvit
from measure_fakes import small_model
from prune_cases import ARCHITECTURES, random_network
from torch import Tensor, nn

from slimnas.analysis.ablate import (
    ablation_points,
    has_cascade,
    own_values,
    run_ablation,
    with_qk_dim,
    with_v_ratio,
)
from slimnas.analysis.budget import recalibrate_norms
from slimnas.analysis.finished import Finished
from slimnas.analysis.gates import ChannelImportance, channel_importance, kept_importance
from slimnas.arch.architecture import Architecture
from slimnas.errors import AnalysisError
from slimnas.nn.build import Network, build
from slimnas.report.analysis_ablate import ablation_figure, importance_figure
from slimnas.zoo.registry import get

EVIT = efficientvit(
    image=64,
    stages=[
        [{"heads": 2, "qk_dim": 4, "kernels": [3, 5], "window": 3}],
        [{"heads": 3, "qk_dim": 4, "kernels": [3], "window": 3}],
    ],
    widths=(16, 24),
)
MODELS = {
    "efficientvit": EVIT,
    **{family: small_model(family) for family in ("vit", "swin", "efficientformer")},
}
RANDOM = {**ARCHITECTURES, "efficientvit": EVIT}
STEP = 1e-5


def run(architecture: Architecture) -> Tensor:
    shape = architecture.input.shape
    network = build(architecture).eval()
    with torch.inference_mode():
        return network(torch.randn(2, shape.channels, shape.height, shape.width))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("qk_dim", [1, 3, 32])
def test_qk_dims_change_alone(family: str, qk_dim: int) -> None:
    base = MODELS[family]
    network = with_qk_dim(base, qk_dim)
    assert own_values(network, "qk_dim") == (qk_dim,)
    assert own_values(network, "v_ratio") == own_values(base, "v_ratio")
    assert has_cascade(network) == has_cascade(base)
    assert run(network).isfinite().all()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("v_ratio", [0.25, 1.0, 1.5])
def test_v_ratios_change_alone_but_for_the_cascade(family: str, v_ratio: float) -> None:
    base = MODELS[family]
    network = with_v_ratio(base, v_ratio)
    assert own_values(network, "qk_dim") == own_values(base, "qk_dim")
    assert not has_cascade(network)
    for found in own_values(network, "v_ratio"):  # rounded to whole dimensions of 2 to 4 heads
        assert found == pytest.approx(v_ratio, abs=0.5 * 4 / 16)
    assert run(network).isfinite().all()


def test_the_model_itself_is_a_point_of_both_axes() -> None:
    base = get("efficientvit_m4").architecture
    assert own_values(base, "qk_dim") == (16,)
    assert own_values(base, "v_ratio") == (1.0,)
    assert with_qk_dim(base, 16) == base
    alone = with_v_ratio(base, 1.0)
    assert alone != base  # the cascade is off
    deit = get("deit_tiny").architecture
    assert with_qk_dim(deit, 64) == deit
    assert with_v_ratio(deit, 1.0) == deit


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: with_qk_dim(EVIT, 0), "qk_dims: must be at least 1, got 0"),
        (lambda: with_v_ratio(EVIT, 0.0), "v_ratios: must be above 0, got 0"),
        (
            lambda: ablation_points(EVIT, qk_dims=[4], v_ratios=[]),
            "must be at least two values to compare, got 1",
        ),
    ],
)
def test_values_that_no_network_has_are_refused(work: Callable[[], Any], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        work()


def no_attention() -> Architecture:
    data = MODELS["efficientformer"].to_dict()
    for stage in data["stages"]:
        stage["blocks"] = [{"type": "mb4d"}]
    return Architecture.from_dict(data)


@pytest.mark.parametrize("change", [lambda a: with_qk_dim(a, 8), lambda a: with_v_ratio(a, 0.5)])
def test_a_model_without_attention_is_refused(change: Callable[[Architecture], Any]) -> None:
    with pytest.raises(AnalysisError, match=r"has no attention with a .*, its blocks are mb4d"):
        change(no_attention())


def batches(architecture: Architecture) -> list[tuple[Tensor, Tensor]]:
    shape = architecture.input.shape
    generator = torch.Generator().manual_seed(3)
    size = (2, shape.channels, shape.height, shape.width)
    classes = architecture.head.classes
    return [
        (
            torch.randn(size, generator=generator, dtype=torch.float64),
            torch.randint(classes, (2,), generator=generator),
        )
        for _ in range(2)
    ]


Rows = list[tuple[nn.Parameter, list[int]]]


def rows_of(part: Any) -> Iterator[tuple[str, int, int, Rows]]:
    """Kind, head, channel, and the weights that the channel's activation is proportional to."""
    heads, qk, v = part.heads, part.qk_dim, part.v_dim
    for head in range(heads):
        for kind, start, dim in (("q", 0, qk), ("k", qk, qk), ("v", 2 * qk, v)):
            for channel in range(dim):
                if hasattr(part, "qkvs"):
                    norm, row = part.qkvs[head].bn, start + channel
                elif part.__class__.__module__.endswith("efficientformer"):
                    norm, row = part.qkv, head * (2 * qk + v) + start + channel
                else:
                    norm, row = part.qkv, heads * start + head * dim + channel
                yield kind, head, channel, [(norm.weight, [row]), (norm.bias, [row])]


def loss_with(network: Network, rows: Rows, factor: float, batch: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        for tensor, index in rows:
            tensor[index] *= factor
        value = float(F.cross_entropy(network(batch[0]), batch[1]))
        for tensor, index in rows:
            tensor[index] /= factor
    return value


@pytest.mark.parametrize("family", RANDOM)
def test_importance_is_the_squared_slope_of_the_loss(family: str) -> None:
    """Against central differences in the channel's own weights; of Q as well, whose pair K is."""
    network = random_network(RANDOM[family])
    data = batches(network.architecture)
    found = channel_importance(network, data)
    parts = [part for part in network.modules() if hasattr(part, "qkv") or hasattr(part, "qkvs")]
    assert len(found) == len(parts) >= 2
    looked_at = 0
    for importance, part in zip(found, parts, strict=True):
        for kind, head, channel, rows in rows_of(part):
            if kind == "q" and family == "efficientvit":
                continue  # its queries pass a convolution with a bias after the gate
            if (head + channel) % 2:
                continue
            slopes = [
                (loss_with(network, rows, 1 + STEP, one) - loss_with(network, rows, 1 - STEP, one))
                / (2 * STEP)
                for one in data
            ]
            wanted = float(np.mean(np.square(slopes)))
            table = importance.v if kind == "v" else importance.qk
            assert table[head, channel] == pytest.approx(wanted, rel=2e-3, abs=1e-16)
            looked_at += 1
    assert looked_at > 20
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_importance_needs_images_and_attention() -> None:
    with pytest.raises(AnalysisError, match="at least one batch is needed"):
        channel_importance(build(MODELS["vit"]), [])
    with pytest.raises(AnalysisError, match="has no attention whose Q, K and V channels"):
        channel_importance(build(no_attention()), [])


def test_what_is_kept_are_the_most_important_channels_of_every_head() -> None:
    first = ChannelImportance(
        "a", 4, np.array([[1.0, 4.0, 2.0, 1.0], [0.0, 0.0, 8.0, 0.0]]), np.array([[3.0], [1.0]])
    )
    second = ChannelImportance("b", 4, np.array([[2.0, 2.0]]), np.array([[0.0, 0.0, 0.0, 0.0]]))
    one, two, all_of_it = kept_importance([first, second], "qk_dim", [1, 2, 9])
    assert one.by_block == (12 / 16, 0.5)
    assert one.share == 14 / 20
    assert two.by_block == (14 / 16, 1.0)
    assert all_of_it.share == 1.0
    half, whole = kept_importance([first, second], "v_ratio", [0.5, 1.0])
    assert half.by_block == (1.0, None)  # a ratio of 0.5 is what the first has; nothing is nothing
    assert whole.share == 1.0


class Trainer:
    """Says how wide Q and K are, and stops after a number of trainings."""

    def __init__(self, most: int = 100) -> None:
        self.trained: list[tuple[str, int]] = []
        self._most = most

    def __call__(self, architecture: Architecture, *, seed: int) -> float:
        if len(self.trained) == self._most:
            raise KeyboardInterrupt
        self.trained.append((architecture.digest, seed))
        return own_values(architecture, "qk_dim")[0] + 0.5 * seed


def test_an_ablation_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    base = MODELS["vit"]  # heads of 8 and 8, a V ratio of 1: on both axes
    points = ablation_points(base, qk_dims=[4, 8, 4], v_ratios=[0.5, 1.0])
    assert [(one.axis, one.value) for one in points] == [
        ("qk_dim", 4),
        ("qk_dim", 8),
        ("v_ratio", 0.5),
        ("v_ratio", 1.0),
    ]
    whole = Trainer()
    found = run_ablation(base, points, whole, Finished(tmp_path / "a", {}), seeds=(0, 1))
    assert len(whole.trained) == len(set(whole.trained)) == 6  # base itself is trained once
    assert [one.mean_top1 for one in found.of("qk_dim")] == [4.25, 8.25]
    assert not found.cascade_off
    with pytest.raises(KeyboardInterrupt):
        run_ablation(base, points, Trainer(2), Finished(tmp_path / "b", {}), seeds=(0, 1))
    rest = Trainer()
    again = run_ablation(base, points, rest, Finished(tmp_path / "b", {}), seeds=(0, 1))
    assert again == found
    assert len(rest.trained) == 4


@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_figures_have_a_panel_per_axis(tmp_path: Path, width_in: float) -> None:
    base = MODELS["efficientvit"]
    for number, (dims, ratios) in enumerate((([2, 4], [0.5, 1.0]), ([2, 4], []))):
        points = ablation_points(base, qk_dims=dims, v_ratios=ratios)
        finished = Finished(tmp_path / str(number), {})
        found = run_ablation(base, points, Trainer(), finished, seeds=(0, 1))
        assert found.cascade_off == (number == 0)
        assert len(ablation_figure(found, width_in).axes) == 2 - number
    network = random_network(ARCHITECTURES["vit"])
    weighed = channel_importance(network, batches(network.architecture))
    kept = [
        *kept_importance(weighed, "qk_dim", [1, 2, 4]),
        *kept_importance(weighed, "v_ratio", [0.2, 0.5]),
    ]
    assert len(importance_figure(network.architecture, kept, width_in).axes) == 2


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    EVIT.save(tmp_path / "small.yaml")
    return tmp_path


ASKED = ("analyze", "ablate", "small.yaml", "--output", "out", "--train-on", "cpu")
SHORT = ("--epochs", "1", "--max-images", "120", "--resolution", "32", "--json")


def test_the_command_trains_every_point(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*ASKED, "--qk-dims", "2,4", "--v-ratios", "0.5,1", *SHORT)
    found = slimnas(capfd, *words)
    assert found.code == 0, found.err
    assert "with the cascade off, at every ratio" in found.err
    body = found.json()
    assert [(one["axis"], one["value"]) for one in body["points"]] == [
        ("qk_dim", 2),
        ("qk_dim", 4),
        ("v_ratio", 0.5),
        ("v_ratio", 1),
    ]
    assert body["cascade_off_on_v_axis"] is True
    assert all(0 <= one["top1"] <= 100 for one in body["points"])
    params = [one["params"] for one in body["points"]]
    assert params[0] < params[1]
    assert params[2] < params[3]
    names = {Path(name).name for name in body["files"]}
    assert names == {f"ablate.{kind}" for kind in ("csv", "json", "svg", "png")}
    assert len((world / "out" / "ablate.csv").read_text().splitlines()) == 5
    assert not list((world / "out").glob("training-*"))

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr("slimnas.analysis.budget.TrainingBudget.train", never)
    assert slimnas(capfd, *words).json()["points"] == body["points"]
    other = slimnas(capfd, *words, "--lr", "0.01")
    assert other.code == 1
    assert "belongs to a run with recipe.lr 0.001, now it is 0.01" in other.errors[0]


def test_the_command_weighs_instead(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = (*ASKED, "--qk-dims", "1,2,4,8", "--v-ratios", "0.5,1", "--importance", *SHORT)
    found = slimnas(capfd, *words)
    assert found.code == 0, found.err
    body = found.json()
    kept = [one["kept_importance"] for one in body["points"]]
    assert kept[:4] == sorted(kept[:4])
    assert kept[2] == kept[3] == kept[5] == 1.0
    assert 0 < kept[0] < 1
    assert body["blocks"] == ["stages.0.blocks.0", "stages.1.blocks.0"]
    table = slimnas(capfd, *words[:-1])
    assert table.code == 0, table.err
    assert "importance that stays" in table.out
    assert (world / "out" / "ablate_importance.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("small.yaml", "--qk-dims", "4,x"), "--qk-dims: must be numbers between commas"),
        (("small.yaml", "--qk-dims", "4.5"), "--qk-dims: must be whole numbers between commas"),
        (("small.yaml", "--weights", "auto"), "--weights: is for --importance"),
        (("small.yaml", "--data", "nowhere"), "nowhere"),
        (("litv2_s",), "litv2_s: has no attention with a Q/K dimension per head of its own"),
        (
            ("small.yaml", "--importance", "--weights", "small.safetensors"),
            "small.safetensors",
        ),
    ],
)
def test_bad_input_is_one_line(
    world: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    found = slimnas(capfd, "analyze", "ablate", *words, "--output", "out/deep")
    assert found.code == 1
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not (world / "out").exists()


def test_weights_of_other_classes_are_refused(
    world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from slimnas.nn.tensorfiles import save_tensors

    save_tensors(world / "small.safetensors", build(EVIT).state_dict(), {})
    words = ("--importance", "--weights", "small.safetensors", "--max-images", "120")
    found = slimnas(capfd, *ASKED, *words, "--resolution", "64")
    assert found.code == 1
    assert "has 5 classes, the data have 10" in found.errors[0]


def test_norms_get_the_statistics_of_the_images() -> None:
    network = build(EVIT)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(8, 3, 64, 64, generator=generator) for _ in range(3)]
    first = network.stem.conv1
    recalibrate_norms(network, images)
    with torch.no_grad():
        maps = [first.conv(batch) for batch in images]
    means = torch.stack([one.mean(dim=(0, 2, 3)) for one in maps]).mean(dim=0)
    variances = torch.stack([one.var(dim=(0, 2, 3)) for one in maps]).mean(dim=0)
    assert torch.allclose(first.bn.running_mean, means, atol=1e-5)
    assert torch.allclose(first.bn.running_var, variances, rtol=1e-4)
    assert first.bn.momentum == 0.1
    assert not network.training
    untouched = build(MODELS["vit"])
    recalibrate_norms(untouched, images)  # no norm that keeps statistics
