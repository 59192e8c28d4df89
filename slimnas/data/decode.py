"""Encoded image to uint8 pixels of one resolution, by Pillow."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slimnas.data.sources import ImageTable, RawImage

_BAD_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error),
    Image.DecompressionBombError,
)
_ROWS_READ_AT_ONCE = 1024
_ROWS_PER_THREAD = 64


def decode(raw: RawImage, resolution: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """Return the image as uint8 (C, H, W).

    The largest centred crop with the resolution's aspect ratio is scaled to it (bilinear,
    antialiased). Orientation tags are honoured, transparency is dropped, grey images are
    repeated over three channels, colour ones become luma for one.

    Args:
        raw: an encoded image, its file, or grey pixels.
        resolution: height and width of the result, pixels.
        channels: 1 or 3.

    Raises:
        OSError, ValueError, ...: what Pillow raises for an image it cannot decode;
            `decode_rows` gives the reason instead.
    """
    height, width = resolution
    with _open(raw) as opened:
        # Lets libjpeg skip detail that the resize would average away anyway.
        opened.draft(None, (2 * width, 2 * height))
        image = _plain(ImageOps.exif_transpose(opened), "L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize(
            (width, height), Image.Resampling.BILINEAR, box=_crop(image, width / height)
        )
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def check_header(raw: RawImage) -> str | None:
    """Return why the image cannot be opened, or None when its header is sound."""
    try:
        _open(raw).close()
    except _BAD_IMAGE as error:
        return _reason(error)
    return None


def decode_rows(
    table: ImageTable, indexes: Sequence[int], resolution: tuple[int, int], channels: int
) -> Iterator[NDArray[np.uint8] | str]:
    """Decode rows on all cores, in order; yields (C, H, W) uint8, or why a row is undecodable."""

    def work(raws: list[RawImage]) -> list[NDArray[np.uint8] | str]:
        return [_try_decode(raw, resolution, channels) for raw in raws]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(indexes), _ROWS_READ_AT_ONCE):
            raws = table.read(indexes[start : start + _ROWS_READ_AT_ONCE])
            chunks = [
                raws[at : at + _ROWS_PER_THREAD] for at in range(0, len(raws), _ROWS_PER_THREAD)
            ]
            for results in pool.map(work, chunks):
                yield from results


def _try_decode(
    raw: RawImage, resolution: tuple[int, int], channels: int
) -> NDArray[np.uint8] | str:
    try:
        return decode(raw, resolution, channels)
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


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _crop(image: Image.Image, aspect: float) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of the largest centred box of this aspect (width/height)."""
    width = min(float(image.width), image.height * aspect)
    height = min(float(image.height), image.width / aspect)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height
