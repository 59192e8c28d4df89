"""Search spaces: what is in them, counted and drawn, against written-out rules."""

from __future__ import annotations

import itertools
import random

import pytest
from micro import ARCHITECTURES, MICRO, micro_space

from slimnas.arch.architecture import Architecture
from slimnas.arch.space import SearchSpace, Selection, shipped_spaces
from slimnas.errors import SpecError
from slimnas.zoo.registry import get

NAMES = shipped_spaces()
EFFICIENTFORMER = [name for name in NAMES if name.startswith("efficientformer")]


def is_legal(space: SearchSpace, selection: Selection) -> bool:
    """The rules again, written out over the sequence of blocks."""
    sequence = [c for slots in selection.paths for c in slots if c != "identity"]
    tail = list(itertools.dropwhile(lambda c: c != "mb3d", sequence))
    widths = selection.widths
    return (
        len(widths) == len(selection.paths) == len(space.stages)
        and all(
            stage.width.min <= width <= stage.width.max
            and (width - stage.width.min) % stage.width.step == 0
            and len(slots) == stage.slots
            and all(choice in stage.choices for choice in slots)
            and stage.slots - slots.count("identity") >= stage.min_depth
            for stage, width, slots in zip(space.stages, widths, selection.paths, strict=True)
        )
        and (not space.limits.attention_last or set(tail) <= {"mb3d"})
        and (not space.limits.monotone_widths or all(a <= b for a, b in itertools.pairwise(widths)))
    )


def blocks_of(selection: Selection) -> list[list[str]]:
    return [[c for c in slots if c != "identity"] for slots in selection.paths]


@pytest.mark.parametrize("name", NAMES)
def test_random_is_legal_and_comes_back(name: str) -> None:
    space = SearchSpace.load(name)
    seen = set()
    for seed in range(60):
        selection = space.random(random.Random(seed))
        assert is_legal(space, selection)
        assert space.fault(selection) is None
        assert selection == space.random(random.Random(seed))
        architecture = space.architecture(selection, name=f"random_{seed}")
        back = space.select(architecture)
        assert back.widths == selection.widths
        assert blocks_of(back) == blocks_of(selection)
        for slots in back.paths:  # the blocks lie in the first slots
            assert "identity" not in slots[: sum(c != "identity" for c in slots)]
        assert space.architecture(back) == architecture
        assert architecture.stem.width == selection.widths[0]
        seen.add(architecture.digest)
    assert len(seen) > 55


def test_random_reaches_every_architecture_of_a_small_space() -> None:
    space = micro_space()
    rng = random.Random(0)
    drawn = {space.architecture(space.random(rng)).digest for _ in range(4000)}
    every = {space.architecture(selection).digest for selection in space.selections()}
    assert drawn == every


def test_random_without_any_attention_and_without_limits() -> None:
    plain = SearchSpace.from_yaml(MICRO.replace("mb4d, mb3d, identity", "mb4d, identity"))
    free = SearchSpace.from_yaml(
        MICRO.replace("name: micro", "name: micro\nlimits: {monotone_widths: false}")
    )
    falling = 0
    for seed in range(50):
        assert is_legal(plain, plain.random(random.Random(seed)))
        selection = free.random(random.Random(seed))
        assert is_legal(free, selection)
        falling += selection.widths[0] > selection.widths[1]
    assert falling > 5


def brute_force(space: SearchSpace) -> set[Selection]:
    widths = [range(s.width.min, s.width.max + 1, s.width.step) for s in space.stages]
    paths = [itertools.product(("mb4d", "mb3d", "identity"), repeat=s.slots) for s in space.stages]
    return {
        selection
        for chosen in itertools.product(itertools.product(*widths), itertools.product(*paths))
        if is_legal(space, selection := Selection(*chosen))
    }


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ("", ARCHITECTURES),
        ("limits: {monotone_widths: false}", ARCHITECTURES // 6 * 9),
        ("limits: {attention_last: false}", 6 * 3 * (27 - 1)),
    ],
)
def test_selections_are_all_and_each_once(limits: str, count: int) -> None:
    space = SearchSpace.from_yaml(MICRO.replace("name: micro", f"name: micro\n{limits}"))
    listed = list(space.selections())
    assert len(listed) == len(set(listed)) == count
    assert set(listed) == brute_force(space)


