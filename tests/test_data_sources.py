from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slimnas.data import load_source
from slimnas.data.decode import decode
from slimnas.errors import DataError


def encoded(
    colour: tuple[int, int, int], suffix: str = "png", size: tuple[int, int] = (8, 8)
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def make_folder(root: Path, classes: dict[str, int]) -> Path:
    """Write PNGs; image i of class c has the colour (10 * c, i, 0)."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index:03d}.png").write_bytes(encoded((10 * number, index, 0)))
    return root


def write_parquet(path: Path, labels: list, *, image="image", label="label", names=None) -> Path:
    import datasets

    kind = datasets.ClassLabel(names=names) if names else None
    rows = {
        image: [
            {"bytes": encoded((index, 0, 0)), "path": f"{index}.png"}
            for index in range(len(labels))
        ],
        label: labels,
    }
    table = datasets.Dataset.from_dict(rows)
    if names:
        table = table.cast_column(label, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.with_format("arrow").to_parquet(path)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def reds(table) -> list[int]:
    return [int(decode(raw, (8, 8), 3)[0, 0, 0]) for raw in table.read(range(len(table.labels)))]


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    source = load_source("digits")
    assert len(source.train.labels) == 1797
    assert not source.flip
    assert source.test is None
    assert source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(source.train.labels, bunch.target)
    pixels = np.stack(source.train.read(range(1797)))
    np.testing.assert_allclose(pixels / 255 * 16, bunch.images, atol=0.04)


def test_names_of_sources_need_neither_torch_nor_datasets():
    code = (
        "import sys, slimnas.data; slimnas.data.load_source('digits');"
        "print(sorted({'torch', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_image_folder_reads_as_the_builder_of_datasets_does(tmp_path):
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    folder = make_folder(tmp_path / "pets", {"cat": 3, "dog": 2, "fox": 4})
    source = load_source(str(folder))
    disable_progress_bar()
    theirs = load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "c"))[
        "train"
    ]
    enable_progress_bar()
    expected = sorted(
        (theirs.features["label"].int2str(row["label"]), np.asarray(row["image"]).tobytes())
        for row in theirs
    )
    raws = source.train.read(range(9))
    found = sorted(
        (source.class_names[label], decode(raw, (8, 8), 3).transpose(1, 2, 0).tobytes())
        for raw, label in zip(raws, source.train.labels, strict=True)
    )
    assert len(expected) == 9
    assert found == expected


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_folder_with_split_folders(tmp_path, held_out):
    make_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    make_folder(tmp_path / held_out, {"cat": 1, "dog": 1})
    source = load_source(str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert source.test is not None
    assert source.test.labels.tolist() == [0, 1]


def test_a_class_may_be_called_train_or_hold_files_called_test(tmp_path):
    folder = make_folder(tmp_path, {"bus": 2, "train": 2})
    (folder / "bus" / "000.png").rename(folder / "bus" / "test_000.png")
    source = load_source(str(folder))
    assert source.class_names == ("bus", "train")
    assert source.train.labels.tolist() == [0, 0, 1, 1]


def test_folder_reads_nested_images_and_passes_over_other_files(tmp_path):
    folder = make_folder(tmp_path, {"a": 2, "b": 2})
    (folder / "a" / "deep").mkdir()
    (folder / "a" / "deep" / "x.JPG").write_bytes(encoded((9, 9, 9), "jpg"))
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "b" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    assert load_source(str(folder)).train.labels.tolist() == [0, 0, 0, 1, 1]


def test_parquet_file_glob_and_folder_give_the_same_rows(tmp_path):
    write_parquet(tmp_path / "d" / "train-0.parquet", [0, 1, 1], names=["cat", "dog"])
    write_parquet(tmp_path / "d" / "test-0.parquet", [1, 0], names=["cat", "dog"])
    cache = tmp_path / "cache"
    folder = load_source(str(tmp_path / "d"), cache_dir=cache)
    file = load_source(str(tmp_path / "d" / "train-0.parquet"), cache_dir=cache)
    globbed = load_source(str(tmp_path / "d" / "tr*.parquet"), cache_dir=cache)
    for source in (folder, file, globbed):
        assert source.class_names == ("cat", "dog")
        assert source.train.labels.tolist() == [0, 1, 1]
        assert reds(source.train) == [0, 1, 2]
    assert folder.test is not None
    assert folder.test.labels.tolist() == [1, 0]
    assert file.test is globbed.test is None


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([3, 7, 3, 10], ("3", "7", "10"), [0, 1, 0, 2]),
        (["dog", "cat", "dog", "eel"], ("cat", "dog", "eel"), [1, 0, 1, 2]),
    ],
)
def test_parquet_labels_without_class_names(tmp_path, labels, names, numbers):
    path = write_parquet(tmp_path / "x.parquet", labels)
    source = load_source(str(path), cache_dir=tmp_path / "cache")
    assert source.class_names == names
    assert source.train.labels.tolist() == numbers


def test_parquet_path_with_pattern_characters_and_repeated_class_names(tmp_path):
    import json

    import pyarrow.parquet as pq

    path = write_parquet(tmp_path / "a[1].parquet", [0, 1, 2], names=["crane", "fox", "x"])
    table = pq.read_table(path)
    info = json.loads(table.schema.metadata[b"huggingface"])
    info["info"]["features"]["label"]["names"][2] = "crane"  # as ImageNet has two cranes
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    source = load_source(str(path), cache_dir=tmp_path / "cache")
    assert source.class_names == ("crane", "fox", "crane")
    assert source.train.labels.tolist() == [0, 1, 2]


def test_a_changed_parquet_file_is_not_taken_from_the_cache(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [0, 1, 0])
    assert len(load_source(str(path), cache_dir=tmp_path / "c").train.labels) == 3
    write_parquet(path, [0, 1, 0, 1, 1])
    assert len(load_source(str(path), cache_dir=tmp_path / "c").train.labels) == 5


def test_webdataset_tars_with_mixed_formats(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        members = []
        for index in range(count):
            suffix = "jpg" if index % 2 else "png"
            members.append((f"{index:04d}.{suffix}", encoded((20 * index, 0, 0), suffix)))
            members.append((f"{index:04d}.cls", str(index % 2).encode()))
            members.append((f"{index:04d}.json", b'{"any": 1}'))
        write_tar(tmp_path / f"pets-{split}-000.tar", members)
    source = load_source(str(tmp_path), cache_dir=tmp_path / "cache")
    assert source.kind == "webdataset"
    assert source.train.labels.tolist() == [0, 1, 0, 1]
    assert source.test is not None
    assert source.test.labels.tolist() == [0, 1]
    np.testing.assert_allclose(reds(source.train), [0, 20, 40, 60], atol=2)  # JPEG rounds


def test_reading_leaves_the_progress_bars_of_datasets_as_they_were(tmp_path, capsys):
    import datasets

    path = write_parquet(tmp_path / "x.parquet", [0, 1])
    capsys.readouterr()
    before = datasets.are_progress_bars_disabled()
    load_source(str(path), cache_dir=tmp_path / "cache")
    assert datasets.are_progress_bars_disabled() == before
    assert capsys.readouterr() == ("", "")


def test_unwritable_cache_falls_back_to_a_temporary_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = write_parquet(tmp_path / "x.parquet", [0, 1])
    source = load_source(str(path), cache_dir=tmp_path / "file" / "cache")
    temporary = source.train.cache.path
    assert temporary.is_dir()
    assert reds(source.train) == [0, 1]
    del source
    assert not temporary.exists()


def test_local_files_are_read_without_a_socket(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [0, 1])
    tar = write_tar(tmp_path / "x.tar", [("0.png", encoded((0, 0, 0))), ("0.cls", b"0")])
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('asked the network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from pathlib import Path\n"
        "from slimnas.data import load_source\n"
        "for spec in sys.argv[1:]: load_source(spec, cache_dir=Path(sys.argv[1] + '.cache'))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tar)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")


def refuse_folder(tmp_path: Path) -> str:
    make_folder(tmp_path / "cifar10", {"a": 1, "b": 1})
    return str(tmp_path / "cifr10")


def refuse_loose(tmp_path: Path) -> str:
    (tmp_path / "x.png").write_bytes(encoded((0, 0, 0)))
    return str(tmp_path)


def refuse_empty_class(tmp_path: Path) -> str:
    (make_folder(tmp_path, {"a": 1, "b": 1}) / "empty").mkdir()
    return str(tmp_path)


def refuse_foreign_class(tmp_path: Path) -> str:
    make_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    make_folder(tmp_path / "test", {"cat": 1, "dogs": 1})
    return str(tmp_path)


def refuse_truncated(tmp_path: Path) -> str:
    path = write_parquet(tmp_path / "x.parquet", [0, 1] * 20)
    path.write_bytes(path.read_bytes()[:-100])
    return str(path)


def refuse_corrupt(tmp_path: Path) -> str:
    path = write_parquet(tmp_path / "x.parquet", [0, 1] * 20)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)  # the footer stays whole
    path.write_bytes(data)
    return str(path)


def refuse_tar(tmp_path: Path) -> str:
    tar = write_tar(tmp_path / "x.tar", [(f"{i}.png", encoded((i, 0, 0))) for i in range(9)])
    tar.write_bytes(tar.read_bytes()[:700])
    return str(tar)


def refuse_test_labels(tmp_path: Path) -> str:
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [-1, -1])
    return str(tmp_path)


def refuse_mixed_names(tmp_path: Path) -> str:
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "more.parquet", [0, 1])
    return str(tmp_path)


def refuse_no_train(tmp_path: Path) -> str:
    write_parquet(tmp_path / "val.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [0, 1])
    return str(tmp_path)


def refuse_text_file(tmp_path: Path) -> str:
    (tmp_path / "x.csv").write_text("1,2")
    return str(tmp_path / "x.csv")


REFUSED = [
    (refuse_folder, r"no such file or folder.*did you mean 'cifar10'\?"),
    (lambda path: str(path / "no" / "where"), r"'no' is not in"),
    (lambda path: str(path / "*.parquet"), "no file matches"),
    (lambda path: str(path), "one sub-folder of images per class; no images in it"),
    (refuse_loose, "its images lie loose"),
    (refuse_empty_class, "empty holds no images"),
    (refuse_foreign_class, r"class 'dogs' of .* \(did you mean 'dog'\?\)"),
    (refuse_truncated, r"x\.parquet: not a whole parquet file"),
    (refuse_corrupt, r"x\.parquet: cannot be read"),
    (refuse_tar, r"x\.tar: cannot be read"),
    (
        lambda path: str(write_parquet(path / "x.parquet", [0, 1], image="photo")),
        "must have a column 'image', has photo, label",
    ),
    (
        lambda path: str(write_parquet(path / "x.parquet", [0, 1], label="kind")),
        "must have a column 'label', has image, kind",
    ),
    (lambda path: str(write_parquet(path / "x.parquet", [0.5, 1.5])), "it holds 0.5"),
    (
        lambda path: str(write_parquet(path / "x.parquet", [0, None, 1])),
        r"1 of 3 are not, the first is image 1 \(1\.png\)",
    ),
    (refuse_test_labels, "every image of the test split must have a label"),
    (refuse_mixed_names, r"more\.parquet does not say which split"),
    (refuse_no_train, "has test and validation files and no train file"),
    (refuse_text_file, r"all be \.parquet or all \.tar, these end in \.csv"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_unusable_data_is_refused_in_one_line(tmp_path, make, message):
    spec = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_source(spec, cache_dir=tmp_path / ".cache")
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_network_is_refused_in_one_line(tmp_path, monkeypatch):
    import socket

    def offline(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(
        DataError, match="no such path here, and the hub gave no data set"
    ) as caught:
        load_source("somebody/something", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_test_split_without_labels_is_passed_over_for_validation(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", [-1, -1, -1])
    write_parquet(tmp_path / "validation.parquet", [1, 0])
    source = load_source(str(tmp_path), cache_dir=tmp_path / "cache")
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 0]
