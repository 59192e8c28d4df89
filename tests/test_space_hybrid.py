"""Search spaces whose slots choose from any blocks: templates, faults, and what is in them."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest
from hybrid_cases import EVERY, EVERY_CHOICE, HYBRID, every_space, hybrid_space

from slimnas.arch.architecture import Architecture
from slimnas.arch.cost import cost
from slimnas.arch.space import SearchSpace, Selection
from slimnas.arch.templates import TITLES, is_attention
from slimnas.errors import MissingLatencyError, SpecError
from slimnas.latency.devices import find_device
from slimnas.latency.estimate import estimate, require_prices

ATTENTION = {"mb3d", "hilo", "cga"}

# Of the spaces as an earlier slimnas wrote them: a run folder keeps the digest of its space, and a
# table's journal the random networks. New kinds of blocks must not change either.
DIGESTS = {
    "efficientformer": ("b95329ec0eadc539", "06f509664a358d09"),
    "efficientformer_small": ("bffd5f86f03e92bb", "602626a2ac45e761"),
    "efficientformer_tiny": ("ecbea3fc5673ffe1", "fe3af648a1df2f6d"),
}


@pytest.mark.parametrize("name", DIGESTS)
def test_spaces_of_mb4d_and_mb3d_stay_what_they_were(name: str) -> None:
    space = SearchSpace.load(name)
    drawn = repr([space.random(random.Random(seed)) for seed in range(20)])
    found = tuple(
        hashlib.sha256(text.encode()).hexdigest()[:16]
        for text in (space.without_recipe().to_yaml(), drawn)
    )
    assert found == DIGESTS[name]
    assert space.counts_attention


def test_every_choice_is_a_block_with_the_template_s_fields() -> None:
    space = every_space()
    assert {*EVERY_CHOICE, "identity"} == set(TITLES)
    expected = {
        "window": {"type": "window", "window": 3, "shift": 0, "position_bias": False},
        "shifted_window": {"type": "window", "window": 3, "shift": 1, "position_bias": True},
        "sra": {"reduction": 2},
        "linear_sra": {"pooled": 3, "ffn": "conv"},
        "tmsa": {"part": "global", "window": 7},
        "hilo": {"heads": 4, "lo_heads": 3, "window": 3, "ffn": "conv"},
        "cga": {"heads": 8, "qk_dim": 3, "kernels": (3,), "window": 3},
    }
    headed = {"mb3d", "mhsa", "window", "shifted_window", "sra", "linear_sra", "tmsa", "strided"}
    for choice in EVERY_CHOICE:
        for width in (8, 24):
            block = space.blocks.block(choice, width)
            wanted = {"type": choice, "ffn_dim": 2 * width, "repeat": 1, **expected.get(choice, {})}
            if choice in headed:
                wanted |= {"heads": 2, "qk_dim": 3, "v_dim": 5}
            assert block.model_dump(include=set(wanted)) == wanted
    with pytest.raises(ValueError, match="'identity' is not a block"):
        space.blocks.block("identity", 8)


def test_defaults_are_written_out() -> None:
    text = HYBRID.replace(
        "  cga: {heads: 2, qk_dim: 4, kernels: [5, 3], window: 4, ffn_ratio: 2}\n", ""
    )
    text = text.replace("cga, mb3d", "conv_ffn, mb3d")
    space = SearchSpace.from_yaml(text)
    assert "conv_ffn: {ffn_ratio: 4}" in space.to_yaml()
    assert "cga" not in space.to_yaml()
    assert "null" not in str(space.model_dump(mode="json")["blocks"])
    assert SearchSpace.from_yaml(space.to_yaml()) == space
    assert SearchSpace.from_yaml(space.to_yaml()).to_yaml() == space.to_yaml()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "mb4d, hilo",
            "mb4d, hulo",
            r"stages\[1\]\.choices\[1\]: .*'hulo' \(did you mean 'hilo'\?\)",
        ),
        ("  hilo: {", "  hillo: {", r"blocks: unknown key 'hillo' \(did you mean 'hilo'\?\)"),
        ("lo_heads: 3", "low_heads: 3", r"blocks\.hilo: unknown key 'low_heads' \(did you mean"),
        ("lo_heads: 3", "lo_heads: 5", r"blocks\.hilo: .*lo_heads must be at most heads, 4, got 5"),
        ("lo_heads: 3", "lo_heads: x", r"blocks\.hilo\.lo_heads: must be a whole number, got 'x'"),
        ("hilo: {heads: 4, ", "hilo: {", r"blocks\.hilo\.heads: missing"),
        (
            "  hilo: {heads: 4, lo_heads: 3, window: 2, ffn_ratio: 2}\n",
            "",
            "blocks: hilo: missing; a slot may choose it, and it needs heads, lo_heads",
        ),
        ("ffn_ratio: 2}\nlimits", "ffn_dim: 64}\nlimits", r"blocks\.cga: unknown key 'ffn_dim'"),
        ("kernels: [5, 3]", "kernels: [5, 4]", r"blocks\.cga\.kernels\[1\]: must be odd"),
        ("kernels: [5, 3]", "kernels: [5, 3, 3]", "blocks.cga: .*one per head, which are 2; got 3"),
        (
            "heads: 4, lo_heads: 3",
            "heads: 12, lo_heads: 9",
            r"stages\[1\]\.width: must be a multiple of 12, so that every head of hilo and cga "
            "keeps as many channels; got 16",
        ),
        (
            "heads: 2, qk_dim: 4, kernels",
            "heads: 3, qk_dim: 4, kernels",
            r"stages\[1\]\.width: must be a multiple of 12, so that every head of hilo and cga",
        ),
    ],
)
def test_faults_are_one_clear_line(old: str, new: str, fault: str) -> None:
    assert old in HYBRID
    with pytest.raises(SpecError, match=f"<text>: {fault}") as caught:
        SearchSpace.from_yaml(HYBRID.replace(old, new))
    assert "\n" not in str(caught.value)


def test_head_dimensions_must_be_fixed() -> None:
    text = EVERY.replace("mhsa: {ffn_ratio: 2, heads: 2, qk_dim: 3, v_dim: 5}", "mhsa: {heads: 2}")
    with pytest.raises(SpecError, match=r"blocks\.mhsa\.qk_dim: missing") as caught:
        SearchSpace.from_yaml(text)
    assert "blocks.mhsa.v_dim: missing" in str(caught.value)


@pytest.mark.parametrize("place", ["input: {channels: 3, resolution", "supernet: {resolution"])
def test_a_map_that_a_block_cannot_take(place: str) -> None:
    """Deployment or training, whichever is too small."""
    text = EVERY.replace("reduction: 2", "reduction: 4").replace(f"{place}: 32", f"{place}: 16")
    fault = r"blocks\.sra: in stages\[1\] at width 16, on a map of 2x2: reduction must be at most"
    with pytest.raises(SpecError, match=fault):
        SearchSpace.from_yaml(text)


def is_legal(selection: Selection, *, last: bool) -> bool:
    """The rules of the micro space, written out; its stages offer 2 and 4 kinds of blocks."""
    sequence = [c for slots in selection.paths for c in slots if c != "identity"]
    tail = list(itertools.dropwhile(lambda c: c not in ATTENTION, sequence))
    return (
        all(any(c != "identity" for c in slots) for slots in selection.paths)
        and selection.widths[0] <= selection.widths[1]
        and (not last or set(tail) <= ATTENTION)
    )


@pytest.mark.parametrize(("last", "count"), [(False, 5 * 8 * 24), (True, 5 * 8 * 21)])
def test_selections_are_all(last: bool, count: int) -> None:
    """Stage 1: 3 x 3 - 1 paths; stage 2: 5 x 5 - 1, of which 3 have attention before MB4D."""
    space = hybrid_space(last=last)
    widths = itertools.product((16, 32), (16, 32, 48))
    first = itertools.product(("mb4d", "pool", "identity"), repeat=2)
    second = itertools.product(("mb4d", "hilo", "cga", "mb3d", "identity"), repeat=2)
    every = {
        selection
        for w, *paths in itertools.product(widths, first, second)
        if is_legal(selection := Selection(w, tuple(paths)), last=last)
    }
    listed = list(space.selections())
    assert set(listed) == every
    assert len(listed) == len(every) == count
    for selection in every:
        assert space.fault(selection) is None
    assert space.counts_attention is False


@pytest.mark.parametrize("last", [False, True])
def test_random_reaches_every_architecture(last: bool) -> None:
    space = hybrid_space(last=last)
    rng = random.Random(0)
    drawn = {space.random(rng) for _ in range(12000)}
    assert all(is_legal(selection, last=last) for selection in drawn)
    kept = {tuple(tuple(c for c in p if c != "identity") for p in s.paths) for s in drawn}
    every = {
        tuple(tuple(c for c in p if c != "identity") for p in s.paths) for s in space.selections()
    }
    assert kept == every


def test_attention_last_names_its_blocks() -> None:
    space = hybrid_space(last=True)
    wrong = Selection((16, 16), (("mb4d", "identity"), ("cga", "mb4d")))
    with pytest.raises(SpecError, match="hilo/cga/mb3d blocks must be the last blocks, contiguous"):
        space.architecture(wrong)
    assert hybrid_space().fault(wrong) is None
    fine = Selection((16, 16), (("mb4d", "pool"), ("cga", "hilo")))
    assert space.fault(fine) is None


def test_select_tells_windows_from_shifted_windows() -> None:
    space = every_space()
    compared = 0
    for seed in range(40):
        selection = space.random(random.Random(seed))
        architecture = space.architecture(selection)
        again = Architecture.from_yaml(architecture.to_yaml())
        back = space.select(again)
        assert space.architecture(back) == architecture
        for given, found in zip(selection.paths, back.paths, strict=True):
            assert [c for c in given if c != "identity"] == [c for c in found if c != "identity"]
            compared += sum("window" in c for c in found)
    assert compared > 8


@pytest.mark.parametrize("last", [False, True])
def test_largest_and_every_block(last: bool) -> None:
    space = hybrid_space(last=last)
    assert space.attention_counts() == (0, 1, 2)
    for count in space.attention_counts():
        selection = space.largest(count)
        assert is_legal(selection, last=last)
        assert sum(is_attention(c) for *_, c in selection.active()) == count
        assert selection.widths == (32, 48)
    with pytest.raises(SpecError, match="cannot have 3 attention blocks"):
        space.largest(3)
    run = {
        (i, j, choice) for selection in space.every_block() for i, j, choice in selection.active()
    }
    assert len(run) == 2 * 2 + 2 * 4


def test_free_stages_may_end_without_attention() -> None:
    text = HYBRID.replace("[mb4d, pool, identity]", "[mb3d, identity]").replace(
        "[mb4d, hilo, cga, mb3d, identity]", "[mb4d, identity]"
    )
    space = SearchSpace.from_yaml(text)
    assert space.attention_counts() == (2,)
    assert space.smallest()
    with pytest.raises(SpecError, match=r"limits\.attention_last: cannot hold.* only offers mb3d"):
        SearchSpace.from_yaml(text.replace("last: false", "last: true"))


@pytest.mark.parametrize("last", [False, True])
def test_variants_swap_blocks_that_are_alike(last: bool) -> None:
    space = hybrid_space(last=last)
    selection = Selection((16, 32), (("mb4d", "identity"), ("mb4d", "hilo")))
    first = [s.paths[0] for s in space.variants(selection, 0)]
    assert sorted(first) == [("mb4d", "identity"), ("pool", "identity")]
    second = {s.paths[1] for s in space.variants(selection, 1)}
    kinds = ("mb4d", "hilo", "cga", "mb3d")
    if last:
        assert second == {("mb4d", kind) for kind in kinds[1:]}
    else:
        assert second == set(itertools.product(kinds, repeat=2))
    assert all(space.fault(s) is None for s in space.variants(selection, 1))


def test_hybrid_tiny_is_what_it_says() -> None:
    space = SearchSpace.load("hybrid_tiny")
    assert [stage.choices for stage in space.stages[2:]] == [
        ("mb4d", "hilo", "cga", "mb3d", "identity")
    ] * 2
    assert not space.limits.attention_last
    largest = [cost(space.architecture(s)).macs for s in space.every_block()]
    smallest = cost(space.architecture(space.smallest()[0])).macs
    assert min(largest) > 10 * smallest


def test_shipped_tables_say_what_to_measure() -> None:
    space = SearchSpace.load("hybrid_tiny")
    table = find_device("iphone12")
    remedy = (
        "measure a table of the search space with 'slimnas latency build --space {} --device NAME'"
    )
    with pytest.raises(MissingLatencyError) as caught:
        require_prices(space, table)
    assert str(caught.value).endswith(remedy.format("hybrid_tiny"))
    assert "\n" not in str(caught.value)
    own = space.model_copy(update={"name": "mine"})
    with pytest.raises(MissingLatencyError) as caught:
        require_prices(own, table)
    assert str(caught.value).endswith(remedy.format("FILE"))
    with pytest.raises(MissingLatencyError) as caught:
        estimate(space.architecture(space.largest(1)), table)
    assert str(caught.value).endswith(remedy.format("SPACE"))
