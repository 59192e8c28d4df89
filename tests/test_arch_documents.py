"""Documents that are wrong: one clear line for every fault, with file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slimnas.arch.architecture import Architecture
from slimnas.arch.documents import load_json, schema_of
from slimnas.arch.space import SearchSpace
from slimnas.errors import RunFolderError, SpecError

GOOD = """schema: slimnas/architecture/1
name: good
input: {channels: 3, resolution: 32}
stem: {type: conv_stem, width: 16}
stages:
- {width: 16, blocks: [{type: mb4d, repeat: 2}]}
- {width: 24, downsample: {type: conv3x3}, blocks: [{type: mb3d, heads: 2}]}
head: {type: linear, classes: 10}
"""
DOWN = "downsample: {type: conv3x3}, "
SIDES = "input.resolution: must be a side in pixels or [height, width]; got "

# What is replaced, by what, and the whole message after the file's name.
FAULTS = {
    "unknown key at the top": (
        "head:",
        "heads:",
        "unknown key 'heads' (did you mean 'head'?); known keys: name, input, stem, stages, "
        "head, provenance",
    ),
    "unknown key in the input": (
        "channels:",
        "channel:",
        "input: unknown key 'channel' (did you mean 'channels'?); known keys: channels, resolution",
    ),
    "unknown key in the stem": (
        "width: 16}",
        "widht: 16}",
        "stem: unknown key 'widht' (did you mean 'width'?); known keys: type, width, act",
    ),
    "unknown key in a stage": (
        "blocks: [{type: mb3d",
        "block: [{type: mb3d",
        "stages[1]: unknown key 'block' (did you mean 'blocks'?); "
        "known keys: width, downsample, blocks",
    ),
    "unknown key in a block": (
        "repeat: 2",
        "repeats: 2",
        "stages[0].blocks[0]: unknown key 'repeats' (did you mean 'repeat'?); "
        "known keys: type, ffn_dim, repeat",
    ),
    "unknown key unlike any": (
        "repeat: 2",
        "zzz: 2",
        "stages[0].blocks[0]: unknown key 'zzz'; known keys: type, ffn_dim, repeat",
    ),
    "key that is no text": (
        "classes: 10",
        "classes: 10, 3: 4",
        "head: unknown key '3'; known keys: type, classes, distilled",
    ),
    "missing key": ("name: good\n", "", "name: missing"),
    "missing key in a block's stage": ("width: 24, ", "", "stages[1].width: missing"),
    "name with a space": (
        "name: good",
        "name: no good",
        "name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'no good'",
    ),
    "name that is a number": ("name: good", "name: 12", "name: must be text, got 12"),
    "text for a number": ("width: 24", "width: wide", "stages[1].width: must be a whole number"),
    "number in quotes": ("width: 24", "width: '24'", "stages[1].width: must be a whole number"),
    "fraction": ("width: 24", "width: 24.0", "stages[1].width: must be a whole number, got 24.0"),
    "bool for a number": ("width: 24", "width: true", "stages[1].width: must be a whole number"),
    "number for a bool": (
        "classes: 10",
        "classes: 10, distilled: 1",
        "head.distilled: must be true or false, got 1",
    ),
    "infinite": ("width: 24", "width: .inf", "stages[1].width: must be a whole number, got inf"),
    "not a number": ("width: 24", "width: .nan", "stages[1].width: must be a whole number"),
    "negative": ("heads: 2", "heads: -2", "stages[1].blocks[0].heads: must be at least 1, got -2"),
    "zero": ("repeat: 2", "repeat: 0", "stages[0].blocks[0].repeat: must be at least 1, got 0"),
    "too many": (
        "repeat: 2",
        "repeat: 1000001",
        "stages[0].blocks[0].repeat: must be at most 1000000, got 1000001",
    ),
    "nothing": ("classes: 10", "classes:", "head.classes: must be a whole number, got None"),
    "no such block": (
        "mb4d",
        "mb5d",
        "stages[0].blocks[0].type: must be one of 'mb4d', 'mb3d', 'vit', 'swin', 'conv_ffn', "
        "'hilo', 'efficientvit', 'v2_ffn', 'v2_attention', 'mhsa', 'window', 'sra', "
        "'linear_sra', 'tmsa', 'lka', 'cga', 'strided', 'pool', got 'mb5d' (did you mean 'mb4d'?)",
    ),
    "block without type": ("type: mb4d, ", "", "stages[0].blocks[0].type: missing"),
    "no such stem": (
        "conv_stem",
        "conv_stm",
        "stem.type: must be one of 'conv_stem', 'vit_stem', 'swin_stem', 'efficientvit_stem', "
        "got 'conv_stm' (did you mean 'conv_stem'?)",
    ),
    "block that is a number": ("[{type: mb4d, repeat: 2}]", "[3]", "stages[0].blocks[0]: must be"),
    "blocks that are no list": ("[{type: mb4d, repeat: 2}]", "3", "stages[0].blocks: must be a l"),
    "no blocks": ("[{type: mb4d, repeat: 2}]", "[]", "stages[0].blocks: must have at least 1 "),
    "stage that is text": (
        "- {width: 16, blocks: [{type: mb4d, repeat: 2}]}",
        "- first",
        "stages[0]: must be a mapping, got 'first'",
    ),
    "odd stem": (
        "conv_stem, width: 16",
        "conv_stem, width: 15",
        "stem.width: must be even, its first convolution has half of it; got 15",
    ),
    "widths that do not connect": (
        DOWN,
        "",
        "stages[1].width: must be 16, the width before it, or the stage needs a downsample; got 24",
    ),
    "three sides": ("resolution: 32", "resolution: [1, 2, 3]", SIDES + "[1, 2, 3]"),
    "negative side": ("resolution: 32", "resolution: [32, -1]", SIDES + "[32, -1]"),
    "bool as side": ("resolution: 32", "resolution: true", SIDES + "True"),
    "side in words": ("resolution: 32", "resolution: small", SIDES + "'small'"),
    "huge side": ("resolution: 32", "resolution: 1000001", SIDES + "1000001"),
    "no schema": (
        "schema: slimnas/architecture/1\n",
        "",
        "schema: missing; an architecture begins with 'schema: slimnas/architecture/1'",
    ),
    "another schema": (
        "slimnas/architecture/1",
        "slimnas/search-space/1",
        "schema: must be 'slimnas/architecture/1' for an architecture, "
        "got 'slimnas/search-space/1'",
    ),
    "another version": (
        "slimnas/architecture/1",
        "slimnas/architecture/2",
        "schema: this slimnas reads version 1 of slimnas/architecture, the file has version 2; "
        "use the slimnas that wrote it",
    ),
    "key given twice": (
        "head:",
        "name: again\nhead:",
        "not valid YAML: line 8, column 1: key 'name' is given twice",
    ),
    "inner key given twice": (
        "heads: 2",
        "heads: 2, heads: 3",
        "not valid YAML: line 7, column 76: key 'heads' is given twice",
    ),
    "impossible date": ("name: good", "name: 2020-13-45", "not valid YAML: month must be in"),
    "python object": ("good", "!!python/object:os.x {}", "not valid YAML: line 2, column 7: could"),
    "empty tagged number": ("name: good", "name: !!int ''", "not valid YAML: "),
    "number of 5000 digits": ("width: 24", "width: " + "9" * 5000, "not valid YAML: Exceeds"),
    "provenance of itself": (
        "head:",
        "provenance: &a {b: *a}\nhead:",
        "provenance: Circular reference detected",
    ),
    "provenance of bytes": (
        "head:",
        "provenance: {b: !!binary aGk=}\nhead:",
        "provenance: must hold plain values (got a bytes)",
    ),
}


def refused(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        Architecture.from_yaml(text, source="net.yaml")
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_per_fault(fault: str) -> None:
    old, new, expected = FAULTS[fault]
    assert GOOD.count(old) >= 1, "the good text must hold what is replaced"
    message = refused(GOOD.replace(old, new, 1))
    assert message.startswith(f"net.yaml: {expected}")
    assert "\n" not in message


def test_the_good_text_is_good() -> None:
    assert Architecture.from_yaml(GOOD).depths == (2, 1)
    assert len(FAULTS) == 47


def test_two_faults_two_lines() -> None:
    message = refused(GOOD.replace("width: 24", "width: 0").replace("classes: 10", "classes: x"))
    assert message.splitlines() == [
        "net.yaml: stages[1].width: must be at least 1, got 0",
        "net.yaml: head.classes: must be a whole number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "net.yaml: must be a mapping that describes an architecture, got an empty file"),
        ("# only a comment\n", "net.yaml: must be a mapping .*, got an empty file"),
        ("- schema: 1\n", "net.yaml: must be a mapping that describes an architecture, got a list"),
        ("hello", "net.yaml: must be a mapping that describes an architecture, got a str"),
        ("[" * 3000, "net.yaml: not valid YAML: maximum recursion depth"),
        ("a: 1\n---\nb: 2\n", "net.yaml: not valid YAML: "),
        ("a: \x00", "net.yaml: not valid YAML: "),
    ],
)
def test_what_is_no_mapping(text: str, expected: str) -> None:
    assert re.match(expected, refused(text))


def test_truncated_at_every_byte() -> None:
    whole = Architecture.from_yaml(GOOD)
    assert Architecture.from_yaml(GOOD[:-1]) == whole  # without the last line feed
    for length in range(len(GOOD) - 1):
        assert refused(GOOD[:length]).startswith("net.yaml: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", r"x\.json: not valid JSON \(.*\); expected a thing"),
        ("[" * 100_000, r"x\.json: not valid JSON \(maximum recursion depth.*; expected a thing"),
        ("[]", r"x\.json: must be a mapping that describes a thing, got a list"),
        ("null", r"x\.json: must be a mapping that describes a thing"),
    ],
)
def test_json_that_is_no_mapping(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SpecError, match=expected):
        load_json(tmp_path / "x.json", "a thing")


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ('{"schema": "slimnas/x/1"}', "slimnas/x/1"),
        ("schema: slimnas/x/1\na: 1\n", "slimnas/x/1"),
        ("a: 1", None),
        ("- 1", None),
        ("", None),
    ],
)
def test_the_schema_of_any_document(text: str, schema: object, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert schema_of(tmp_path / "x.json", "a thing") == schema


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    for path, reason in [
        (binary, "not UTF-8 text; expected an architecture"),
        (tmp_path / "none.yaml", "no such file; expected an architecture"),
        (tmp_path, "cannot be read (Is a directory); expected an architecture"),
    ]:
        with pytest.raises(SpecError, match=re.escape(f"{path}: {reason}")):
            Architecture.load(path)


def test_a_file_that_cannot_be_written_is_not_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written .*choose another place"):
        Architecture.from_yaml(GOOD).save(tmp_path / "file" / "net.yaml")
    (tmp_path / "net.yaml").mkdir()
    with pytest.raises(RunFolderError, match="cannot be written"):
        Architecture.from_yaml(GOOD).save(tmp_path / "net.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "net.yaml"]


SPACE = """schema: slimnas/search-space/1
name: good
stages:
- {width: {min: 16, max: 32}, slots: 2, choices: [mb4d, identity]}
- {width: {min: 16, max: 48}, slots: 3, choices: [mb4d, mb3d, identity], downsample: {}}
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("slots: 2", "slot: 2", r"stages\[0\]: unknown key 'slot' \(did you mean 'slots'\?\)"),
        ("min: 16, max: 32", "min: 16, max: 40", r"stages\[0\]\.width: min must be at most max"),
        ("min: 16, max: 32", "min: 64, max: 32", r"stages\[0\]\.width: .*; got min 64, max 32"),
        ("min: 16, max: 32", "min: 15, max: 31", r"stages\[0\]\.width: must be even.*got 15"),
        ("slots: 2", "slots: 2, min_depth: 3", r"stages\[0\]: min_depth: must be at most slots"),
        ("slots: 2", "slots: 2, min_depth: 0", r"stages\[0\]\.min_depth: must be at least 1"),
        ("mb4d, identity]}", "identity]}", r"stages\[0\]: choices: at least one must be a block"),
        ("mb4d, identity]}", "mb4d, mb4d]}", r"stages\[0\]: choices: each may be listed once"),
        ("mb4d, identity]}", "mb4d]}", r"min_depth: must equal slots \(2\) where no slot may be"),
        ("mb4d, identity]}", "mb2d]}", r"stages\[0\]\.choices\[0\]: .*'mb2d' \(did you mean"),
        (", downsample: {}", "", r"stages\[1\]\.downsample: missing"),
        ("max: 32", "max: 64", r"limits\.monotone_widths: the stages' width\.max must not fall"),
        ("[mb4d, identity]}", "[mb3d, identity]}", None),
        ("name: good", "name: good\nlimits: {attention_last: 1}", "must be true or false, got 1"),
    ],
)
def test_faults_of_spaces(old: str, new: str, expected: str | None) -> None:
    text = SPACE.replace(old, new, 1)
    if expected is None:  # a stage of attention alone is fine while attention can follow it
        SearchSpace.from_yaml(text)
        text = text.replace("[mb4d, mb3d, identity]", "[mb4d, identity]")
        expected = r"limits\.attention_last: cannot hold, a stage that only offers mb3d"
    with pytest.raises(SpecError, match=expected) as caught:
        SearchSpace.from_yaml(text, source="space.yaml")
    assert str(caught.value).startswith("space.yaml: ")
    assert "\n" not in str(caught.value)
