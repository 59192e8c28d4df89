"""Head similarity: of known features, of heads made alike or orthogonal, of every attention."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cli_world import slimnas
from prune_cases import ARCHITECTURES, FAMILIES, images, random_network
from torch import Tensor, nn

from slimnas.analysis.attention_maps import HeadMaps, MapTracer
from slimnas.analysis.heads import MEASURES, head_similarity, similarity
from slimnas.arch.architecture import Architecture
from slimnas.errors import AnalysisError
from slimnas.nn.build import build
from slimnas.nn.swin import WindowAttention
from slimnas.nn.vit import Attention
from slimnas.report.analysis_heads import heads_figure
from slimnas.zoo.create import create_model
from slimnas.zoo.entry import save_model

NO_ATTENTION = """schema: slimnas/architecture/1
name: pools
input: {channels: 3, resolution: 32}
stem: {type: conv_stem, width: 8}
stages: [{width: 8, blocks: [{type: mb4d, ffn_dim: 6}]}]
head: {type: linear, classes: 7}
"""
ONE_HEAD = """schema: slimnas/architecture/1
name: lonely
input: {channels: 3, resolution: 32}
stem: {type: vit_stem, width: 8, patch: 16}
stages: [{width: 8, blocks: [{type: vit, heads: 1, qk_dim: 4, v_dim: 4}]}]
head: {type: token, classes: 7}
"""


def test_similarity_of_known_features() -> None:
    """Heads at 0, 90 and 60 degrees: cosines 0, 0.5 and cos(30) between them."""
    angles = torch.tensor([0.0, 90.0, 60.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    most, mean = similarity(torch.cat([features, 5 * features])).tolist()
    near = 3**0.5 / 2
    assert most == pytest.approx([near, near])
    assert mean == pytest.approx([(0.5 + near + near) / 3] * 2)


@pytest.mark.parametrize(
    ("features", "expected"), [(torch.ones(2, 3, 5), 1.0), (torch.eye(3)[None], 0.0)]
)
def test_identical_heads_are_one_and_orthogonal_ones_zero(
    features: Tensor, expected: float
) -> None:
    assert torch.allclose(similarity(features), torch.tensor(expected, dtype=torch.float64))


def test_against_a_loop() -> None:
    features = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    most, mean = similarity(features)
    for image in range(4):
        best = []
        for i in range(5):
            others = [
                float(F.cosine_similarity(features[image, i], features[image, j], dim=0))
                for j in range(5)
                if j != i
            ]
            best.append(max(others))
        assert float(most[image]) == pytest.approx(max(best), abs=1e-6)
        assert float(mean[image]) == pytest.approx(sum(best) / 5, abs=1e-6)


def traced(network: nn.Module, x: Tensor) -> list[HeadMaps]:
    found: list[HeadMaps] = []
    with torch.no_grad(), MapTracer(len(x), found.append).watching(network):
        network(x)
    return found


def test_maps_of_a_vit_are_those_of_its_formula() -> None:
    attention = Attention(width=6, tokens=5, heads=2, qk_dim=3, v_dim=4).eval()
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    (found,) = traced(attention, x)
    q, k, v = attention.qkv(x).split([6, 6, 8], dim=2)
    for head in range(2):
        logits = q[..., 3 * head : 3 * head + 3] @ k[..., 3 * head : 3 * head + 3].transpose(1, 2)
        maps = (logits * attention.scale).softmax(-1)
        assert torch.allclose(found.maps[:, head], maps.flatten(1), atol=1e-6)
        assert found.outputs is not None
        mixed = maps @ v[..., 4 * head : 4 * head + 4]
        assert torch.allclose(found.outputs[:, head], mixed.flatten(1), atol=1e-6)


def test_maps_of_windows_stand_side_by_side() -> None:
    network = build(ARCHITECTURES["swin"]).eval()
    x = images(ARCHITECTURES["swin"]).float()
    found = traced(network, x)
    assert [one.module for one in found] == [
        "stages.0.blocks.0.attn",
        "stages.0.blocks.1.attn",
        "stages.1.blocks.0.attn",
    ]
    windows = [m.windows for m in network.modules() if isinstance(m, WindowAttention)]
    for one, cut in zip(found, windows, strict=True):
        assert one.maps.shape[2] == cut.count * cut.tokens**2
        rows = one.maps.reshape(2, one.maps.shape[1], -1, cut.tokens).sum(-1)
        assert torch.allclose(rows, torch.ones_like(rows))
    # An image's maps do not depend on what else is in the batch.
    alone = traced(network, x[:1])
    assert torch.allclose(alone[1].maps, found[1].maps[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "attentions"), [("vit", 3), ("swin", 3), ("efficientformer", 2)]
)
def test_heads_made_alike_are_found_alike(family: str, attentions: int) -> None:
    """Every head of one attention gets the first head's weights."""
    from slimnas.nn.units import attention_of, qkv_rows

    network = random_network(ARCHITECTURES[family])
    for i, stage in enumerate(network.architecture.stages):
        for j, block in enumerate(stage.blocks):
            spec = attention_of(block)
            if spec is None:
                continue
            module = network.get_submodule(f"stages.{i}.blocks.{j}")
            attention = getattr(module, "attn", None) or module.token_mixer
            with torch.no_grad():
                for rows in qkv_rows(spec):
                    for head in rows[1:]:
                        attention.qkv.weight[head] = attention.qkv.weight[rows[0]]
                        attention.qkv.bias[head] = attention.qkv.bias[rows[0]]
                for table in ("attention_biases", "relative_position_bias_table"):
                    if hasattr(attention, table):
                        getattr(attention, table).zero_()
    found = head_similarity(network, [images(network.architecture)])
    assert len(found.layers) == attentions
    for layer in found.layers:
        assert set(layer.measures) == set(MEASURES)
        assert all(stat.mean == pytest.approx(1) for stat in layer.measures.values())


