"""Streams: every image once per epoch over all processes, in an order that can be resumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_cases import grey, numbers_of, tar_members, write_folder, write_parquet, write_tar

from slimnas.data import (
    CropPolicy,
    DataOptions,
    Part,
    StreamedImages,
    StreamOptions,
    TrainingData,
    open_training,
)
from slimnas.errors import DataError

OPTIONS = DataOptions(resolution=(8, 8), channels=1, seed=0)
COUNT = 40
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def parquet(root: Path, *, shards: int = 4, count: int = COUNT) -> str:
    """`count` images in shards of equal size; the label tells whether the number is odd."""
    size = count // shards
    for shard in range(shards):
        rows = {n: n % 2 for n in range(shard * size, (shard + 1) * size)}
        write_parquet(root / f"part-{shard}.parquet", rows, names=["even", "odd"])
    return str(root)


def tars(root: Path) -> str:
    for shard in range(4):
        rows = {n: n % 2 for n in range(shard * 10, shard * 10 + 10)}
        write_tar(root / f"part-{shard}.tar", tar_members(rows))
    return str(root)


def folder(root: Path) -> str:
    return str(write_folder(root, {"even": range(0, COUNT, 2), "odd": range(1, COUNT, 2)}))


def opened(spec: str, **options: object) -> TrainingData:
    changes = {
        key: options.pop(key) for key in ("crop", "test_spec", "normalisation") if key in options
    }
    settings = replace(OPTIONS, skip_bad_images=bool(options.pop("skip_bad_images", False)))
    return open_training(
        spec, settings, stream=StreamOptions(**{"buffer": 8, **options}), **changes
    )


def raw(data: TrainingData, batch_size: int = 8, **changes: object) -> list[Batch]:
    settings = {"device": "cpu", "seed": 1, "epoch": 0, **changes}
    return list(data.train.raw_batches(batch_size, **settings))


def numbers(batches: list[Batch]) -> list[int]:
    return [number for x, _ in batches for number in numbers_of(x.numpy())]


@pytest.mark.parametrize("make", [parquet, tars, folder])
def test_an_epoch_has_each_image_once_with_its_label(tmp_path, make):
    data = opened(make(tmp_path))
    assert isinstance(data.train, StreamedImages)
    assert len(data.train) == COUNT
    assert data.train.steps(8) == 5
    seen = []
    for epoch in range(3):
        batches = raw(data, epoch=epoch)
        assert [len(y) for _, y in batches] == [8] * 5
        found = numbers(batches)
        assert sorted(found) == list(range(COUNT))
        labels = [label for _, y in batches for label in y.tolist()]
        assert labels == [number % 2 for number in found]
        seen.append(tuple(found))
    assert len({*seen, tuple(range(COUNT))}) == 4
    assert numbers(raw(data, seed=2)) != numbers(raw(data, seed=1)) == list(seen[0])
    assert data.test is None
    assert "2 classes, 40 images to train on, none to judge on" in data.description


@pytest.mark.parametrize(("shards", "readers"), [(4, 1), (4, 2), (4, 9), (1, 2), (5, 2)])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_share_an_epoch_and_have_no_image_twice(tmp_path, shards, readers, count):
    data = opened(parquet(tmp_path, shards=shards), readers=readers)
    batch_size = 4 * count
    steps = COUNT // batch_size
    parts = [numbers(raw(data, batch_size, part=Part(i, count))) for i in range(count)]
    assert [len(part) for part in parts] == [4 * steps] * count
    assert len({number for part in parts for number in part}) == 4 * steps * count


def test_a_process_that_runs_out_starts_over(tmp_path):
    write_parquet(tmp_path / "a.parquet", {n: n % 2 for n in range(32)})
    write_parquet(tmp_path / "b.parquet", {n: n % 2 for n in range(32, 40)})
    data = opened(str(tmp_path))
    parts = [numbers(raw(data, part=Part(i, 2))) for i in range(2)]
    assert [len(part) for part in parts] == [20, 20]
    few, many = sorted(parts, key=lambda part: len(set(part)))
    assert set(few) == set(range(32, 40))
    assert {2, 3} == set(Counter(few).values())
    assert few[:8] != few[8:16]
    assert set(Counter(many).values()) == {1}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("part", [Part(), Part(1, 2)])
def test_resuming_inside_an_epoch_gives_the_batches_of_an_uninterrupted_one(
    tmp_path, part, repeats
):
    data = opened(parquet(tmp_path), crop=CropPolicy())
    whole = raw(data, part=part, repeats=repeats)
    assert len(whole) == 5
    for start in range(6):
        rest = raw(data, part=part, repeats=repeats, start_batch=start)
        assert len(rest) == 5 - start
        for (x, y), (u, v) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_repeats_keep_the_number_of_steps(tmp_path):
    found = numbers(raw(opened(parquet(tmp_path)), 9, repeats=3))
    assert len(found) == 4 * 9
    assert set(Counter(found).values()) == {3}
    for at in range(0, 36, 9):
        assert len(set(found[at : at + 9])) == 3


def test_images_per_epoch_ends_it_and_goes_past_the_data(tmp_path):
    spec = parquet(tmp_path)
    few, many = opened(spec, images_per_epoch=16), opened(spec, images_per_epoch=100)
    assert (len(few.train), len(many.train)) == (16, 100)
    assert len(set(numbers(raw(few)))) == 16
    found = Counter(numbers(raw(many)))
    assert sum(found.values()) == 96
    assert set(found.values()) == {2, 3}
    assert few.digest != many.digest


def test_batches_are_normalised_and_augmented_as_those_of_a_set(tmp_path):
    data = opened(parquet(tmp_path), normalisation=((0.25,), (0.5,)))
    settings = {"device": "cpu", "seed": 1, "epoch": 0}
    plain = list(data.train.batches(8, augment=False, **settings))
    for (x, y), (u, v) in zip(raw(data), plain, strict=True):
        torch.testing.assert_close((x.float() / 255 - 0.25) / 0.5, u)
        assert torch.equal(y, v)
    # Shifting and mirroring leaves an image of one grey level as it is.
    for (x, y), (u, v) in zip(plain, data.train.batches(8, augment=True, **settings), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


def noisy(root: Path, count: int = 12) -> str:
    import io

    from PIL import Image

    images = {}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images[number] = buffer.getvalue()
    return str(write_parquet(root / "x.parquet", {n: n for n in range(count)}, broken=images))


def test_crops_follow_from_the_place_in_the_stream(tmp_path):
    data = opened(noisy(tmp_path), crop=CropPolicy())
    first, again = raw(data, 4), raw(data, 4)
    for (x, y), (u, v) in zip(first, again, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    centred = {
        int(label): image
        for x, y in data.train.batches(4, device="cpu", seed=1, epoch=0, augment=False)
        for image, label in zip(x, y, strict=True)
    }
    assert len(centred) == 12
    for x, y in first:
        for image, label in zip(data.train.normalise(x), y.tolist(), strict=True):
            assert not torch.equal(image, centred[label])
    copies = raw(data, 4, repeats=2)[0][0]
    assert not torch.equal(copies[0], copies[1])


def test_a_stream_can_be_left_in_the_middle_and_read_twice_at_once(tmp_path):
    data = opened(parquet(tmp_path))
    expected = numbers(raw(data))
    one = data.train.raw_batches(8, device="cpu", seed=1, epoch=0)
    two = data.train.raw_batches(8, device="cpu", seed=1, epoch=0)
    next(one)
    assert numbers([next(two), next(two)]) == expected[:16]
    one.close()
    assert numbers(list(two)) == expected[16:]


def test_mean_and_deviation_are_those_of_the_images(tmp_path):
    data = opened(parquet(tmp_path))
    values = np.arange(COUNT) / 255
    assert data.mean[0] == pytest.approx(values.mean(), abs=1e-9)
    assert data.std[0] == pytest.approx(values.std(), abs=1e-9)
    assert data.train.mean == data.mean


def test_the_test_split_is_not_streamed(tmp_path):
    for shard in range(2):
        rows = {n: n % 2 for n in range(shard * 10, shard * 10 + 10)}
        write_parquet(tmp_path / f"train-{shard}.parquet", rows)
    write_parquet(tmp_path / "test-0.parquet", {100: 0, 101: 1, 102: 0})
    data = opened(str(tmp_path))
    assert len(data.train) == 20
    assert numbers_of(data.test.store.take(np.arange(3)).numpy()) == [100, 101, 102]
    assert data.test.labels.tolist() == [0, 1, 0]
    assert data.test.mean == data.train.mean
    assert data.description.endswith("20 images to train on, 3 to judge on, its own test split")
    other = write_folder(tmp_path / "other", {"0": [50], "1": [51]})
    judged = opened(str(tmp_path), test_spec=str(other))
    assert numbers_of(judged.test.store.take(np.arange(2)).numpy()) == [50, 51]
    assert len({data.digest, judged.digest, opened(str(tmp_path)).digest}) == 2


def test_a_hub_data_set_is_streamed_and_only_its_test_split_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    for split, rows in (("train", range(20)), ("test", range(30, 34))):
        table = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": grey(n), "path": None} for n in rows],
                "label": [n % 2 for n in rows],
            },
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
            ),
        )
        (tmp_path / "repo" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet")
    real = datasets.load_dataset

    def load(spec: str, *, cache_dir: str, streaming: bool) -> object:
        assert (spec, streaming) == ("someone/parity", True)
        return real(str(tmp_path / "repo"), cache_dir=cache_dir, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    with pytest.raises(DataError, match="does not tell how many images it has") as caught:
        opened("someone/parity")
    assert "\n" not in str(caught.value)
    data = opened("someone/parity", images_per_epoch=20)
    found = raw(data, 10)
    assert sorted(numbers(found)) == list(range(20))
    assert [y for _, v in found for y in v.tolist()] == [n % 2 for n in numbers(found)]
    assert numbers_of(data.test.store.take(np.arange(4)).numpy()) == [30, 31, 32, 33]
    assert data.class_names == ("even", "odd")


def test_labels_are_named_or_numbered(tmp_path):
    write_parquet(tmp_path / "a.parquet", {1: "dog", 2: "cat"})
    write_parquet(tmp_path / "b.parquet", {3: "eel", 4: "cat"})
    data = opened(str(tmp_path))
    assert data.class_names == ("cat", "dog", "eel")
    found = {
        n: int(label)
        for x, y in raw(data, 4)
        for n, label in zip(numbers_of(x.numpy()), y, strict=True)
    }
    assert found == {1: 1, 2: 0, 3: 2, 4: 0}


def test_undecodable_images_end_the_run_or_are_replaced_by_others(tmp_path):
    rows = {n: n % 2 for n in range(20)}
    write_parquet(tmp_path / "x.parquet", rows, broken={7: b"no image", 8: grey(8)[:40]})
    data = None
    with pytest.raises(
        DataError, match=r"every image must be decodable, [78]\.png of .*skip-bad-images"
    ):
        data = opened(str(tmp_path))
    assert data is None
    data = opened(str(tmp_path), skip_bad_images=True)
    for epoch in range(4):
        batches = raw(data, 5, epoch=epoch)
        found = numbers(batches)
        assert len(found) == 20
        assert set(found) == set(rows) - {7, 8}
        assert [y for _, v in batches for y in v.tolist()] == [n % 2 for n in found]
    with pytest.raises(DataError, match="every image must be decodable"):
        raw(data, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": 0}, "buffer"),
        ({"readers": 0}, "readers"),
        ({"images_per_epoch": 0}, "images_per_epoch"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=f"{message} of a stream must be 1 or more, got 0"):
        StreamOptions(**options)


def test_more_processes_than_images_are_refused(tmp_path):
    write_parquet(tmp_path / "x.parquet", {1: 0, 2: 1})
    data = opened(str(tmp_path), images_per_epoch=50)
    with pytest.raises(DataError, match="no image for process 3 of 5; start fewer"):
        raw(data, 10, part=Part(3, 5))


def test_images_that_lie_elsewhere_are_fetched(tmp_path):
    import fsspec

    data = opened(parquet(tmp_path))
    rows = []
    for number in range(8):
        with fsspec.open(f"memory://images/{number}.png", "wb") as file:
            file.write(grey(number))
        path = f"memory://images/{number}.png"
        rows.append({"image": {"bytes": None, "path": path}, "label": number % 2})
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=2)
    source = replace(data.train.source, rows=table, count=8)
    elsewhere = replace(data, train=replace(data.train, source=source))
    assert sorted(numbers(raw(elsewhere, 4))) == list(range(8))
