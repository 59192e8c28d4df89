"""Where run time goes: operators by kind, work by closed form, shares that add up."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_world import slimnas
from prune_cases import ARCHITECTURES, FAMILIES, VIT
from torch.nn.modules.module import _global_forward_hooks

from slimnas.analysis import operators
from slimnas.analysis.memory import Profile, profile_network
from slimnas.analysis.operators import KINDS, Operator, of_aten, of_onnx
from slimnas.analysis.places import OUTSIDE, Place, places
from slimnas.analysis.recording import Cell, ProfileSettings, Recording
from slimnas.analysis.traffic import count_traffic
from slimnas.arch.architecture import Architecture
from slimnas.arch.walk import component_cost, walk
from slimnas.errors import AnalysisError
from slimnas.nn.build import build
from slimnas.nn.fold import fold
from slimnas.report.analysis_memory import memory_figure
from slimnas.zoo.create import create_model

SHORT = ProfileSettings(batch=2, iterations=3, warm_up=1)
EXACT = ("ViTBlock", "SwinBlock", "MB3D", "LinearHead", "TokenHead", "PatchMerging")
"""Components without convolutions."""

LINEAR, ADD = Operator("linear", "product"), Operator("add", "elementwise")
SOFTMAX, VIEW = Operator("softmax", "softmax"), Operator("view", "copy")


def zoo_and_small() -> list[str]:
    return [*FAMILIES, "efficientvit_m0", "efficientformerv2_s0", "litv2_s", "deit_tiny_distilled"]


def network_of(name: str, **changes: int) -> torch.nn.Module:
    return build(ARCHITECTURES[name]) if name in ARCHITECTURES else create_model(name, **changes)


@pytest.mark.parametrize(
    ("name", "operator", "kind"),
    [
        ("aten::addmm", "linear", "product"),
        ("aten::mkldnn_convolution", "convolution", "product"),
        ("aten::bmm", "matmul", "product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention", "attention"),
        ("aten::_softmax", "softmax", "softmax"),
        ("aten::native_layer_norm", "layer_norm", "norm"),
        ("aten::add_", "add", "elementwise"),
        ("aten::copy_", "copy", "copy"),
        ("aten::transpose", "view", "copy"),
        ("aten::roll", "roll", "copy"),
        ("aten::gelu", "gelu", "activation"),
        ("aten::relu_", "relu", "activation"),
        ("aten::avg_pool2d", "average_pool", "pool"),
        ("aten::mystery_", "mystery", "other"),
        ("torchvision::deform_conv2d", "convolution", "product"),
    ],
)
def test_torch_operators(name: str, operator: str, kind: str) -> None:
    assert of_aten(name) == Operator(operator, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["aten::empty", "aten::resize_", "cudaLaunchKernel", "[memory]"])
def test_what_operators_call_for_themselves_is_theirs(name: str) -> None:
    assert of_aten(name) is None


@pytest.mark.parametrize(
    ("name", "operator", "kind"),
    [
        ("FusedConv", "convolution", "product"),
        ("MatMul", "matmul", "product"),
        ("Gemm", "linear", "product"),
        ("SkipLayerNormalization", "layer_norm", "norm"),
        ("Softmax", "softmax", "softmax"),
        ("Gelu", "gelu", "activation"),
        ("Transpose", "transpose", "copy"),
        ("ReorderInput", "copy", "copy"),
        ("Add", "add", "elementwise"),
        ("GlobalAveragePool", "average_pool", "pool"),
        ("Mystery", "Mystery", "other"),
    ],
)
def test_onnx_operators(name: str, operator: str, kind: str) -> None:
    assert of_onnx(name) == Operator(operator, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", ["_ATEN", "_ONNX"])
def test_every_name_is_one_operator(table: str) -> None:
    kinds = getattr(operators, table)
    words = [w for group in kinds.values() for words in group.values() for w in words.split()]
    assert len(words) > 70
    assert len(words) == len(set(words))
    names = [name for group in kinds.values() for name in group]
    assert len(names) == len(set(names))
    assert set(kinds) == set(KINDS) - {"other"}


def test_kinds_are_memory_bound_or_not() -> None:
    bound = {kind for kind in KINDS if operators.is_memory_bound(kind)}
    assert bound == {"copy", "elementwise", "norm", "pool"}
    wider = {kind for kind in KINDS if operators.is_memory_bound(kind, nonlinear=True)}
    assert wider - bound == {"softmax", "activation"}


def test_work_is_what_closed_forms_say() -> None:
    looked_at = 0
    for name in zoo_and_small():
        network = network_of(name).eval()
        architecture = network.architecture
        shape = architecture.input.shape
        found = count_traffic(network, torch.zeros(2, shape.channels, shape.height, shape.width))
        assert {place.component for place, _ in found} <= {
            "",
            *(c.name for c in walk(architecture)),
        }
        for component in walk(architecture):
            macs = sum(t.macs for (p, _), t in found.items() if p.component == component.name)
            assert macs == 2 * component_cost(component).macs, (name, component.name)
            looked_at += 1
    assert looked_at > 70


def test_bytes_of_known_operators() -> None:
    """A linear layer on (2, 5, 3) -> (2, 5, 4), its map transposed (a view) and copied."""

    class Known(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.architecture = ARCHITECTURES["vit"]
            self.stem = torch.nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stem(x).transpose(1, 2).contiguous() + 1.0

    from slimnas.analysis import places as module

    known = Known()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "places", lambda network: {Place("stem"): network.stem})
        found = count_traffic(known, torch.zeros(2, 5, 3))  # type: ignore[arg-type]
    by_name = {(place, operator.name): traffic for (place, operator), traffic in found.items()}
    linear = by_name[Place("stem"), "linear"]
    assert linear.macs == 2 * 5 * 3 * 4
    assert linear.bytes == 4 * (30 + 12 + 4 + 40)
    assert by_name[OUTSIDE, "view"].bytes == 0
    assert by_name[OUTSIDE, "copy"].bytes == 4 * (40 + 40)
    assert by_name[OUTSIDE, "add"].bytes == 4 * (40 + 40)


@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_modules_by_name(name: str) -> None:
    network = build(ARCHITECTURES[name])
    found = places(network)
    assert all(network.get_submodule(place.name) is module for place, module in found.items())
    assert {p.component for p in found} == {c.name for c in walk(network.architecture)}
    assert Place("stages.0.blocks.0", "mlp") in found


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[*FAMILIES, "efficientvit_m0"])
def profiled(request: pytest.FixtureRequest, runtime: str) -> Profile:
    network = network_of(request.param)
    return profile_network(network, replace(SHORT, runtime=runtime))  # type: ignore[arg-type]


def test_shares_add_up(profiled: Profile) -> None:
    groupings = (
        profiled.by_kind(),
        profiled.by_operator(),
        profiled.by_layer(),
        profiled.by_part(),
    )
    for rows in groupings:
        assert sum(row.share_percent for row in rows.values()) == pytest.approx(100)
        assert sum(row.ms for row in rows.values()) == pytest.approx(profiled.total_ms)
        assert all(row.ms >= 0 and row.spread_percent >= 0 for row in rows.values())
        assert all(0 <= row.memory_bound_percent <= 100 + 1e-9 for row in rows.values())
    bound, wider = (profiled.memory_bound(nonlinear=n) for n in (False, True))
    kinds = profiled.by_kind()
    named = sum(kinds[k].share_percent for k in operators.MEMORY_BOUND if k in kinds)
    assert bound.share_percent == pytest.approx(named)
    assert 0 < bound.share_percent < wider.share_percent < 100


def test_every_run_counts_and_every_layer_is_there(profiled: Profile) -> None:
    assert all(len(cell.times_ms) == SHORT.iterations for cell in profiled.cells)
    assert len(profiled.recording.forward_ms) == SHORT.iterations
    layers = profiled.by_layer()
    assert [name for name in layers if name] == list(profiled.components)
    assert all(row.ms > 0 for row in layers.values())


def test_no_operator_of_ours_is_unknown(profiled: Profile) -> None:
    assert [o.name for o in profiled.by_operator() if o.kind == "other"] == []


def test_the_profilers_count_the_work_of_closed_forms(profiled: Profile) -> None:
    """ONNX Runtime widens maps of convolutions to whole registers, which is work too."""
    layers = profiled.by_layer()
    small = {one.name: one for one in ARCHITECTURES.values()}
    architecture = small.get(profiled.model) or create_model(profiled.model).architecture
    looked_at = 0
    for component in walk(folded_head(architecture)):
        exact = SHORT.batch * component_cost(component).macs
        found = layers[component.name].macs
        if profiled.settings.runtime == "torch" or type(component.spec).__name__ in EXACT:
            assert found == exact, component.name
        assert exact <= found < 4 * exact
        looked_at += 1
    assert looked_at == len(profiled.components)


def folded_head(architecture: Architecture) -> Architecture:
    """Folding makes one classifier of two, unless they read two tokens."""
    if architecture.head.type != "linear" or not architecture.head.distilled:
        return architecture
    return architecture.with_head(distilled=False)


def test_operators_of_a_known_network() -> None:
    """Two ViT blocks with FFN and one without: 4 + 4 + 2 linear layers, and 2 classifiers."""
    # Fused kernels need values as wide as queries.
    equal = re.sub("v_dim: [56]", "v_dim: 4", VIT)
    network = build(Architecture.from_yaml(equal.replace("qk_dim: 3", "qk_dim: 4")))
    found = profile_network(network, SHORT)
    rows = {operator.name: row for operator, row in found.by_operator().items()}
    assert rows["linear"].calls == 4 + 4 + 2 + 2
    assert rows["attention"].calls == 3
    assert rows["layer_norm"].calls == 2 + 2 + 1 + 2
    assert rows["gelu"].calls == 2
    assert rows["convolution"].calls == 1
    assert rows["cat"].calls == 1
    assert "softmax" not in rows
    explicit = profile_network(network, replace(SHORT, attention="explicit"))
    rows = {operator.name: row for operator, row in explicit.by_operator().items()}
    assert rows["softmax"].calls == 3
    assert "attention" not in rows
    assert explicit.memory_bound(nonlinear=True).macs == 0


def test_folding_removes_batch_norm() -> None:
    network = build(ARCHITECTURES["efficientformer"])
    kinds = [
        {o.name for o in profile_network(network, replace(SHORT, folded=f)).by_operator()}
        for f in (True, False)
    ]
    assert "batch_norm" not in kinds[0]
    assert "batch_norm" in kinds[1]


def test_the_network_is_left_alone() -> None:
    network = build(ARCHITECTURES["vit"]).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    threads = torch.get_num_threads()
    profile_network(network, replace(SHORT, folded=False, threads=threads + 1))
    assert network.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not _global_forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def made_up() -> Profile:
    """Two layers; the second run of the softmax was interrupted."""
    block, head = Place("stages.0.blocks.0", "attn"), Place("head")
    cells = (
        Cell(block, LINEAR, 2, (6.0, 6.0, 6.0), 1200, 100),
        Cell(block, SOFTMAX, 1, (1.0, 50.0, 1.0), 0, 50),
        Cell(head, LINEAR, 1, (1.0, 1.0, 1.0), 300, 100),
        Cell(head, ADD, 1, (1.5, 1.5, 1.5), 0, 30),
        Cell(OUTSIDE, VIEW, 1, (0.5, 0.5, 0.5), 0, 0),
    )
    recording = Recording(cells, (9.0, 11.0, 10.0), "1.0", "cpu")
    return Profile("made_up", (8, 8), (block.component, "head"), SHORT, recording)


def test_rows_of_known_cells() -> None:
    profile = made_up()
    assert profile.total_ms == 10
    assert profile.forward_ms == 10
    kinds = profile.by_kind()
    assert list(kinds) == ["product", "elementwise", "softmax", "copy"]
    assert [row.share_percent for row in kinds.values()] == [70, 15, 10, 5]
    assert kinds["product"].intensity == 1500 / 200
    assert kinds["copy"].intensity is None
    assert profile.memory_bound(nonlinear=False).share_percent == 20
    assert profile.memory_bound(nonlinear=True).share_percent == 30
    layers = profile.by_layer()
    assert list(layers) == ["stages.0.blocks.0", "head", ""]
    assert layers["head"].memory_bound_percent == 60
    assert layers["stages.0.blocks.0"].memory_bound_percent == 0
    # Shares of the softmax in the three runs: 10, 50 of 59, and 10 percent.
    assert kinds["softmax"].spread_percent == pytest.approx((10 + 100 * 50 / 59) / 2 - 10)


@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_the_figure_has_a_bar_per_kind_and_layer(width_in: float) -> None:
    figure = memory_figure([made_up(), made_up()], width_in)
    axes = {one.get_label(): one for one in figure.axes}
    bars = axes["shares"].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(200)
    assert sum(bar.get_height() for bar in axes["made_up layers"].patches) == pytest.approx(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"dtype": "fp8"}, "dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"runtime": "onnxruntime", "dtype": "bf16"}, "on the CPU in fp32 only, got cpu and bf16"),
    ],
)
def test_what_cannot_be_profiled_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        replace(SHORT, **changes)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(AnalysisError, match="finds none here; use device cpu"):
        replace(SHORT, device="cuda")


def test_folded_and_fresh_networks_have_the_same_places() -> None:
    network = build(ARCHITECTURES["efficientformer"])
    assert {p.component for p in places(fold(network))} == {p.component for p in places(network)}


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit", "efficientformer"):
        ARCHITECTURES[name].save(tmp_path / f"{name}.yaml")
    short = ("--iterations", "2", "--batch", "1")
    answer = slimnas(capsys, "analyze", "memory", "vit.yaml", "efficientformer.yaml", *short)
    assert answer.code == 0, answer.err
    folder = Path("runs/analyze-memory-tiny_vit-tiny_efficientformer")
    names = ["kinds.csv", "layers.csv", "memory.json", "memory.png", "memory.svg", "operators.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for words in (
        "tiny_efficientformer: torch",
        "memory-bound",
        "with softmax, activation",
        "(between)",
    ):
        assert words in answer.out
    with (folder / "kinds.csv").open() as file:
        rows = list(csv.DictReader(file))
    for model in ("tiny_vit", "tiny_efficientformer"):
        shares = [float(row["share_percent"]) for row in rows if row["model"] == model]
        assert sum(shares) == pytest.approx(100, abs=0.01)
    assert json.loads((folder / "memory.json").read_text())["schema"] == "slimnas/analysis-memory/1"


def test_the_command_answers_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ARCHITECTURES["efficientformer"].save(tmp_path / "small.yaml")
    answer = slimnas(
        capsys,
        *("analyze", "memory", "small.yaml", "--runtime", "onnxruntime", "--iterations", "2"),
        *("--resolution", "48", "--output", "out", "--json"),
    )
    assert answer.code == 0, answer.err
    (profile,) = answer.json()["profiles"]
    assert profile["resolution"] == [48, 48]
    assert profile["runtime"] == "onnxruntime"
    assert {"forward_ms", "operators_ms", "kinds", "operators", "layers"} <= profile.keys()
    assert Path(answer.json()["files"]["png"]).is_file()


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    answer = slimnas(capsys, "analyze", "memory", "deit_tinny")
    assert answer.code == 1
    assert "did you mean 'deit_tiny'" in answer.errors[0]