def test_a_head_that_nobody_resembles() -> None:
    """Heads whose values share no channel and no token are orthogonal."""
    network = build(Architecture.from_yaml(ONE_HEAD.replace("heads: 1", "heads: 2"))).eval()
    attention = network.stages[0].blocks[0].attn  # type: ignore[union-attr,index]
    # Queries and keys of both heads are 0: maps are uniform and alike, outputs are mean values.
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.zero_()
        attention.qkv.bias[16] = 1.0  # first value dim of head 0
        attention.qkv.bias[21] = 1.0  # second value dim of head 1
    (layer,) = head_similarity(network, [torch.randn(3, 3, 32, 32)]).layers
    assert layer.measures["maps_max"].mean == pytest.approx(1)
    assert layer.measures["outputs_max"].mean == pytest.approx(0, abs=1e-9)
    assert layer.measures["outputs_mean"].mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("model", "resolution", "attentions", "branches"),
    [
        ("deit_tiny", 32, 12, {""}),
        ("swin_tiny", 64, 12, {""}),
        ("efficientformer_l1", 64, 1, {""}),
        ("efficientvit_m0", 64, 6, {""}),
        ("efficientformerv2_s0", 64, 5, {""}),
        ("litv2_s", 64, 14, {"", "Hi-Fi", "Lo-Fi"}),
    ],
)
def test_attention_of_every_family_is_seen(
    model: str, resolution: int, attentions: int, branches: set[str]
) -> None:
    network = create_model(model, resolution=resolution).eval()
    x = torch.randn(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    found = head_similarity(network, [x])
    assert {layer.branch for layer in found.layers} == branches
    assert len(found.layers) == attentions
    for layer in found.layers:
        spec = (
            next(
                s
                for i, st in enumerate(network.architecture.stages)
                for j, s in enumerate(st.blocks)
                if layer.component == f"stages.{i}.blocks.{j}"
            )
            if layer.block is not None
            else None
        )
        if spec is not None and not layer.branch:
            assert layer.heads == spec.heads  # type: ignore[attr-defined]
        assert set(layer.measures) == set(MEASURES)
        for stat in layer.measures.values():
            assert -1 - 1e-9 <= stat.mean <= 1 + 1e-9
        for what in ("maps", "outputs"):
            most, mean = (layer.measures[f"{what}_{w}"].mean for w in ("max", "mean"))
            assert mean <= most + 1e-12


MIXERS = {
    "mhsa": "{type: mhsa, heads: 4}",
    "window": "{type: window, heads: 4}",
    "shifted": "{type: window, heads: 4, shift: 3}",
    "sra": "{type: sra, heads: 4}",
    "linear_sra": "{type: linear_sra, heads: 4}",
    "tmsa": "{type: tmsa, heads: 4}",
    "cga": "{type: cga, heads: 4}",
    "strided": "{type: strided, heads: 4}",
}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mechanism_shows_its_heads(name: str) -> None:
    """Maps of one head and one query sum to 1; every image has its own."""
    text = f"""schema: slimnas/architecture/1
name: mixer
input: {{channels: 3, resolution: 112}}
stem: {{type: conv_stem, width: 32}}
stages: [{{width: 64, downsample: {{type: conv3x3}}, blocks: [{MIXERS[name]}]}}]
head: {{type: linear, classes: 7}}
"""
    network = build(Architecture.from_yaml(text)).eval()
    x = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    found = traced(network, x)
    assert found
    for one, alone in zip(found, traced(network, x[1:2]), strict=True):
        assert one.maps.shape[:2] == (3, 4)
        assert one.outputs is not None
        assert one.outputs.shape[:2] == (3, 4)
        rows = one.maps.sum(dim=2)
        assert torch.allclose(rows, rows.round(), atol=1e-3)
        assert torch.allclose(rows, rows[0, 0].expand_as(rows), atol=1e-3)
        assert torch.allclose(alone.maps[0], one.maps[1], atol=1e-5)
        assert torch.allclose(alone.outputs[0], one.outputs[1], atol=1e-4)


def test_batches_do_not_change_the_mean() -> None:
    network = random_network(ARCHITECTURES["vit"])
    x = torch.cat([images(network.architecture, seed) for seed in (1, 2)])
    whole = head_similarity(network, [x])
    parts = head_similarity(network, [x[:1], x[1:4]])
    assert whole.images == parts.images == 4
    for one, other in zip(whole.layers, parts.layers, strict=True):
        for name, stat in one.measures.items():
            assert other.measures[name].mean == pytest.approx(stat.mean)
            assert other.measures[name].deviation == pytest.approx(stat.deviation)


def test_the_network_is_left_alone_and_gives_the_same() -> None:
    for family in FAMILIES:
        network = random_network(ARCHITECTURES[family]).train()
        x = images(network.architecture)
        before = network.eval()(x)
        network.train()
        head_similarity(network, [x])
        assert network.training
        assert torch.equal(network.eval()(x), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NO_ATTENTION, "pools: has no attention, .* its blocks are mb4d; choose a model with"),
        (ONE_HEAD, "lonely: .* every attention of lonely has one head only"),
    ],
)
def test_a_model_without_heads_to_compare(text: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        head_similarity(build(Architecture.from_yaml(text)), [torch.zeros(1, 3, 32, 32)])


def test_no_images() -> None:
    with pytest.raises(AnalysisError, match="at least one image"):
        head_similarity(build(ARCHITECTURES["vit"]), [])


@pytest.mark.parametrize("width_in", [9.0, 4.0])
def test_the_figure_shows_every_layer(width_in: float) -> None:
    network = random_network(ARCHITECTURES["swin"])
    found = head_similarity(network, [images(network.architecture)])
    figure = heads_figure(found, found, network.architecture, width_in)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        lines = [line for line in axes.lines if len(line.get_xdata()) == len(found.layers)]
        assert len(lines) == 4  # two readings, each with its control


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ARCHITECTURES["vit"].save(tmp_path / "vit.yaml")
    command = ("analyze", "heads", "vit.yaml", "--weights", "none", "--images", "6")
    answer = slimnas(capsys, *command, "--batch-size", "4")
    assert answer.code == 0, answer.err
    assert "random crops of two photographs" in answer.err
    assert "random, seed 0" in answer.err
    assert "stages.0.blocks.2.attn" in answer.out
    folder = Path("runs/analyze-heads-tiny_vit")
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".json", ".png", ".svg"]
    document = json.loads((folder / "heads.json").read_text())
    assert document["images"] == 6
    with (folder / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["heads"] for row in rows] == ["3", "3", "2"]
    assert "control_maps_max" not in rows[0]  # random weights are their own control


def test_weights_of_a_file_have_a_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    network = random_network(ARCHITECTURES["vit"]).float()
    save_model(
        Path("trained"), architecture=network.architecture, weights=network.state_dict(), metrics={}
    )
    command = ("analyze", "heads", "trained", "--images", "3", "--data", "digits", "--json")
    body = slimnas(capsys, *command).json()
    assert body["weights"] == str(Path("trained/weights.safetensors"))
    assert body["data"].startswith("digits")
    for layer in body["layers"]:
        assert layer["outputs_max"] != layer["control_outputs_max"]
    assert Path(body["files"]["png"]).is_file()
    alone = slimnas(capsys, *command, "--no-control", "--output", "other").json()
    assert alone["layers"][0]["outputs_max"] == body["layers"][0]["outputs_max"]
    assert "control_outputs_max" not in alone["layers"][0]


def test_a_model_without_attention_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Architecture.from_yaml(NO_ATTENTION).save(tmp_path / "pools.yaml")
    answer = slimnas(capsys, "analyze", "heads", "pools.yaml")
    assert answer.code == 1
    (error,) = answer.errors
    assert "pools: has no attention" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pools.yaml"]