def test_min_depth() -> None:
    space = SearchSpace.from_yaml(MICRO.replace("slots: 3", "slots: 3\n  min_depth: 2"))
    listed = list(space.selections())
    assert len(listed) == 6 * 3 * (9 + 4)
    assert {len(blocks_of(s)[1]) for s in listed} == {2, 3}
    assert all(sum(map(len, blocks_of(s))) == 3 for s in space.smallest())


@pytest.mark.parametrize("name", [n for n in EFFICIENTFORMER if not n.endswith("_micro")])
def test_l1_is_inside(name: str) -> None:
    space = SearchSpace.load(name)
    l1 = get("efficientformer_l1").architecture
    selection = space.select(l1)
    assert selection.widths == (48, 96, 224, 448)
    assert [len(blocks) for blocks in blocks_of(selection)] == [3, 2, 6, 4]
    built = space.architecture(selection)
    assert built.with_head(distilled=True) == l1


def test_largest_of_each_space_is_the_published_one() -> None:
    for name, model in [("efficientformer", "l7"), ("efficientformer_small", "l3")]:
        space = SearchSpace.load(name)
        published = get(f"efficientformer_{model}").architecture
        largest = space.architecture(space.largest(published.count("mb3d")))
        assert largest.with_head(distilled=True) == published


def test_largest_and_attention_counts() -> None:
    space = SearchSpace.load("efficientformer_tiny")
    assert space.attention_counts() == tuple(range(5 + 8 + 1))
    for count in space.attention_counts():
        selection = space.largest(count)
        assert is_legal(space, selection)
        sequence = [choice for blocks in blocks_of(selection) for choice in blocks]
        assert sequence == ["mb4d"] * (20 - count) + ["mb3d"] * count
        assert selection.widths == (64, 128, 256, 512)
    with pytest.raises(
        SpecError, match="efficientformer_tiny: cannot have 14 MB3D blocks: stage 1"
    ):
        space.largest(14)
    with pytest.raises(SpecError, match="cannot have 21 MB3D blocks: it has 20 slots"):
        space.largest(21)


def test_spaces_that_force_attention() -> None:
    last = MICRO.replace("mb4d, mb3d, identity", "mb3d, identity")
    space = SearchSpace.from_yaml(last)
    assert space.attention_counts() == (3,)
    assert [blocks_of(s) for s in space.smallest()] == [[["mb4d"], ["mb3d"]]]
    both = SearchSpace.from_yaml(MICRO.replace("[mb4d, identity]", "[mb3d, identity]"))
    assert both.attention_counts() == (5,)
    assert [blocks_of(s) for s in both.smallest()] == [[["mb3d"], ["mb3d"]]]
    with pytest.raises(
        SpecError, match="cannot have 4 MB3D blocks: stages that offer nothing else"
    ):
        both.largest(4)


@pytest.mark.parametrize("name", [*EFFICIENTFORMER, "micro"])
def test_smallest(name: str) -> None:
    space = micro_space() if name == "micro" else SearchSpace.load(name)
    smallest = space.smallest()
    offers = sum("mb3d" in stage.choices for stage in space.stages)
    assert len(smallest) == offers + 1
    for count, selection in enumerate(smallest):
        assert is_legal(space, selection)
        assert selection.widths == tuple(stage.width.min for stage in space.stages)
        assert all(len(blocks) == 1 for blocks in blocks_of(selection))
        assert sum(blocks == ["mb3d"] for blocks in blocks_of(selection)) == count


CONV, ATTN, NONE = "mb4d", "mb3d", "identity"


