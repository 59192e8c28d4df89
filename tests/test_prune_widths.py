"""Width plans: what they refuse, the architectures they leave, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from prune_cases import ARCHITECTURES, FAMILIES, VIT, random_plan, with_block

from slimnas.arch.architecture import Architecture
from slimnas.arch.vit import ViTBlock
from slimnas.errors import PruneError, SpecError
from slimnas.prune.widths import BlockPlan, WidthPlan, embedding_groups

ARCH = ARCHITECTURES["vit"]
FULL = WidthPlan.full(ARCH)
B0 = "stages.0.blocks.0"
GONE = BlockPlan((), (), (), ())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_is_the_same_after_a_file(family: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[family]
    for seed in range(5):
        plan = random_plan(architecture, seed, embedding=bool(seed % 2))
        plan.save(tmp_path / "plan.json")
        again = WidthPlan.load(tmp_path / "plan.json")
        assert again == plan == WidthPlan.from_dict(plan.to_dict())
        assert (again.digest, hash(again)) == (plan.digest, hash(plan))
        data = json.loads((tmp_path / "plan.json").read_text())
        assert data["schema"] == "slimnas/width-plan/1"
        assert data == json.loads(json.dumps(plan.to_dict()))
        again.check(architecture)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError, match="source"):
        FULL.source = ""  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        FULL.blocks[B0] = GONE  # type: ignore[index]
    assert len({FULL, WidthPlan.full(ARCH), replace(FULL, embedding=((1,),))}) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_leaves_the_architecture(family: str) -> None:
    source = ARCHITECTURES[family]
    plan = WidthPlan.full(source)
    kept = plan.architecture(source)
    assert kept.digest == source.digest
    assert kept.name == f"{source.name}_pruned"
    assert kept.provenance["pruned_from"] == {
        "name": source.name,
        "architecture": source.digest,
        "width_plan": plan.digest,
    }
    everything = tuple(tuple(range(width)) for width in source.widths)
    assert replace(plan, embedding=everything).architecture(source) == source


def test_the_architecture_that_stays() -> None:
    attention_only = BlockPlan((1,), ((0, 3),), ((0, 1, 4),), ())
    plan = with_block(FULL, B0, attention_only)
    plan = with_block(plan, "stages.0.blocks.1", BlockPlan((), (), (), (2, 7)))
    plan = with_block(plan, "stages.0.blocks.2", GONE)
    plan = replace(plan, embedding=((0, 2, 4, 23),))
    kept = plan.architecture(ARCH, name="small")
    assert kept.name == "small"
    assert (kept.stem.width, kept.widths, kept.head) == (4, (4,), ARCH.head)
    assert kept.stages[0].blocks == (
        ViTBlock(heads=1, qk_dim=2, v_dim=3, ffn_dim=0),
        ViTBlock(heads=0, qk_dim=0, v_dim=0, ffn_dim=2),
    )
    assert Architecture.from_yaml(kept.to_yaml()) == kept


def test_stages_without_downsampling_share_their_stream() -> None:
    data = Architecture.from_yaml(VIT).to_dict()
    data["stages"] = [*data["stages"], *data["stages"]]
    two = Architecture.from_dict(data)
    assert embedding_groups(two) == (0, 0)
    assert embedding_groups(ARCHITECTURES["swin"]) == (0, 1)
    plan = replace(WidthPlan.full(two), embedding=((0, 1), (0, 2)))
    with pytest.raises(PruneError, match=r"embedding\[1\]: must be the channels of stage 0"):
        plan.check(two)
    assert replace(plan, embedding=((0, 2), (0, 2))).architecture(two).widths == (2, 2)


def change(**fields: object) -> Callable[[], WidthPlan]:
    return lambda: with_block(FULL, B0, replace(FULL.blocks[B0], **fields))  # type: ignore[arg-type]


def embedding(*kept: tuple[int, ...]) -> Callable[[], WidthPlan]:
    return lambda: replace(FULL, embedding=kept)


def all_gone() -> WidthPlan:
    return replace(FULL, blocks=dict.fromkeys(FULL.blocks, GONE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (change(ffn=(1, 8)), r"blocks\.0\.ffn: must be below 8; got 8"),
        (change(ffn=(-1, 2)), r"blocks\.0\.ffn: must be below 8; got -1"),
        (change(ffn=(3, 2)), r"blocks\.0\.ffn: must be ascending, each once; got 2 after 3"),
        (change(ffn=(3, 3)), r"blocks\.0\.ffn: must be ascending, each once; got 3 after 3"),
        (change(heads=(0, 1, 3)), r"blocks\.0\.heads: must be below 3; got 3"),
        (change(heads=(0,)), r"blocks\.0\.qk: must hold one list for each of the 1 heads .* has 3"),
        (change(heads=()), r"blocks\.0\.qk: must hold one list for each of the 0 heads"),
        (change(v=((0,), (1,))), r"blocks\.0\.v: must hold one list for each of the 3 .* has 2"),
        (
            change(qk=((0,), (1,), (2, 3))),
            r"blocks\.0\.qk: all heads of a block must keep equally many dims, got 1 to 2",
        ),
        (change(qk=((0,), (4,), (1,))), r"qk of head 1: must be below 4; got 4"),
        (
            change(v=((), (), ())),
            r"blocks\.0\.v: a head that stays must keep a dim.*take the heads",
        ),
        (
            lambda: with_block(FULL, "stages.0.blocks.2", replace(GONE, ffn=(0,))),
            r"blocks\.2\.ffn: must be empty, there is none; got 0",
        ),
        (
            lambda: with_block(FULL, "stages.0.blocks.7", GONE),
            r"blocks\.stages\.0\.blocks\.7: tiny_vit has no such block \(did you mean",
        ),
        (lambda: replace(FULL, blocks={}), r"blocks\.stages\.0\.blocks\.0: missing"),
        (all_gone, r"blocks\.stages\.0: one block of a stage must stay, the plan removes all 3"),
        (embedding((0,), (1,)), r"embedding: must hold one list for each of the 1 stages"),
        (embedding(()), r"embedding\[0\]: one channel must stay, got none"),
        (embedding((0, 24)), r"embedding\[0\]: must be below 24; got 24"),
        (embedding((4, 1)), r"embedding\[0\]: must be ascending, each once; got 1 after 4"),
        (
            lambda: WidthPlan.full(ARCH.with_resolution(64)),
            rf"is for architecture \w{{12}}, tiny_vit is {ARCH.digest[:12]}; apply it to the",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(
    make: Callable[[], WidthPlan], message: str
) -> None:
    plan = make()
    for refuse in (plan.check, plan.architecture):
        with pytest.raises(PruneError, match=message) as caught:
            refuse(ARCH)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("block", "kept", "message"),
    [
        ("stages.0.blocks.0", GONE, r"of type mb4d must keep its FFN, the plan removes it"),
        ("stages.1.blocks.1", GONE, r"of type mb3d must keep its attention, the plan removes it"),
        ("stages.1.blocks.1", {"ffn": ()}, r"of type mb3d must keep its FFN"),
        (
            "stages.1.blocks.1",
            {"heads": (), "qk": (), "v": ()},
            r"of type mb3d must keep its attention",
        ),
        ("stages.0.blocks.0", {"heads": (0,)}, r"blocks\.0\.heads: must be empty, there is none"),
    ],
)
def test_efficientformers_blocks_keep_both_sub_layers(
    block: str, kept: BlockPlan | dict[str, object], message: str
) -> None:
    source = ARCHITECTURES["efficientformer"]
    full = WidthPlan.full(source)
    given = kept if isinstance(kept, BlockPlan) else replace(full.blocks[block], **kept)
    with pytest.raises(PruneError, match=message):
        with_block(full, block, given).check(source)


def test_a_conv_stem_needs_an_even_width() -> None:
    source = ARCHITECTURES["efficientformer"]
    plan = replace(WidthPlan.full(source), embedding=((0, 1, 2), (0, 1)))
    with pytest.raises(PruneError, match=r"embedding\[0\]: must be an even number .* got 3"):
        plan.check(source)


def as_text(**changes: object) -> str:
    return json.dumps({**FULL.to_dict(), **changes})


BLOCK = FULL.to_dict()["blocks"][B0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"plan\.json: not valid JSON \(.*\); expected a width plan"),
        ("[]", r"plan\.json: must be a mapping that describes a width plan"),
        (as_text(schema="slimnas/width-plan/2"), r"reads version 1 of .*, the file has version 2"),
        (as_text(schema="slimnas/architecture/1"), r"schema: must be 'slimnas/width-plan/1' for"),
        (as_text(blocks={B0: {**BLOCK, "ffn": [0, 1.5]}}), r"ffn\[1\]: must be a whole number"),
        (as_text(blocks={B0: {**BLOCK, "ffn": [-1]}}), r"ffn\[0\]: must be at least 0, got -1"),
        (as_text(blocks={B0: {**BLOCK, "fnn": []}}), r"unknown key 'fnn' \(did you mean 'ffn'\?\)"),
        (as_text(blocks={B0: {"heads": []}}), r"blocks\.stages\.0\.blocks\.0\.qk: missing"),
        (as_text(source=3), r"source: .*text"),
    ],
)
def test_damaged_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        WidthPlan.load(tmp_path / "plan.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.json: no such file; expected a width plan"):
        WidthPlan.load(tmp_path / "none.json")
