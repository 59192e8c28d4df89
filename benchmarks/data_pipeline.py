"""Training images per second: our pipeline beside a plain loop of PIL and a DataLoader.

    python benchmarks/data_pipeline.py --images imagenet.parquet

Both start from the same encoded images in memory and end with normalised float32 batches on the
CPU: decode, random resized crop (scale 0.08 to 1, ratio 3/4 to 4/3, bicubic), mirror half of them,
normalise. The plain loop is what one writes by hand: `Image.open(...).convert("RGB")`, `crop`,
`resize`, a tensor per image, default collation, as many worker processes as there are cores, kept
alive from epoch to epoch. Nothing is trained. The two take turns, each in rounds of one epoch over
all images, begun afresh; a ratio is formed within a round. Both are bound to the same cores.

CIFAR-size images come from memory, shifted and mirrored.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import io
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As the commands do, before torch loads OpenMP: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import PIL
import torch
from PIL import Image
from supernet_throughput import RESULTS_HEAD, quartiles
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import slimnas
from slimnas._files import atomic_write_text
from slimnas.data.batches import ImageSet, LazyPixels, MemoryPixels, Split
from slimnas.data.crop import CropPolicy
from slimnas.data.load import load_source
from slimnas.data.sources import RawImage
from slimnas.measure.machine import load_average, this_machine

HERE = Path(__file__).resolve().parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TARGET_RATIO, TARGET_FROM_MEMORY = 1.0, 20_000


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    images: str
    resolution: int
    batch: int
    cores: int
    rounds: int
    limit: int
    small: int
    small_batch: int
    width: int | None
    note: str


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded images in memory, as an `ImageTable`."""

    raws: Sequence[bytes]
    labels: np.ndarray

    def read(self, indexes: Sequence[int]) -> list[RawImage]:
        """Return the images of these rows, undecoded."""
        return [self.raws[index] for index in indexes]

    def name(self, index: int) -> str:
        """Return the row number."""
        return f"image {index}"


class PlainImages(Dataset[tuple[Tensor, int]]):
    """The same images, as a loop written by hand reads them."""

    def __init__(self, encoded: Encoded, resolution: int) -> None:
        self.encoded, self.size = encoded, (resolution, resolution)
        self.mean = torch.tensor(MEAN).view(3, 1, 1)
        self.std = torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.encoded.raws)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.encoded.raws[index])).convert("RGB")
        image = image.crop(random_box(*image.size)).resize(self.size, Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.float().div(255) - self.mean) / self.std, int(self.encoded.labels[index])


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """A random resized crop's box: ten tries, then the whole image."""
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = random.randint(0, width - columns), random.randint(0, height - rows)
            return left, top, left + columns, top + rows
    return 0, 0, width, height


def read_images(settings: Settings) -> Encoded:
    """The first images of the source, in memory."""
    table = load_source(settings.images).train
    count = min(settings.limit, len(table.labels))
    raws = [raw.read_bytes() if isinstance(raw, Path) else raw for raw in table.read(range(count))]
    if not all(isinstance(raw, bytes) for raw in raws):
        raise SystemExit("--images must name encoded images")
    if settings.width is not None:
        raws = [enlarged(raw, settings.width) for raw in raws]  # type: ignore[arg-type]
    return Encoded(raws, table.labels[:count])  # type: ignore[arg-type]


