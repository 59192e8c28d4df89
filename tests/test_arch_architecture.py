"""Architectures: the same from YAML and to it, equal by structure, counted as published."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace, shipped_spaces
from slimnas.zoo.registry import builtin_names, get

# An L1 stored by an earlier slimnas must keep its digest: change the schema's version, not this.
L1_DIGEST = "ef6423aff8c873458cbaee5f428ffc93517d82abf53e13e25b5e545376be2d60"
L1 = """schema: slimnas/architecture/1
name: l1
stem: {width: 48}
stages:
- {width: 48, blocks: [{type: mb4d, repeat: 3}]}
- {width: 96, downsample: {}, blocks: [{type: mb4d, repeat: 2}]}
- {width: 224, downsample: {}, blocks: [{type: mb4d, repeat: 6}]}
- {width: 448, downsample: {}, blocks: [{type: mb4d, repeat: 3}, {type: mb3d}]}
head: {classes: 1000, distilled: true}
"""


def test_everything_that_ships_loads() -> None:
    families = Counter(name.split("_")[0] for name in builtin_names())
    assert families == {
        "efficientformer": 3,
        "deit": 6,
        "vit": 7,
        "swin": 3,
        "litv2": 3,
        "efficientvit": 6,
        "efficientformerv2": 4,
        "found": 2,
    }
    assert [get(name).architecture.name for name in builtin_names()] == builtin_names()
    assert shipped_spaces() == (
        "efficientformer",
        "efficientformer_micro",
        "efficientformer_small",
        "efficientformer_tiny",
        "hybrid_tiny",
    )
    assert [SearchSpace.load(name).name for name in shipped_spaces()] == list(shipped_spaces())


@pytest.mark.parametrize("name", shipped_spaces())
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    space = SearchSpace.load(name)
    rng = random.Random(7)
    digests = set()
    for number in range(10):
        architecture = space.architecture(space.random(rng), name=f"{name}_{number}")
        text = architecture.to_yaml()
        again = Architecture.from_yaml(text)
        assert again == architecture
        assert again.to_yaml() == text
        assert again.model_dump() == architecture.model_dump()  # name and provenance too
        assert Architecture.from_dict(architecture.to_dict()) == architecture
        architecture.save(tmp_path / "a.yaml")
        assert (tmp_path / "a.yaml").read_text(encoding="utf-8") == text
        assert Architecture.load(tmp_path / "a.yaml") == architecture
        digests.add(architecture.digest)
    assert len(digests) == 10
    assert SearchSpace.from_yaml(space.to_yaml()) == space


@pytest.mark.parametrize("seed", range(5))
def test_repeat_is_sugar(seed: int) -> None:
    rng = random.Random(seed)
    space = SearchSpace.load("efficientformer_small")
    compact = space.architecture(space.random(rng))
    data = yaml.safe_load(compact.to_yaml())
    folded = sum(
        block.pop("repeat", 1) - 1 for stage in data["stages"] for block in stage["blocks"]
    )
    assert folded >= 1
    data = yaml.safe_load(compact.to_yaml())
    for stage in data["stages"]:
        one_by_one = []
        for block in stage["blocks"]:
            one_by_one += [{k: v for k, v in block.items() if k != "repeat"}] * block.get(
                "repeat", 1
            )
        stage["blocks"] = one_by_one
    expanded = Architecture.from_dict(data)
    assert expanded == compact
    assert hash(expanded) == hash(compact)
    assert expanded.digest == compact.digest
    assert expanded.to_yaml() == compact.to_yaml()
    assert {block.repeat for stage in expanded.stages for block in stage.blocks} == {1}


def test_digest_is_by_structure_and_stays() -> None:
    published = get("efficientformer_l1").architecture
    short = Architecture.from_yaml(L1)
    assert published.digest == short.digest == L1_DIGEST
    assert published == short
    assert published.name != short.name
    assert published.provenance != short.provenance
    assert short.renamed("other", {"found": 1}).digest == L1_DIGEST
    assert short.renamed("other").name == "other"
    assert short != published.name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("width: 96", "width: 97"),
        ("repeat: 6", "repeat: 7"),
        ("type: mb3d}", "type: mb3d, v_dim: 64}"),
        ("{type: mb4d, repeat: 2}", "{type: mb4d}, {type: mb4d, ffn_dim: 380}"),
        ("width: 48}", "width: 48, act: gelu}"),
        ("distilled: true", "distilled: false"),
        ("stem:", "input: {resolution: 256}\nstem:"),
        ("stem:", "input: {resolution: [224, 256]}\nstem:"),
        ("stem:", "input: {channels: 1}\nstem:"),
    ],
)
def test_digest_sees_every_part(old: str, new: str) -> None:
    assert L1.count(old) >= 1
    changed = Architecture.from_yaml(L1.replace(old, new, 1))
    assert changed.digest != L1_DIGEST
    assert changed != Architecture.from_yaml(L1)
    assert Architecture.from_yaml(changed.to_yaml()) == changed


def test_defaults_are_the_papers() -> None:
    architecture = Architecture.from_yaml(L1)
    assert architecture.input.shape.height == architecture.input.shape.width == 224
    assert architecture.stem.act == "relu"
    assert {b.ffn_dim for b in architecture.stages[3].blocks} == {4 * 448}
    attention = architecture.stages[3].blocks[-1]
    assert (attention.heads, attention.qk_dim, attention.v_dim) == (8, 32, 128)
    assert architecture.widths == (48, 96, 224, 448)
    assert architecture.depths == (3, 2, 6, 4)
    assert (architecture.count("mb4d"), architecture.count("mb3d")) == (14, 1)


@pytest.mark.parametrize(
    ("given", "height", "width", "kept"),
    [(64, 64, 64, 64), ([64, 96], 64, 96, [64, 96]), ([64, 64], 64, 64, 64)],
)
def test_resolution_forms(given: object, height: int, width: int, kept: object) -> None:
    text = L1.replace("stem:", f"input: {{resolution: {given}}}\nstem:")
    architecture = Architecture.from_yaml(text)
    shape = architecture.input.shape
    assert (shape.channels, shape.height, shape.width) == (3, height, width)
    assert architecture.to_dict()["input"]["resolution"] == kept
    side = height if height == width else (height, width)
    assert Architecture.from_yaml(L1).with_resolution(side) == architecture


def test_frozen() -> None:
    architecture = Architecture.from_yaml(L1)
    with pytest.raises(ValidationError, match="frozen"):
        architecture.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        architecture.stages[0].width = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        architecture.stages[0].blocks[0].ffn_dim = 3  # type: ignore[union-attr, misc]
    before = architecture.digest
    architecture.with_head(classes=2)
    architecture.with_resolution(32)
    assert architecture.digest == before == L1_DIGEST


def test_provenance_is_what_json_can_hold(tmp_path: Path) -> None:
    text = L1 + "provenance: {date: 2022-06-02, at: 2022-06-02 10:00:00, k: [a, {1: null}]}\n"
    architecture = Architecture.from_yaml(text)
    expected = {"date": "2022-06-02", "at": "2022-06-02T10:00:00", "k": ["a", {"1": None}]}
    assert architecture.provenance == expected
    architecture.save(tmp_path / "a.yaml")
    assert Architecture.load(tmp_path / "a.yaml").provenance == expected
    assert architecture.digest == L1_DIGEST


def test_totals_are_the_sum_of_the_parts() -> None:
    report = cost(Architecture.from_yaml(L1))
    assert (report.params, report.macs) == (12_289_928, 1_291_284_736)
    assert len(report.components) == 1 + 3 + 15 + 1
    for figure in ("params", "macs", "activation_bytes"):
        parts = [getattr(part, figure) for _, part in report.components]
        assert sum(parts) == getattr(report, figure)
        assert min(parts) > 0
    kinds = [component.kind for component, _ in report.components]
    assert kinds[0] == "stem"
    assert kinds[-1] == "head"
    assert [c.name for c, _ in report.components if c.kind == "downsample"] == [
        "stages.1.downsample",
        "stages.2.downsample",
        "stages.3.downsample",
    ]


def test_without_torch() -> None:
    """Describing, counting and pricing must start fast: none of it loads torch."""
    code = """
import sys
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace
from slimnas.latency import estimate, find_device
import slimnas.arch.walk, slimnas.latency.fit, slimnas.latency.device_model
space = SearchSpace.load("efficientformer_tiny")
network = space.architecture(space.largest())
assert cost(network).params > 0
assert estimate(network, find_device("iphone12")).latency_ms > 0
print([name for name in ("torch", "timm", "accelerate", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
