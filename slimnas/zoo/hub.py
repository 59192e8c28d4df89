"""Published weights from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from slimnas.errors import WeightsError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(repository: str, file: str, *, sha256: str | None = None) -> Path:
    """Download one file of a model repository, or find it in the hub's cache, and check it.

    Its SHA-256 must be `sha256`. Where that is not given it must be the hub's own: the cache names
    large files by it.

    Raises:
        WeightsError: not cached and not reachable, or other content.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(huggingface_hub.hf_hub_download(repository, file))
        _check(path, sha256, what=f"{repository}: {file}")
    except (OSError, EntryNotFoundError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{repository}: cannot download {file} from huggingface.co ({reason}); connect to "
            "the network, or download it elsewhere and give its path"
        ) from error
    return path


def _check(path: Path, sha256: str | None, *, what: str) -> None:
    stored = path.resolve()
    expected = sha256 or (stored.name if _SHA256.fullmatch(stored.name) else None)
    if expected is None:
        return
    sha = hashlib.sha256()
    with stored.open("rb") as content:
        while block := content.read(1 << 20):
            sha.update(block)
    if sha.hexdigest() != expected:
        raise WeightsError(
            f"{what}: has SHA-256 {sha.hexdigest()}, expected {expected}; delete {stored} and "
            "download it again"
        )
