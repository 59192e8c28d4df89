"""What `--data` names becomes a `Source`.

Nothing here imports torch, and `datasets` is imported only by the kinds that need it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slimnas.data.sources import ArrayTable, Source


def load_source(spec: str, *, cache_dir: Path | None = None) -> Source:
    """Find the images that `spec` names.

    Args:
        spec: `digits` (scikit-learn's 1,797 real 8x8 images); a folder with one sub-folder per
            class, or with `train/` and `test/` (or `val/`, `validation/`) folders of such; a
            parquet file, a folder of them or a glob; webdataset tars, likewise; or, where no
            such path exists, a Hugging Face hub id `user/name`. Write `./digits` for a folder
            of that name.
        cache_dir: where parquet and tars are unpacked; None for the cache of `datasets`, or a
            temporary folder when that cannot be written.

    Raises:
        DataError: nothing is there, it cannot be read, or it lacks images or labels.
    """
    if spec == "digits":
        return _digits()
    from slimnas.data.files import load_files  # takes seconds to import, digits do not need it

    return load_files(spec, cache_dir)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels, 0..16, spread over 0..255.
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return Source(
        spec="digits",
        kind="digits",
        train=ArrayTable(pixels, bunch.target.astype(np.int64), "digits"),
        test=None,
        class_names=tuple(str(name) for name in bunch.target_names),
        flip=False,  # a mirrored 2 is no 2
    )