@pytest.mark.parametrize(
    ("widths", "paths", "fault"),
    [
        ((16, 16), ((CONV, NONE), (CONV, NONE, NONE)), None),
        ((16, 16), ((NONE, CONV), (NONE, CONV, ATTN)), None),
        (
            (24, 32),
            ((CONV, NONE), (CONV, NONE, NONE)),
            r"stage 0: width 24 is not one of \[16, 32, 48\]",
        ),
        (
            (32, 16),
            ((CONV, NONE), (CONV, NONE, NONE)),
            r"widths \[32, 16\] must not fall from stage to stage",
        ),
        ((16, 16), ((NONE, NONE), (CONV, NONE, NONE)), "stage 0: depth 0 is below min_depth 1"),
        (
            (16, 16),
            ((ATTN, NONE), (ATTN, NONE, NONE)),
            r"stage 0: \['mb3d', 'identity'\] must be 2 of",
        ),
        (
            (16, 16),
            ((CONV, NONE, NONE), (CONV, NONE, NONE)),
            r"stage 0: \[.*\] must be 2 of \['mb4d', 'identity'\]",
        ),
        (
            (16, 16),
            ((CONV, NONE), (ATTN, NONE, CONV)),
            "mb3d blocks must be the last blocks, contiguous",
        ),
        ((16,), ((CONV, NONE),), "1 widths and 1 stages of paths, the space has 2 stages"),
        (
            (16, 16, 16),
            ((CONV, NONE), (CONV, NONE, NONE)),
            "3 widths and 2 stages of paths, the space has 2",
        ),
    ],
)
def test_faults(
    widths: tuple[int, ...], paths: tuple[tuple[str, ...], ...], fault: str | None
) -> None:
    space, selection = micro_space(), Selection(widths, paths)
    assert is_legal(space, selection) is (fault is None)
    if fault is None:
        assert space.fault(selection) is None
        return
    with pytest.raises(SpecError, match=f"^search space micro: {fault}"):
        space.architecture(selection)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("width: 48}", "width: 48, act: gelu}", "its stem is ConvStem"),
        ("width: 224,", "width: 230,", "stage 2: width 230 is not one of"),
        ("{type: mb3d}", "{type: mb3d, heads: 4}", r"stages\[3\].blocks\[3\] is MB3D"),
        ("repeat: 2", "repeat: 2, ffn_dim: 100", r"stages\[1\].blocks\[0\] is MB4D"),
        ("repeat: 2", "repeat: 9", r"stage 1: .* must be 3 of \['mb4d', 'identity'\]"),
        ("{type: mb3d}", "{type: mb3d}, {type: mb4d}", "mb3d blocks must be the last blocks"),
        ("{type: mb4d, repeat: 2}", "{type: mb3d}", r"stages\[1\].blocks\[0\] is MB3D"),
    ],
)
def test_architectures_outside(old: str, new: str, fault: str) -> None:
    text = (
        "schema: slimnas/architecture/1\nname: near\nstem: {width: 48}\nstages:\n"
        "- {width: 48, blocks: [{type: mb4d, repeat: 3}]}\n"
        "- {width: 96, downsample: {}, blocks: [{type: mb4d, repeat: 2}]}\n"
        "- {width: 224, downsample: {}, blocks: [{type: mb4d, repeat: 6}]}\n"
        "- {width: 448, downsample: {}, blocks: [{type: mb4d, repeat: 3}, {type: mb3d}]}\n"
        "head: {classes: 1000}\n"
    )
    space = SearchSpace.load("efficientformer_tiny")
    space.select(Architecture.from_yaml(text))
    assert old in text
    outside = Architecture.from_yaml(text.replace(old, new, 1))
    with pytest.raises(
        SpecError, match=f"near is outside search space efficientformer_tiny: {fault}"
    ):
        space.select(outside)


def test_other_numbers_of_stages() -> None:
    l1 = get("efficientformer_l1").architecture
    with pytest.raises(SpecError, match="it has 4 stages, not 2"):
        micro_space().select(l1)


def test_spaces_by_name() -> None:
    with pytest.raises(SpecError, match=r"'efficientformer_tini' does not exist \(did you mean "):
        SearchSpace.load("efficientformer_tini")
    with pytest.raises(SpecError, match=r"missing\.yaml: no such file; expected a search space"):
        SearchSpace.load("missing.yaml")


def test_with_classes_changes_the_head_alone() -> None:
    space = SearchSpace.load("efficientformer_tiny")
    changed = space.with_classes(7)
    assert changed.head.classes == 7
    assert changed.with_classes(1000) == space
