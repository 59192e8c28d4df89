"""Encoded image to uint8 pixels of one resolution, by Pillow.

Pillow lets go of the interpreter's lock while it decodes and scales, so threads are enough. Random
crops are scaled by torch where it has vector instructions for bytes: in less than half the time of
Pillow, whose values it meets within two levels of 255.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch.nn.functional import interpolate

from slimnas.data.crop import CropDraw
from slimnas.data.sources import ImageTable, RawImage

_BAD_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error),
    Image.DecompressionBombError,
)
_ROWS_READ_AT_ONCE = 1024
_ROWS_PER_THREAD = 16
_DETAIL = 2
"""How many pixels per pixel of the result libjpeg decodes at least, on each axis."""
_MOVED = range(2, 9)
_TURNED = range(5, 9)
"""Orientation tags that move pixels, and those among them that swap width and height."""

_VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}

Pixels: TypeAlias = "NDArray[np.uint8]"


def decode(
    raw: RawImage, resolution: tuple[int, int], channels: int, crop: CropDraw | None = None
) -> Pixels:
    """Return the image as uint8 (C, H, W).

    The largest centred crop with the resolution's aspect ratio is scaled to it (bilinear,
    antialiased), or a random crop where one is asked for. Orientation tags are honoured,
    transparency is dropped, grey images are repeated over three channels, colour ones become luma
    for one. Of an animation the first frame is taken.

    Args:
        raw: an encoded image, its file, or grey pixels.
        resolution: height and width of the result, pixels.
        channels: 1 or 3.
        crop: of the upright image; None for the centred one.

    Raises:
        OSError, ValueError, ...: what Pillow raises for an image it cannot decode;
            `try_decode` gives the reason instead.
    """
    mode = "L" if channels == 1 else "RGB"
    with _open(raw) as opened:
        if crop is None:
            return _pixels(_centred(opened, resolution, mode))
        return _cropped(opened, resolution, mode, crop)


def _centred(opened: Image.Image, resolution: tuple[int, int], mode: str) -> Image.Image:
    height, width = resolution
    # Lets libjpeg skip detail that the resize would average away anyway.
    opened.draft(None, (_DETAIL * width, _DETAIL * height))
    image = _plain(_upright(opened), mode)
    if image.size == (width, height):
        return image
    return image.resize(
        (width, height), Image.Resampling.BILINEAR, box=_centre(image, width / height)
    )


def _cropped(opened: Image.Image, resolution: tuple[int, int], mode: str, crop: CropDraw) -> Pixels:
    height, width = resolution
    turned = _orientation(opened) in _TURNED
    whole = opened.size[::-1] if turned else opened.size
    (left, top, right, bottom), resampling = crop.choose(*whole)
    shrink = 1
    spare = min((right - left) / width, (bottom - top) / height) / _DETAIL
    if spare >= 2:
        # libjpeg shrinks by 2, 4 or 8: by the most that leaves the crop its detail.
        shrink = 2 ** min(3, int(math.log2(spare)))
        opened.draft(None, (opened.width // shrink, opened.height // shrink))
    image = _plain(_upright(opened), mode)
    if shrink == 1 and mode == "RGB" and _VECTORS:
        return _scaled(image.crop((left, top, right, bottom)), resolution, resampling)
    across, down = image.width / whole[0], image.height / whole[1]
    box = (
        left * across,
        top * down,
        min(right * across, image.width),
        min(bottom * down, image.height),
    )
    return _pixels(image.resize((width, height), resampling, box=box))


def _scaled(
    image: Image.Image, resolution: tuple[int, int], resampling: Image.Resampling
) -> Pixels:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    mode = _MODES[resampling]
    scaled = interpolate(pixels, resolution, mode=mode, align_corners=False, antialias=True)
    return scaled[0].numpy()


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if image.mode == "L" else pixels.transpose(2, 0, 1)


def check_header(raw: RawImage) -> str | None:
    """Return why the image cannot be opened, or None when its header is sound."""
    try:
        _open(raw).close()
    except _BAD_IMAGE as error:
        return _reason(error)
    return None


def decode_rows(
    table: ImageTable, indexes: Sequence[int], resolution: tuple[int, int], channels: int
) -> Iterator[Pixels | str]:
    """Decode rows on all cores, in order; yields (C, H, W) uint8, or why a row is undecodable."""

    def work(raws: list[RawImage]) -> list[Pixels | str]:
        return [try_decode(raw, resolution, channels) for raw in raws]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(indexes), _ROWS_READ_AT_ONCE):
            raws = table.read(indexes[start : start + _ROWS_READ_AT_ONCE])
            chunks = [
                raws[at : at + _ROWS_PER_THREAD] for at in range(0, len(raws), _ROWS_PER_THREAD)
            ]
            for results in pool.map(work, chunks):
                yield from results


def try_decode(
    raw: RawImage, resolution: tuple[int, int], channels: int, crop: CropDraw | None = None
) -> Pixels | str:
    """Return what `decode` returns, or why the image is undecodable."""
    try:
        return decode(raw, resolution, channels, crop)
    except _BAD_IMAGE as error:
        return _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if "cannot identify image file" in str(error):
        return "not an image Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def _open(raw: RawImage) -> Image.Image:
    if raw is None:
        raise ValueError("the image is missing")
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    return Image.open(raw if isinstance(raw, Path) else io.BytesIO(raw))


def _orientation(image: Image.Image) -> int:
    tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    return tag if isinstance(tag, int) else 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    # Pillow copies the image where there is nothing to turn.
    return ImageOps.exif_transpose(image) if _orientation(image) in _MOVED else image


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _centre(image: Image.Image, aspect: float) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of the largest centred box of this aspect (width/height)."""
    width = min(float(image.width), image.height * aspect)
    height = min(float(image.height), image.width / aspect)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height