def enlarged(raw: bytes, width: int) -> bytes:
    """The image at 4:3, encoded anew: for the cost of decoding larger ones, not for their looks."""
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    buffer = io.BytesIO()
    image.resize((width, width * 3 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def our_epochs(encoded: Encoded, settings: Settings) -> Callable[[int], Iterator[Any]]:
    """Epoch -> batches of our pipeline."""
    side, rows = settings.resolution, np.arange(len(encoded.raws))
    store = LazyPixels(encoded, rows, (side, side), 3, CropPolicy(SCALE, RATIO, "bicubic"))
    labels = torch.from_numpy(encoded.labels)
    images = ImageSet(Split.TRAIN, store, labels, MEAN, STD, flip=True)
    return lambda epoch: images.batches(
        settings.batch, device="cpu", seed=0, epoch=epoch, augment=True
    )


def plain_epochs(encoded: Encoded, settings: Settings) -> Callable[[int], Iterator[Any]]:
    """Epoch -> batches of the plain loop."""
    loader = DataLoader(
        PlainImages(encoded, settings.resolution),
        settings.batch,
        shuffle=True,
        drop_last=True,
        num_workers=settings.cores,
        persistent_workers=True,
    )
    return lambda epoch: iter(loader)


def small_epochs(settings: Settings) -> Callable[[int], Iterator[Any]]:
    """Epoch -> batches of CIFAR-size images from memory; what they show does not matter."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (settings.small, 3, 32, 32), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, 10, (settings.small,), generator=generator)
    images = ImageSet(Split.TRAIN, MemoryPixels(pixels), labels, MEAN, STD, flip=True)
    return lambda epoch: images.batches(
        settings.small_batch, device="cpu", seed=0, epoch=epoch, augment=True
    )


def images_per_s(epochs: Callable[[int], Iterator[Any]], epoch: int, side: int) -> float:
    """Go through one epoch."""
    gc.collect()
    began, seen = time.perf_counter(), 0
    for images, labels in epochs(epoch):
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, side, side)
        seen += len(labels)
    return seen / (time.perf_counter() - began)


def measure(settings: Settings) -> dict[str, Any]:
    """Speeds of every mode in every round, and what they were measured on."""
    encoded = read_images(settings)
    modes = {
        "slimnas": (our_epochs(encoded, settings), settings.resolution),
        "plain": (plain_epochs(encoded, settings), settings.resolution),
        "from memory": (small_epochs(settings), 32),
    }
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    loads = []
    for number in range(settings.rounds + 1):  # the first one only warms up
        turn = number % len(modes)
        for mode in [*modes][turn:] + [*modes][:turn]:
            epochs, side = modes[mode]
            speed = images_per_s(epochs, number, side)
            if number:
                speeds[mode].append(speed)
        loads.append(load_average())
        print(f"round {number} of {settings.rounds} done", file=sys.stderr)
    sizes = [Image.open(io.BytesIO(raw)).size for raw in encoded.raws]
    ratios = [ours / plain for ours, plain in zip(speeds["slimnas"], speeds["plain"], strict=True)]
    return {
        "benchmark": "data_pipeline",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "slimnas": slimnas.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "machine": asdict(this_machine()),
        "load_averages": loads,
        "settings": asdict(settings),
        "images": {
            "count": len(sizes),
            "median_width": statistics.median(width for width, _ in sizes),
            "median_height": statistics.median(height for _, height in sizes),
            "median_bytes": statistics.median(len(raw) for raw in encoded.raws),
        },
        "images_per_s": {mode: quartiles(values) for mode, values in speeds.items()},
        "ratio": quartiles(ratios),
        "rounds_images_per_s": speeds,
        "reached": {
            "ratio": quartiles(ratios)["median"] >= TARGET_RATIO,
            "from_memory": quartiles(speeds["from memory"])["median"] >= TARGET_FROM_MEMORY,
        },
    }


def summary(result: dict[str, Any]) -> str:
    """One line for RESULTS.md."""
    settings, images, speeds = result["settings"], result["images"], result["images_per_s"]
    note = f"{settings['note']}; " if settings["note"] else ""
    enlarged_to = "" if settings["width"] is None else ", enlarged and encoded anew"
    size = f"{images['median_width']:.0f} x {images['median_height']:.0f}"
    return (
        f"| {result['date']} | data_pipeline | {result['machine']['cpu']}, {settings['cores']} "
        f"cores, torch {result['torch']}, Pillow {result['pillow']} | {images['count']} JPEG "
        f"images{enlarged_to}, median {size}, random crops of {settings['resolution']} px, batch "
        f"{settings['batch']}, {settings['rounds']} rounds | {note}images/s, median [quartiles]: "
        f"ours {_spread(speeds['slimnas'], 0)}, plain PIL with {settings['cores']} DataLoader "
        f"workers {_spread(speeds['plain'], 0)}, ratio {_spread(result['ratio'], 2)}; 32 x 32 from "
        f"memory, batch {settings['small_batch']}: {_spread(speeds['from memory'], 0)} |"
    )


def _spread(values: dict[str, float], digits: int) -> str:
    median, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def parse() -> tuple[Settings, Path]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="parquet, tars or folder of JPEG images")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--cores", type=int, default=2, help="and worker processes of the plain loop"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=int, default=1024, help="images of the source, at most")
    parser.add_argument("--small", type=int, default=50_000, help="CIFAR-size images")
    parser.add_argument("--small-batch", type=int, default=256)
    parser.add_argument("--width", type=int, help="enlarge the images to this and encode them anew")
    parser.add_argument("--note", default="", help="about the circumstances, for RESULTS.md")
    parser.add_argument("--output", type=Path, default=HERE, help="where results go")
    given = vars(parser.parse_args())
    output = given.pop("output")
    return Settings(**given), output


def main() -> None:
    """Measure, print and keep."""
    settings, output = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.cores])
    torch.set_num_threads(settings.cores)
    result = measure(settings)
    # The path is this machine's own affair.
    result["settings"]["images"] = Path(settings.images).name
    name = "data_pipeline" + ("" if settings.width is None else f"_{settings.width}")
    atomic_write_text(output / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    results = output / "RESULTS.md"
    head = results.read_text(encoding="utf-8") if results.is_file() else RESULTS_HEAD
    atomic_write_text(results, head + summary(result) + "\n")
    print(summary(result))


if __name__ == "__main__":
    main()
